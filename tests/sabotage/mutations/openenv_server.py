"""Of OpenEnv's server: who gets a session and what ends it, what a step pays, who is let in."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

SESSIONS = "tests/openenv/test_server_sessions.py"
ACCESS = "tests/openenv/test_server_access.py"
HOSTED = "tests/openenv/test_hosted.py"
HTTP = "tests/openenv/test_server_http.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="a_session_more_than_allowed",
        why="one environment more is live than the server was told to hold",
        file="openenv/server/sessions.py",
        old="if self._taken < self.limit and not self._queue:",
        new="if self._taken <= self.limit and not self._queue:",
        tests=(f"{SESSIONS}::test_who_finds_all_sessions_taken_waits_for_one",),
    ),
    Mutation(
        name="a_place_is_lost_in_the_queue",
        why="who waits is never called, though a session became free",
        file="openenv/server/sessions.py",
        old="                turn.set_result(None)  # The place is handed over, not given back.\n",
        new="",
        tests=(f"{SESSIONS}::test_who_finds_all_sessions_taken_waits_for_one",),
    ),
    Mutation(
        name="a_dropped_socket_keeps_its_environment",
        why="an environment outlives its client, and in the end there is room for nobody",
        file="openenv/server/socket.py",
        old="                await asyncio.shield(asyncio.ensure_future(self.sessions.close(live)))",
        new="                pass",
        tests=(f"{SESSIONS}::test_sessions_opened_and_dropped_leave_nothing",),
    ),
    Mutation(
        name="idle_sessions_stay",
        why="environments that nobody uses are kept for ever",
        file="openenv/server/sessions.py",
        old="elif idle is not None and now - live.used > idle:",
        new="elif idle is not None and now - live.used > 1e9:",
        tests=(f"{SESSIONS}::test_idle_sessions_end_with_their_socket",),
    ),
    Mutation(
        name="a_busy_session_counts_as_idle",
        why="a call that takes longer than the idle timeout loses its session",
        file="openenv/server/sessions.py",
        old="if live.busy_since is not None:\n                    if now",
        new="if False:\n                    if now",
        tests=(f"{SESSIONS}::test_idle_sessions_end_with_their_socket",),
    ),
    Mutation(
        name="the_end_pays_twice",
        why="the environment is asked for its rewards again, which its peers add to those of the last step",
        file="openenv/hosted_session.py",
        old="        if self._rewards is None:\n",
        new="        if True:\n",
        tests=(f"{HOSTED}::test_rewards_are_asked_for_once",),
    ),
    Mutation(
        name="the_end_pays_nothing",
        why="clients of OpenEnv train without the environment's own rewards",
        file="openenv/hosted_session.py",
        old="parts = [part for part in (paid, *own.values()) if part is not None]",
        new="parts = [part for part in (paid,) if part is not None]",
        tests=(f"{HOSTED}::test_a_step_that_ends_pays_the_rewards_of_the_end_too",),
    ),
    Mutation(
        name="limits_hold_for_who_counts",
        why="an episode of a Turnwise peer is truncated by the server in the middle of its last turn",
        file="openenv/hosted_session.py",
        old="if self._counts and not terminated and not truncated:",
        new="if not terminated and not truncated:",
        tests=(f"{HOSTED}::test_who_brings_the_task_counts",),
    ),
    Mutation(
        name="any_page_may_play",
        why="a page that somebody visits talks to a server on their machine",
        file="openenv/server/access.py",
        old="return bool(host) and _place(origin) == host.lower()",
        new="return bool(host)",
        tests=(f"{ACCESS}::test_pages_of_other_sites_are_refused",),
    ),
    Mutation(
        name="a_rebound_name_is_ours",
        why="a page whose name was pointed at 127.0.0.1 counts as the server's own",
        file="openenv/server/access.py",
        old="if not self._names_us(host):",
        new="if False:",
        tests=(f"{ACCESS}::test_a_name_that_points_here_makes_no_page_ours",),
    ),
    Mutation(
        name="seeds_are_rounded",
        why="a whole number beyond 64 bits reaches the environment as a float next to it",
        file="openenv/wire.py",
        old="        if not _long_number(text):\n",
        new="        if True:\n",
        tests=("tests/openenv/test_wire.py::test_whole_numbers_are_never_rounded",),
    ),
    Mutation(
        name="the_inside_of_a_frame_is_one",
        why="bytes within a frame are taken for another frame: a request that nobody made",
        file="openenv/server/direct.py",
        old='return bool(waiting.__name__ == "at_eof")',
        new="return True",
        tests=("tests/openenv/test_server_direct.py::test_what_looks_like_a_frame_inside_of_one_is_none",),
    ),
    Mutation(
        name="routes_in_another_application_ask_for_nothing",
        why="an environment that was added to an application is played by whoever reaches it, token or not",
        file="openenv/server/app.py",
        old="route_class(None if own else Guard(settings))",
        new="route_class(None)",
        tests=(f"{ACCESS}::test_in_another_application_our_routes_are_guarded_all_the_same",),
    ),
    Mutation(
        name="a_chosen_name_opens_anothers_episode",
        why="two clients that choose the same episode_id act in turns on one environment and never know",
        file="openenv/server/http.py",
        old="if episode is not None and episode.claimed:",
        new="if False:",
        tests=(f"{HTTP}::test_clients_that_choose_the_same_episode_id_share_no_environment",),
    ),
    Mutation(
        name="agents_act_for_ever",
        why="an agent at /mcp has more turns than the environment gives a policy",
        file="openenv/hosted_session.py",
        old="        self._done = self._done or bool(self._limits_reached())\n",
        new="",
        tests=("tests/openenv/test_mcp.py::test_an_agents_calls_are_bound_by_the_environments_limits",),
    ),
    Mutation(
        name="images_of_rows_are_forgotten",
        why="after a day of play a reset fails for the rows whose images nobody looked at",
        file="openenv/hosted.py",
        old="images.STORE.pin(",
        new="set(",
        tests=(f"{HTTP}::test_what_was_shown_is_forgotten_and_what_tasks_name_is_not",),
    ),
)
