"""Of playing on servers: whose reply it is, what it paid, which server is asked."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

SOCKET = "tests/openenv/test_client_socket.py::"
SESSIONS = "tests/openenv/test_client_sessions.py::"
PEERS = "tests/openenv/test_client_peers.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="late_reply_for_the_next_request",
        why="after one deadline every answer of the session is the one before it",
        file="openenv/client/line.py",
        old="        asked, future = self.waiting[0]\n",
        new=(
            "        while len(self.waiting) > 1 and self.waiting[0][1].done():\n"
            "            self.waiting.popleft()\n"
            "        asked, future = self.waiting[0]\n"
        ),
        tests=(SOCKET + "test_late_replies_are_dropped",),
    ),
    Mutation(
        name="a_client_takes_what_is_inside_of_a_frame_for_one",
        why="a long reply that comes in pieces is read as another reply",
        file="openenv/client/line.py",
        old="= not self._parts and not self.protocol.extensions and between_messages(self.protocol)",
        new="= True",
        tests=(SOCKET + "test_pieces_of_a_frame_are_not_frames",),
    ),
    Mutation(
        name="second_reply_is_kept",
        why="a server that answers twice has its second answer taken for the next request's",
        file="openenv/client/line.py",
        old='            else:\n                self._distrust(f"the server sent a frame',
        new='            elif kind is None:\n                self._distrust(f"the server sent a frame',
        tests=(SOCKET + "test_two_replies_to_one_request",),
    ),
    Mutation(
        name="a_forgotten_connection_stays_open",
        why="a notebook's cell that is run again waits for the place that it had itself",
        file="openenv/client/forgotten.py",
        old="        loop.call_soon_threadsafe(close, socket)\n",
        new="        pass\n",
        tests=("tests/openenv/test_client_connect.py::test_a_forgotten_connection_gives_its_place_back",),
    ),
    Mutation(
        name="a_schema_that_fails_is_waited_for",
        why="a server that plays well is told to be no server, after a minute",
        file="openenv/client/discovery.py",
        old="optional=bool(metadata)",
        new="optional=False",
        tests=(SESSIONS + "test_a_server_that_tells_no_schema_is_played_by_its_tools_or_by_replies",),
    ),
    Mutation(
        name="production_mode_is_no_matter",
        why="each episode on a server for agents fails, and is counted as the fault of the infrastructure",
        file="openenv/client/balance.py",
        old='    if code == "UNKNOWN_TYPE":\n',
        new="    if code is None and url is None:\n",
        tests=(SESSIONS + "test_what_agents_alone_may_play_is_told_before_an_episode",),
    ),
    Mutation(
        name="next_episode_on_a_hung_connection",
        why="an episode begins on a server that still works at another's call, and is lost with it",
        file="openenv/client/session.py",
        old="        fresh = not self.alive\n",
        new="        fresh = self._socket is None\n",
        tests=(SESSIONS + "test_a_hung_call_is_never_answered_by_the_next",),
    ),
    Mutation(
        name="history_of_the_last_episode",
        why="what an episode is first shown is cut by what the one before it had seen",
        file="openenv/client/session.py",
        old="        self._reader.begin()\n",
        new="",
        tests=(SESSIONS + "test_a_second_episode_begins_anew",),
    ),
    Mutation(
        name="required_fields_are_optional",
        why="calls that leave out what an action needs reach the server, and cost a turn's time",
        file="openenv/client/actions.py",
        old="    if needed := [name for name in required if name in shown]:\n",
        new="    if needed := list[str]():\n",
        tests=(SESSIONS + "test_a_typed_action_becomes_one_tool",),
    ),
    Mutation(
        name="steps_that_pay_nothing_pay_zero",
        why="an episode whose steps never pay is scored by them, in place of by what it is worth",
        file="openenv/client/peer.py",
        old='            reward=metadata["step_reward"],\n',
        new='            reward=metadata["step_reward"] or 0.0,\n',
        tests=(PEERS + "test_episodes_are_the_same",),
    ),
    Mutation(
        name="truncation_told_as_an_end",
        why="an episode that ran out counts as one that came to its end",
        file="openenv/client/peer.py",
        old='            truncated=metadata["truncated"],\n',
        new="            truncated=False,\n",
        tests=(PEERS + "test_episodes_are_the_same",),
    ),
    Mutation(
        name="one_server_gets_all",
        why="sessions that open at once all go to the first server",
        file="openenv/client/balance.py",
        old="            return min(well, key=lambda server: server.busy)\n",
        new="            return well[0]\n",
        tests=(SESSIONS + "test_sessions_are_spread_over_servers",),
    ),
    Mutation(
        name="a_failing_server_ends_the_listing",
        why="rows are not to be had while one of several servers fails",
        file="openenv/client/remote.py",
        old="if response.status_code == 429 or response.status_code >= 500:",
        new="if response.status_code == 1:",
        tests=(PEERS + "test_rows_are_listed_by_the_next_server_where_one_cannot",),
    ),
    Mutation(
        name="places_leak_when_closing_is_cancelled",
        why="a server counts as busy for good, and the others get all that comes",
        file="openenv/client/balance.py",
        old="        try:\n            await socket.close()\n        finally:\n",
        new="        await socket.close()\n        if True:\n",
        tests=(SESSIONS + "test_a_place_is_free_again_also_where_its_closing_is_cancelled",),
    ),
    Mutation(
        name="passwords_are_told",
        why="the password of an address stands in errors, reports and logs",
        file="envs/registry.py",
        old='return re.sub(r"^([a-z]*://)?[^/]*@", r"\\1", url, flags=re.IGNORECASE)',
        new="return url",
        tests=("tests/openenv/test_client_address.py::test_what_is_told_of_an_address",),
    ),
    Mutation(
        name="none_is_a_token",
        why="a server that was to ask for no token asks for the word none",
        file="openenv/server/settings.py",
        old='return None if token in (None, "", "none") else token',
        new='return None if token in (None, "") else token',
        tests=("tests/openenv/test_scaffold.py::test_an_app_and_env_serve_read_the_token_by_one_rule",),
    ),
)
