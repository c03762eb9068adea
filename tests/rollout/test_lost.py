"""A sibling whose environment was lost is played again, so that an outage that passes leaves groups whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

import pytest
from tests.support.rollouts import Answer, arena, call, calls

from turnwise.envs.base import tool
from turnwise.errors import EngineError, EnvLostError
from turnwise.rollout import group as group_room
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.policy import Context
from turnwise.rollout.scheduler import Scheduler
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Message, Sampling, StopReason, Trajectory, TrajectoryGroup

PAUSE = 0.04


class Leaky(Answer):
    """Its server is gone at so many of the first looks."""

    outage: ClassVar[int] = 0

    @tool
    def look(self) -> str:
        """Look it up."""
        Leaky.outage -= 1
        if Leaky.outage >= 0:
            raise EnvLostError("the server is gone")
        return "3"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_room, "PAUSE_SECONDS", PAUSE)


def act(context: Context) -> Message | str:
    """The second sibling looks first, and so is the one that can be lost."""
    second = context.session.split("/s")[1].startswith("1")
    return calls(call("look")) if second and context.turn == 0 else "3"


def source(env: str, index: int) -> GroupOrder:
    return GroupOrder(id=f"rl/{env}/{index}", env=env, task={}, seed=index, size=3)


def play(
    outage: int, *, policy: Any = act, functions: Any = (), **options: Any
) -> tuple[TrajectoryGroup, dict[str, float], list[Trajectory]]:
    """One step of one group of three, the scheduler's metrics, and what its sink got."""
    Leaky.outage = outage
    seen: list[Trajectory] = []

    async def main() -> tuple[TrajectoryGroup, dict[str, float]]:
        scheduler = Scheduler(
            arenas={"answer": arena(Leaky, name="answer", functions=functions)},
            policy=ScriptedPolicy(policy),
            sampling=Sampling(),
            source=source,
            groups_per_step={"answer": 1},
            sink=seen.append,
            **options,
        )
        async with asyncio.timeout(120), scheduler:
            [group] = await scheduler.next_step()
            return group, scheduler.metrics

    group, metrics = asyncio.run(main())
    assert set(Counter(one.id for one in seen).values()) == {1}, "each episode reaches the sink once"
    return group, metrics, seen


def names(group: TrajectoryGroup) -> list[str]:
    return [one.id.removeprefix("rl/answer/") for one in group.trajectories]


def test_a_lost_sibling_is_played_again_and_the_group_is_whole():
    group, metrics, seen = play(outage=2)
    assert names(group) == ["0/s0", "0/s1", "0/s1~1", "0/s1~2", "0/s2"] and len(seen) == 5
    assert [one.id.removeprefix("rl/answer/") for one in group.scored] == ["0/s0", "0/s1~2", "0/s2"]
    assert {one.group_id for one in group.trajectories} == {"rl/answer/0"}
    assert (metrics["scheduler/replayed_siblings"], metrics["scheduler/short_groups"]) == (2, 0)
    assert metrics["scheduler/retried_groups"] == 0


def test_each_time_it_is_waited_longer():
    _, first, second, third, _ = play(outage=2)[0].trajectories
    pauses = [
        after.started - (one.started + one.seconds) for one, after in ((first, second), (second, third))
    ]
    assert pauses[0] >= PAUSE / 2 * 0.9 and pauses[1] >= PAUSE * 0.9


def test_one_that_stays_lost_is_given_up_and_the_short_group_counted():
    group, metrics, _ = play(outage=99)
    assert names(group) == ["0/s0", "0/s1", "0/s1~1", "0/s1~2", "0/s2"] and len(group.scored) == 2
    assert (metrics["scheduler/replayed_siblings"], metrics["scheduler/short_groups"]) == (2, 1)
    assert {one.stop_reason for one in group.trajectories[1:4]} == {StopReason.ENV_FAILED}


def test_what_is_no_loss_is_not_played_again():
    def broken(context: Context) -> str:
        if context.session.endswith("s1"):
            raise EngineError("worker died")
        return "3"

    group, metrics, _ = play(outage=0, policy=broken)
    assert names(group) == ["0/s0", "0/s1", "0/s2"]
    assert (metrics["scheduler/replayed_siblings"], metrics["scheduler/short_groups"]) == (0, 1)


def test_a_resumed_run_goes_on_with_the_next_attempt():
    whole, _, _ = play(outage=2)
    on_disk = whole.trajectories[:3]  # s0, and two attempts at s1
    finished = {"rl/answer/0": on_disk}
    group, _, seen = play(outage=0, finished=lambda id: finished.pop(id, ()))
    assert names(group) == names(whole) and len(group.scored) == 3
    assert sorted(one.id for one in seen) == ["rl/answer/0/s1~2", "rl/answer/0/s2"]


def test_it_is_scored_with_its_siblings():
    scored: list[int] = []

    def score(completions: Any) -> list[float]:
        scored.append(len(completions))
        return [1.0] * len(completions)

    function = RewardFunction(function=score, name="score", seconds=10.0)
    group, _, seen = play(outage=1, functions=[function])
    assert scored == [3] and len(group.scored) == 3 and len(seen) == 4
