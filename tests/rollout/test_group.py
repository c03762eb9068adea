"""Siblings: one task, one seed, side by side; promises 4, 5, 6 and 10."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from tests.support.rollouts import Answer, arena, call, calls

from turnwise.errors import StoreError
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Sampling, StopReason, Trajectory

ORDER = GroupOrder(id="t/0", env="answer", task={"item": "tea"}, seed=3, size=4)


def play(policy, where=None, order=ORDER, sink=None, cancel_after=None):
    """The group (None if cancelled) and what the sink got."""
    where, seen = where or arena(Answer), []

    async def main():
        task = asyncio.ensure_future(
            play_group(
                order,
                arena=where,
                policy=policy,
                sampling=Sampling(),
                sink=sink or seen.append,
                slots=asyncio.Semaphore(8),
                version=2,
            )
        )
        try:
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                task.cancel()
            return await task
        except asyncio.CancelledError:
            return None
        finally:
            await where.aclose()

    return asyncio.run(main()), seen


def test_siblings_are_found_by_id_in_order_whoever_ends_first():
    seen = []

    async def last_first(context):
        while len(seen) < 3 - int(context.session[-1]):
            await asyncio.sleep(0.001)
        return context.session

    group, _ = play(ScriptedPolicy(last_first), sink=seen.append)
    assert [one.id for one in group.trajectories] == ["t/0/s0", "t/0/s1", "t/0/s2", "t/0/s3"]
    assert [one.id for one in seen] == ["t/0/s3", "t/0/s2", "t/0/s1", "t/0/s0"]
    assert [one.turns[0].message.text for one in group.trajectories] == [one.id for one in group.trajectories]
    assert (group.id, group.env, group.version) == ("t/0", "answer", 2)
    assert {(one.seed, one.group_id) for one in group.trajectories} == {(3, "t/0")}


def test_a_sibling_that_fails_never_touches_the_others():
    def one_fails(context):
        if context.session.endswith("s2"):
            raise RuntimeError("lost")
        return "3"

    group, _ = play(ScriptedPolicy(one_fails))
    assert [one.reward for one in group.trajectories] == [0.5, 0.5, None, 0.5]
    assert [one.id for one in group.scored] == ["t/0/s0", "t/0/s1", "t/0/s3"]


def test_siblings_start_alike():
    class Chance(Answer):
        def reset(self, task):
            super().reset(task)
            return f"seed {self.rng.random()}"

    group, _ = play(ScriptedPolicy(["3"]), arena(Chance, name="answer"))
    assert len({one.segments[0].prompt for one in group.trajectories}) == 1
    assert not any("start_differs" in one.metrics for one in group.trajectories)


def test_a_difference_in_siblings_first_observations_is_reported(caplog):
    numbers = itertools.count()

    class Unseeded(Answer):
        def reset(self, task):
            super().reset(task)
            return f"start {next(numbers)}"

    group, _ = play(ScriptedPolicy(["3"]), arena(Unseeded, name="answer"))
    assert [one.metrics.get("start_differs", 0) for one in group.trajectories] == [0, 1, 1, 1]
    assert "group t/0: siblings of one task and seed saw different first messages" in caplog.text


def test_finished_siblings_are_not_played_again_and_are_compared_with():
    first, _ = play(ScriptedPolicy(["3"]))
    on_disk = first.trajectories[1:3]
    order = GroupOrder(id="t/0", env="answer", task={"item": "tea"}, seed=3, size=4, finished=on_disk)
    group, seen = play(ScriptedPolicy(["4"]), order=order)
    assert [one.id for one in seen] == ["t/0/s0", "t/0/s3"]
    assert group.trajectories[1:3] == on_disk
    assert [one.turns[0].message.text for one in group.trajectories] == ["4", "3", "3", "4"]


def test_siblings_on_disk_are_seen_by_the_functions_and_keep_the_score_they_have():
    asked = []

    def rank(completions, **columns):
        asked.append(len(completions))
        return [float(k) for k in range(len(completions))]

    functions = [RewardFunction(function=rank, name="rank")]
    first, _ = play(ScriptedPolicy(["3"]), arena(Answer, functions=functions))
    order = GroupOrder(
        id="t/0", env="answer", task={"item": "tea"}, seed=3, size=4, finished=first.trajectories[2:]
    )

    def rank_again(trajectory):
        return 9.0

    again = [RewardFunction(function=rank_again, name="rank_again")]
    group, seen = play(ScriptedPolicy(["3"]), arena(Answer, functions=again), order=order)
    assert asked == [4] and [one.id for one in seen] == ["t/0/s0", "t/0/s1"]
    assert group.trajectories[2:] == first.trajectories[2:]
    assert [one.rewards["rank_again"].value for one in group.trajectories[:2]] == [9.0, 9.0]


async def half_stuck(context):
    if context.turn == 0:
        return calls(call("look"))
    if context.session[-1] in "01":
        return "3"
    await asyncio.sleep(30)
    return "never"


def test_cancelled_siblings_reach_the_sink_once_each_as_data():
    group, seen = play(ScriptedPolicy(half_stuck), cancel_after=1.0)
    assert group is None
    reasons = {one.id[-1]: one.stop_reason for one in seen}
    assert len(seen) == 4 and reasons == {
        "0": StopReason.ANSWERED, "1": StopReason.ANSWERED,
        "2": StopReason.CANCELLED, "3": StopReason.CANCELLED,
    }  # fmt: skip
    assert all(one.turns[0].tool_results[0].content == "3" for one in seen)


def test_what_had_ended_but_was_never_scored_counts_as_cancelled():
    functions = [RewardFunction(function=lambda trajectory: 1.0, name="f")]
    group, seen = play(ScriptedPolicy(half_stuck), arena(Answer, functions=functions), cancel_after=1.0)
    assert group is None and len(seen) == 4
    assert {one.stop_reason for one in seen} == {StopReason.CANCELLED}
    assert sum(len(one.turns) for one in seen) == 6, "what was played is kept"


def test_a_cancelled_sibling_on_disk_is_played_again():
    _, seen = play(ScriptedPolicy(half_stuck), cancel_after=1.0)
    order = GroupOrder(id="t/0", env="answer", task={"item": "tea"}, seed=3, size=4, finished=tuple(seen))
    group, again = play(ScriptedPolicy(["3"]), order=order)
    assert sorted(one.id for one in again) == ["t/0/s2", "t/0/s3"]
    assert all(one.reward == 0.5 for one in group.trajectories)


def test_a_full_disk_stops_the_group_and_says_so():
    written: list[Trajectory] = []

    def disk(trajectory: Trajectory) -> None:
        if len(written) == 1:
            raise StoreError("no space left on device")
        written.append(trajectory)

    with pytest.raises(StoreError, match="no space left"):
        play(ScriptedPolicy(["3"]), sink=disk)
    assert len(written) == 1, "what was finished before is intact"
