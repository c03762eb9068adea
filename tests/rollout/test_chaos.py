"""Promises 4 and 5 under randomised faults: 500 episodes that raise, hang, get lost, pay nonsense.

What should become of each episode is worked out from its plan alone, and compared with what did. Siblings
have plans of their own, so a fault that touched a sibling would show as a difference.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from tests.support.rollouts import arena, call, calls

from turnwise.envs.base import Env, tool
from turnwise.errors import EngineError, EnvLostError
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scheduler import Scheduler
from turnwise.types import Sampling, Step, StopReason, ToolCall, Trajectory

MAX_TURNS, GROUPS, SIZE = 6, 125, 4
ACTIONS = {
    "fine": 40, "bad": 10, "unknown": 5, "malformed": 5, "pay": 10, "win": 8, "fuel": 3, "lose": 3,
    "hang": 2, "nan": 2, "policy_fails": 3, "answer": 8,
}  # fmt: skip
ENDS = {
    "win": StopReason.TERMINATED,
    "fuel": StopReason.ENV_TRUNCATED,
    "lose": StopReason.ENV_FAILED,
    "hang": StopReason.TIME_LIMIT,
    "nan": StopReason.SCORING_FAILED,
    "policy_fails": StopReason.POLICY_FAILED,
    "answer": StopReason.ANSWERED,
}
PAYS = {"pay": 0.25, "win": 1.0, "nan": float("nan")}


def plan(episode: str) -> list[str]:
    """What an episode's policy does at each turn."""
    return random.Random(episode).choices(list(ACTIONS), list(ACTIONS.values()), k=MAX_TURNS)


def reset_fails(group: str) -> bool:
    return random.Random(group).random() < 0.04


def expected(one: Trajectory) -> tuple[StopReason, float | None, int]:
    """Stop reason, reward and number of turns of an episode."""
    if reset_fails(one.group_id):
        return StopReason.ENV_FAILED, None, 0
    paid = 0.0
    for turn, action in enumerate(plan(one.id)):
        end = ENDS.get(action)
        if end is not None and end.failed:
            return end, None, turn + (end is not StopReason.POLICY_FAILED)
        paid += PAYS.get(action, 0.0)
        if end is StopReason.TIME_LIMIT:
            return end, paid, turn + 1  # The environment hangs and cannot be asked for its own 2.
        if end is not None:
            return end, paid + 2.0, turn + 1
    return StopReason.MAX_TURNS, paid + 2.0, MAX_TURNS


class Chaos(Env):
    """On a thread of its own, so that a hang is one that cannot be stopped."""

    max_turns = MAX_TURNS

    def reset(self, task):
        if reset_fails(task["group"]):
            raise RuntimeError("the world is not ready")
        return "Go."

    @tool
    def act(self, what: str) -> Step:
        """Do something."""
        if what == "bad":
            raise ValueError("not like this")
        if what == "lose":
            raise EnvLostError("the server is gone")
        if what == "hang":
            time.sleep(2.5)
        return Step(what, reward=PAYS.get(what), terminated=what == "win", truncated=what == "fuel")

    def reward(self):
        return 2.0


def say(context):
    action = plan(context.session)[context.turn]
    if action == "policy_fails":
        raise EngineError("worker died")
    if action == "malformed":
        return calls(ToolCall(name="act", arguments={}, error="not JSON", raw="{"))
    if action == "answer":
        return "done"
    return calls(call("fly") if action == "unknown" else call("act", what=action))


def order(env: str, index: int) -> GroupOrder:
    name = f"chaos/{index}"
    return GroupOrder(id=name, env=env, task={"group": name}, seed=index, size=SIZE)


def test_500_episodes_of_chaos_reach_the_sink_once_each_and_end_as_their_plans_say():
    seen: list[Trajectory] = []
    where = arena(Chaos, limits={"call_seconds": 1.0}, max_excluded=1.0)

    async def main():
        async with asyncio.timeout(60):
            async with Scheduler(
                arenas={"chaos": where},
                policy=ScriptedPolicy(say),
                sampling=Sampling(),
                source=order,
                groups_per_step={"chaos": GROUPS},
                sink=seen.append,
                concurrency=64,
                retries=0,
                max_failures=1000,
            ) as scheduler:
                groups = await scheduler.next_step()
                return groups, scheduler.counts["replaced_groups"], scheduler.budget.exclusion_rates

    groups, replaced, rates = asyncio.run(main())
    assert len(groups) == GROUPS
    assert replaced > 0, "chaos should have made whole groups fail"
    ids = Counter(one.id for one in seen)
    assert set(ids) == {f"chaos/{n}/s{k}" for n in range(GROUPS + replaced) for k in range(SIZE)}
    assert set(ids.values()) == {1}, "exactly once"

    wrong = [
        (one.id, found, expected(one), one.error)
        for one in seen
        if (found := (one.stop_reason, one.reward, len(one.turns))) != expected(one)
    ]
    assert wrong == []

    by_id = {one.id: one for one in seen}
    assert all(by_id[one.id] is one for group in groups for one in group.trajectories)
    assert all(group.scored for group in groups)
    # Excluded and truncated are counted apart, and the latter are no failures.
    excluded = [one for one in seen if one.stop_reason.failed]
    truncated = [one for one in seen if one.stop_reason.truncated]
    assert {one.stop_reason for one in excluded} == {
        StopReason.ENV_FAILED, StopReason.POLICY_FAILED, StopReason.SCORING_FAILED,
    }  # fmt: skip
    assert {one.stop_reason for one in truncated} == {
        StopReason.MAX_TURNS, StopReason.ENV_TRUNCATED, StopReason.TIME_LIMIT,
    }  # fmt: skip
    assert all(one.reward is not None for one in truncated)
    assert 0.05 < rates["chaos"] < 0.6
    assert all(one.error is not None and one.error.where for one in excluded)
