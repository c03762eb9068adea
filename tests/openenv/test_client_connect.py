"""`turnwise.connect`, as it is used in a script and in a notebook; URLs where TRL takes a class."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest
from tests.compat.playing import arena_of, play
from tests.openenv import foreign
from tests.openenv.containers import until
from tests.openenv.serving import Serving, as_app, running
from tests.support.rollouts import call, calls

import turnwise
from turnwise.compat.environments import PLACEHOLDER, environments, need_a_reward
from turnwise.errors import ActionError, EnvLostError, EnvSpecError
from turnwise.openenv import GenericEnvClient
from turnwise.openenv.client import background, balance
from turnwise.openenv.server.settings import Settings
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.types import Step, StopReason


def hint() -> str:
    """Say something helpful."""
    return "4 is a good start"


@pytest.fixture(scope="module")
def guess() -> Iterator[Serving]:
    with running(foreign.guess_app()) as server:
        yield server


def test_by_hand(guess: Serving) -> None:
    with turnwise.connect(guess.url, reset={"low": 2}).sync() as env:
        assert [tool.name for tool in env.tools] == ["guess"]
        assert "tools: ['guess']" in repr(env)
        assert env.reset(seed=3) == Step("Guess a number from 2 to 9.")
        assert env.call_tool("guess", number=1) == Step("higher", reward=0.0)
        assert env.call_tool("guess", number=9, mood="bold").info == {"error": "raised"}
        assert env.step({"number": 5}) == Step("right", reward=1.0, terminated=True)
        assert env.state() == {"episode_id": "e", "step_count": 3}
        with pytest.raises(ActionError, match="the episode is over, or not begun: reset first"):
            env.call_tool("guess", number=5)
        env.reset(seed=1)
        with pytest.raises(ActionError, match=r"There is no tool 'gess'. Available: guess."):
            env.call_tool("gess")
        with pytest.raises(ActionError, match="number is missing"):
            env.call_tool("guess")
        with pytest.raises(ActionError, match="this environment takes no text; call a tool: guess"):
            env.step("5")
    with pytest.raises(EnvLostError, match="is not connected: reset first"):
        env.call_tool("guess", number=5)
    assert env.reset(seed=0, low=5).observation == "Guess a number from 5 to 9."
    env.close()


def test_with_await_where_a_loop_runs(guess: Serving) -> None:
    """Both faces: a notebook's cells run in a loop."""

    async def main() -> None:
        async with turnwise.connect([guess.url]) as env:
            await env.reset(seed=3)
            assert (await env.call_tool("guess", number=3)).terminated
        sync = turnwise.connect(guess.url).sync()
        assert sync.reset(seed=3).observation == "Guess a number from 0 to 9."
        sync.close()

    asyncio.run(main())


def test_a_turnwise_server_by_hand() -> None:
    with running(as_app("catch", args={"rows": 3})) as server, turnwise.connect(server.url).sync() as env:
        task = env.tasks("test")[1]
        assert env.reset(task, seed=1) == Step("ball 1 paddle 2 rows 2")
        assert not env.call_tool("move", direction="left").terminated
        assert env.call_tool("move", direction="stay") == Step("caught", reward=1.0, terminated=True)
        assert env.rewards() == {}


def test_two_first_calls_at_once_share_a_session(guess: Serving) -> None:
    async def main() -> None:
        env = turnwise.connect(guess.url)
        await env.open()
        await env.close()
        made = len(foreign.Guess.made)
        first, state = await asyncio.gather(env.reset(seed=3), env.state())
        assert first.observation == "Guess a number from 0 to 9." and state["episode_id"] == "e"
        assert len(foreign.Guess.made) == made + 1
        await env.close()

    asyncio.run(main())


def test_a_connection_belongs_to_one_loop(guess: Serving) -> None:
    env = turnwise.connect(guess.url)
    env.sync().reset(seed=3)

    async def main() -> None:
        for use in (env.reset(), env.call_tool("guess", number=3), env.close()):
            with pytest.raises(EnvSpecError, match="is another event loop's; use it there"):
                await use

    asyncio.run(main())
    assert env.sync().call_tool("guess", number=3).terminated
    env.sync().close()


def test_waiting_for_its_own_loop_is_an_error() -> None:
    async def inner() -> int:
        return 1

    async def outer() -> int:
        return background.run(inner())

    with pytest.raises(RuntimeError, match="await the async form here"):
        background.run(outer())


def test_an_unreachable_server() -> None:
    with pytest.raises(EnvSpecError, match=r"no server answers at http://127.0.0.1:9 "):
        turnwise.connect("http://127.0.0.1:9", patience=0.1).sync().open()


# -- where TRL takes a class ----------------------------------------------------------------------------


def test_environment_factory(guess: Serving) -> None:
    """The row's prompt stands before what the server says; its other columns go to the server's reset."""
    arena = arena_of(guess.url)
    row = {"prompt": [{"role": "user", "content": "Play well. "}], "low": 4, "answer": "unused"}
    policy = ScriptedPolicy([calls(call("guess", number=4)), calls(call("guess", number=6))])
    [group] = play(arena, policy, [row])
    for one in group.trajectories:
        assert one.segments[0].prompt[0].text == "Play well. Guess a number from 4 to 9."
        assert [turn.reward for turn in one.turns] in ([1.0], [0.0, 0.0])
    need_a_reward({"guess": arena.spec}, ())


def test_several_by_name_and_with_arguments(guess: Serving) -> None:
    specs = environments(
        {"one": guess.url, "two": [guess.url], "three": turnwise.connect(guess.url, reset={"low": 9})}
    )
    assert list(specs) == ["one", "two", "three"] == [spec.name for spec in specs.values()]
    policy = ScriptedPolicy([calls(call("guess", number=9))])
    [group] = play(
        arena_of({"three": turnwise.connect(guess.url, reset={"low": 9})}, name="three"),
        policy,
        [PLACEHOLDER],
    )
    assert {one.stop_reason for one in group.trajectories} == {StopReason.TERMINATED}
    with pytest.raises(EnvSpecError, match="has its tools there: leave out tools="):
        environments(guess.url, [hint])


@pytest.mark.parametrize("kind", ["connect", "generic", "rested"])
def test_a_forgotten_connection_gives_its_place_back(kind: str) -> None:
    """A notebook's cell that is run again: what it had made before is held by nobody."""
    settings = Settings(max_sessions=2, queue=0)
    with running(as_app("catch", settings, args={"rows": 3})) as server:
        for seed in range(5):
            with pytest.warns(ResourceWarning, match=f"unclosed connection to {server.url}"):
                if kind == "generic":
                    client = GenericEnvClient(server.url).sync()
                    client.reset(seed=seed)
                    del client
                else:
                    env = turnwise.connect(server.url).sync()
                    env.reset(seed=seed)
                    if (
                        kind == "rested"
                    ):  # Between two episodes, when others of this process may take it over.
                        env.call_tool("move", direction="stay")
                        assert env.call_tool("move", direction="stay").terminated
                        env.rewards()
                    del env
                gc.collect()
            until(lambda: not server.sessions.live)
        until(lambda: not any(one.busy.get(server.url) for one in balance._shared.values()))


def test_a_connection_that_was_closed_is_not_told_of(
    guess: Serving, recwarn: pytest.WarningsRecorder
) -> None:
    with turnwise.connect(guess.url).sync() as env:
        env.reset(seed=1)
    with GenericEnvClient(guess.url).sync() as client:
        client.reset(seed=1)
    del env, client
    gc.collect()
    # Another test's leavings may be collected here too.
    assert not [one for one in recwarn if f"unclosed connection to {guess.url}" in str(one.message)]
