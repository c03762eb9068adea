"""Of what agents reach over MCP, and of classes written for OpenEnv."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

TYPED, MCP = "tests/openenv/test_typed.py::", "tests/openenv/test_mcp.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="production_socket_controls_episodes",
        why="in production an agent resets its episode over /ws until it likes it",
        file="openenv/server/socket.py",
        old='if self._agents_only and kind not in ("mcp", "close"):',
        new='if self._agents_only and kind not in ("mcp", "close", "reset", "step", "state", "turnwise"):',
        tests=(TYPED + "test_in_production_mode_nobody_controls_an_episode",),
    ),
    Mutation(
        name="mcp_reaches_every_session",
        why="an agent that learns the id of a trainer's session plays in it",
        file="openenv/server/mcp.py",
        old="live = self.own.get(name) if isinstance(name, str) else None",
        new="live = self.sessions.live.get(name) if isinstance(name, str) else None",
        tests=(MCP + "test_agents_never_reach_an_episodes_controls",),
    ),
    Mutation(
        name="reserved_tools_called",
        why="a tool that is called state hands agents what the verifier keeps",
        file="openenv/server/mcp.py",
        old="    if name in RESERVED_TOOL_NAMES:\n        raise RpcError",
        new="    if not name:\n        raise RpcError",
        tests=(
            MCP + "test_no_tool_has_a_reserved_name",
            MCP + "test_agents_never_reach_an_episodes_controls",
        ),
    ),
    Mutation(
        name="calls_of_a_session_overlap",
        why="two calls of one agent run in one environment at once",
        file="openenv/server/sessions.py",
        old="async with live.lock:",
        new="async with asyncio.Lock():",
        tests=(MCP + "test_others_sessions_play_on_while_a_tool_is_slow",),
    ),
    Mutation(
        name="typed_reset_drops_silently",
        why="a seed that an environment does not take looks taken: siblings start apart",
        file="openenv/typed_session.py",
        old="        if len(taken) == len(data):\n",
        new="        if taken is not None:\n",
        tests=(TYPED + "test_what_reset_takes_no_parameter_for_is_named",),
    ),
    Mutation(
        name="typed_call_by_another_thread",
        why="a browser or a GL context is used from a thread that did not make it",
        file="openenv/typed_session.py",
        old="return await self._thread.run(partial(contain.call, function), seconds)",
        new="return await asyncio.to_thread(function)",
        tests=(TYPED + "test_an_environment_has_one_thread_for_life_and_one_for_all_where_it_asks",),
    ),
    Mutation(
        name="typed_state_stripped",
        why="fields of a State subclass never reach whoever verifies by them",
        file="openenv/typed_session.py",
        old='return {"episode_id": None, "step_count": 0, **plain(state)}',
        new='return {"episode_id": state.episode_id, "step_count": state.step_count}',
        tests=(TYPED + "test_a_subclass_of_their_client_plays_a_whole_episode",),
    ),
    Mutation(
        name="typed_reward_of_nothing",
        why="a step that pays nothing counts as one that pays zero",
        file="openenv/typed_session.py",
        old="isinstance(reward, bool | int):\n            return reward",
        new="isinstance(reward, bool | int):\n            return float(reward or 0.0)",
        tests=(TYPED + "test_a_subclass_of_their_client_plays_a_whole_episode",),
    ),
    Mutation(
        name="typed_result_unpaid",
        why="what an environment pays in a StepResult of its own is lost",
        file="openenv/typed_session.py",
        old="reward=answer.reward if result.reward is None else self._paid(what, result.reward),",
        new="reward=answer.reward,",
        tests=(TYPED + "test_a_result_as_clients_have_it_is_unwrapped",),
    ),
)
