"""Environments that stay as they are until their group is scored: none is lost, whatever comes between."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.support.rollouts import Shop, arena, call, calls

from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Sampling, StopReason


class Stage(Shop):
    """Counts who lives."""

    live = 0
    most = 0

    def __init__(self) -> None:
        super().__init__()
        self.marked = False
        Stage.live += 1
        Stage.most = max(Stage.most, Stage.live)

    def close(self) -> None:
        super().close()
        Stage.live -= 1


@pytest.fixture(autouse=True)
def _empty():
    Stage.live = Stage.most = 0


def function(score, *, seconds: float = 60.0) -> RewardFunction:
    return RewardFunction(function=score, name="score", seconds=seconds)


def order(number: int = 0, size: int = 3) -> GroupOrder:
    return GroupOrder(id=f"t/{number}", env="stage", task={"item": "tea"}, seed=1, size=size)


async def group(where, policy, sink, number: int = 0, **options):
    return await play_group(
        order(number), arena=where, policy=policy, sampling=Sampling(), sink=sink, **options
    )


def test_a_sibling_that_ended_early_is_not_reset_before_its_group_is_scored():
    def score(environments, completions, **_):
        return [float(len(one.log)) for one in environments]

    async def script(context):
        fast = context.session.endswith("s0")
        if context.turn < (1 if fast else 3):
            await asyncio.sleep(0 if fast else 0.02)
            return calls(call("price", item="tea"))
        return "3"

    async def main():
        where, sunk = arena(Stage, functions=[function(score)]), []
        policy = ScriptedPolicy(script)
        # Sessions are used again: the second round must not find the first one's.
        for number in range(2):
            played = await group(where, policy, sunk.append, number)
            assert [one.rewards["score"].value for one in played.trajectories] == [1.0, 3.0, 3.0]
        most = Stage.most
        await where.aclose()
        return most, len(sunk)

    assert asyncio.run(main()) == (3, 6)
    assert Stage.live == 0


def test_siblings_that_play_one_after_another_do_not_share_an_environment():
    seen = []

    def score(environments, completions):
        seen.append([(id(one), len(one.log)) for one in environments])
        return [0.0] * len(completions)

    def script(context):
        mine = int(context.session[-1])
        return calls(call("price", item="tea")) if context.turn <= mine else "3"

    async def main():
        where = arena(Stage, functions=[function(score)])
        for number in range(2):
            slots = asyncio.Semaphore(1)
            await group(where, ScriptedPolicy(script), lambda _: None, number, slots=slots)
        await where.aclose()

    asyncio.run(main())
    assert [[length for _, length in made] for made in seen] == [[1, 2, 3]] * 2
    assert all(len(dict(made)) == 3 for made in seen)
    assert Stage.most == 3 and Stage.live == 0, "used again once they were scored"


def test_nothing_is_held_where_no_function_looks():
    assert not arena(Stage).holds
    assert not arena(Stage, functions=[function(lambda completions, **_: [0.0])]).holds
    assert arena(Stage, functions=[function(lambda environments, completions: [0.0])]).holds


def test_cancelling_while_playing_or_scoring_gives_every_environment_back():
    scoring = asyncio.Event()

    async def score(environments, completions):
        scoring.set()
        await asyncio.sleep(60)

    async def script(context):
        if context.session.endswith("s2"):
            await asyncio.sleep(60)
        return "3"

    async def main(policy, until):
        where, sunk = arena(Stage, functions=[function(score)]), []
        task = asyncio.ensure_future(group(where, policy, sunk.append))
        await until()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await where.aclose()
        assert {one.stop_reason for one in sunk} == {StopReason.CANCELLED} and len(sunk) == 3
        assert Stage.live == 0 and Stage.most == 3

    async def soon():
        while Stage.most < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.01)

    asyncio.run(main(ScriptedPolicy(script), soon))
    Stage.most = 0
    asyncio.run(main(ScriptedPolicy(["3"]), scoring.wait))


@pytest.mark.parametrize("where_it_fails", ["function", "sink", "episode", "hang"])
def test_failures_give_every_environment_back(where_it_fails):
    released = threading.Event()

    def score(environments, completions):
        if where_it_fails == "function":
            raise ValueError("broken")
        if where_it_fails == "hang":
            released.wait(30)
        return [0.0] * len(completions)

    def sink(trajectory):
        if where_it_fails == "sink":
            raise OSError("disk full")

    def script(context):
        return calls(call("lose")) if where_it_fails == "episode" else "3"

    async def main():
        where = arena(Stage, functions=[function(score, seconds=0.5)])
        playing = group(where, ScriptedPolicy(script), sink)
        if where_it_fails == "sink":
            with pytest.raises(OSError, match="disk full"):
                await playing
        else:
            played = await playing
            reasons = {one.stop_reason for one in played.trajectories}
            lost = where_it_fails == "episode"
            assert reasons == {StopReason.ENV_FAILED if lost else StopReason.FORFEITED}
        await where.aclose()

    asyncio.run(main())
    released.set()
    assert Stage.live == 0 and Stage.most == 3


def test_more_groups_than_slots_do_not_wait_for_each_others_environments():
    def score(environments, completions):
        return [1.0] * len(completions)

    async def main():
        where, sunk = arena(Stage, functions=[function(score)]), []
        slots = asyncio.Semaphore(2)
        async with asyncio.timeout(120):
            await asyncio.gather(
                *(group(where, ScriptedPolicy(["3"]), sunk.append, n, slots=slots) for n in range(8))
            )
        await where.aclose()
        return len(sunk)

    assert asyncio.run(main()) == 24 and Stage.live == 0
