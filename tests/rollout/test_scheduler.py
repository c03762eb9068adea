"""The scheduler: promises 5 (each episode reaches the sink once) and 9 (staleness 0 is the same code),
quotas, the error budget, and that nothing hangs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from tests.support.rollouts import Answer, arena, call, calls, model
from tests.support.trajectories import trajectory

from turnwise.errors import EngineError, StoreError, TaskError, TooManyFailuresError
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.policies import ModelPolicy, ScriptedPolicy
from turnwise.rollout.scheduler import Scheduler, oldest_version
from turnwise.types import Sampling, StopReason, Trajectory, TrajectoryGroup


class Other(Answer):
    pass


def source(env: str, index: int) -> GroupOrder:
    return GroupOrder(id=f"rl/{env}/{index}", env=env, task={"n": index}, seed=index, size=2)


class Rig:
    """A scheduler over ``answer`` (and ``other``), and all that its sink got."""

    def __init__(self, policy, groups=None, *, arenas=None, **options):
        self.seen: list[Trajectory] = []
        arenas = arenas or {"answer": arena(Answer), "other": arena(Other)}
        self.scheduler = Scheduler(
            **{
                "arenas": arenas,
                "policy": policy,
                "sampling": Sampling(),
                "source": source,
                "groups_per_step": groups or {"answer": 2},
                "sink": self.seen.append,
                **options,
            }
        )

    def run(self, body):
        """``body(scheduler)`` within bounds: a hang fails."""

        async def main():
            async with asyncio.timeout(120), self.scheduler:
                return await body(self.scheduler)

        out = asyncio.run(main())
        counts = Counter(one.id for one in self.seen)
        assert set(counts.values()) <= {1}, "each episode reaches the sink exactly once"
        return out


def ids(groups: list[TrajectoryGroup]) -> list[str]:
    return [group.id for group in groups]


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(200):
        await asyncio.sleep(0)


# ---------------------------------------------------------------------------------------------------
# Staleness


def test_staleness_0_plays_a_step_only_when_the_last_is_learned():
    policy = model("3")
    rig = Rig(policy, staleness=0)

    async def body(scheduler):
        steps = []
        for version in (1, 2, 3):
            groups = await scheduler.next_step()
            await settle()
            played = len(rig.seen)
            steps.append((ids(groups), played, {group.version for group in groups}))
            policy.engine.version = version
            scheduler.advance(version)
        return steps

    assert rig.run(body) == [
        (["rl/answer/0", "rl/answer/1"], 4, {0}),
        (["rl/answer/2", "rl/answer/3"], 8, {1}),
        (["rl/answer/4", "rl/answer/5"], 12, {2}),
    ]
    assert all(turn.versions[0] == one.task["n"] // 2 for one in rig.seen for turn in one.turns)


def test_staleness_1_plays_one_step_ahead_and_no_further():
    policy = model("3")
    rig = Rig(policy, staleness=1)

    async def body(scheduler):
        first = await scheduler.next_step()
        await settle()
        ahead = len(rig.seen)
        policy.engine.version = 1
        scheduler.advance(1)
        await settle()
        second = await scheduler.next_step()
        return ids(first), ahead, ids(second), {g.version for g in second}, len(rig.seen)

    first, ahead, second, versions, played = rig.run(body)
    assert (first, ahead) == (["rl/answer/0", "rl/answer/1"], 8)
    assert (second, versions, played) == (["rl/answer/2", "rl/answer/3"], {0}, 12)
    assert rig.scheduler.counts["stale_groups"] == 0


class Late(ModelPolicy):
    """Some groups take until so many versions after their tokens were drawn, as behind a slow tool."""

    def __init__(self, late: dict[str, int]) -> None:
        inner = model("3")
        super().__init__(inner.engine, inner.renderer)
        self.late = late

    async def act(self, context):
        reply = await super().act(context)
        while self.engine.version < reply.versions[0] + self.late.get(context.session.rpartition("/")[0], 0):
            await asyncio.sleep(0.001)
        return reply


@pytest.mark.parametrize("staleness", [1, 2])
def test_no_consumed_token_is_older_than_staleness_allows_and_dropped_groups_return_their_quota(staleness):
    """Stragglers come too late and are dropped; all steps are full, so each one's quota came back."""
    late = {f"rl/answer/{index}": staleness + 1 for index in range(1, 97, 16)}
    policy = Late(late)
    rig = Rig(policy, {"answer": 2, "other": 1}, staleness=staleness)

    async def body(scheduler):
        used = []
        for version in range(1, 61):
            groups = await scheduler.next_step()
            assert [group.env for group in groups] == ["answer", "answer", "other"]
            drawn = [v for g in groups for t in g.trajectories for turn in t.turns for v in turn.versions]
            assert min(drawn) >= scheduler.version - staleness
            used += ids(groups)
            policy.engine.version = version
            scheduler.advance(version)
            await asyncio.sleep(0.003)
        return used

    used = rig.run(body)
    # On a busy machine some other group may come too late as well.
    assert rig.scheduler.counts["stale_groups"] >= len(late) == 6
    assert len(set(used)) == len(used) == 180 and not set(used) & set(late)


def test_a_group_is_as_old_as_its_oldest_token():
    def drawn(*versions: list[int], failed: bool = False) -> TrajectoryGroup:
        one = trajectory(stop_reason=StopReason.POLICY_FAILED if failed else StopReason.TERMINATED)
        turns = [replace(one.turns[0], versions=own) for own in versions]
        segment = replace(one.segments[0], turns=tuple(turns))
        siblings = (trajectory(), replace(one, segments=(segment,)))
        return TrajectoryGroup(id="g", env="catch", task={}, trajectories=siblings, version=2)

    assert oldest_version(drawn([4, 5], [5, 5])) == 4
    assert oldest_version(drawn([5, 5], [3, 6])) == 3, "the weights changed within a reply"
    assert oldest_version(drawn([1, 1], failed=True)) == 4, "nothing is learned from what failed"
    silent = replace(trajectory(policy="teacher"), id="rl/0/catch/0/s1")
    assert oldest_version(replace(drawn([4]), trajectories=(silent,))) == 2


def test_a_group_that_comes_too_late_is_dropped_and_replaced():
    policy = Late({"rl/answer/0": 2})
    rig = Rig(policy, {"answer": 1}, staleness=1)

    async def body(scheduler):
        used, given_up = [], []
        for version in (1, 2, 3):
            used += ids(await scheduler.next_step())
            given_up += scheduler.given_up
            policy.engine.version = version
            scheduler.advance(version)
            while version == 2 and not any(one.index == 0 for one in scheduler._ready["answer"]):
                await asyncio.sleep(0.001)
        return used, given_up

    assert rig.run(body) == (["rl/answer/1", "rl/answer/2", "rl/answer/3"], ["rl/answer/0"])
    assert rig.scheduler.counts["stale_groups"] == 1
    assert {one.id for one in rig.seen} >= {"rl/answer/0/s0", "rl/answer/0/s1"}, "dropped groups are on disk"


def test_a_step_without_anything_to_learn_keeps_its_version_and_opens_the_next():
    async def body(scheduler):
        first = await scheduler.next_step()
        scheduler.advance(0)
        return ids(first) + ids(await scheduler.next_step())

    assert Rig(model("3"), {"answer": 1}).run(body) == ["rl/answer/0", "rl/answer/1"]


def test_next_step_without_an_update_is_a_mistake_and_no_hang():
    async def body(scheduler):
        await scheduler.next_step()
        with pytest.raises(AssertionError, match="advance"):
            await scheduler.next_step()

    Rig(ScriptedPolicy(["3"])).run(body)


# ---------------------------------------------------------------------------------------------------
# What is in flight


def test_episodes_in_flight_are_bounded():
    policy = model("3", delay=0.002)
    rig = Rig(policy, {"answer": 6, "other": 6}, concurrency=5)

    async def body(scheduler):
        return await scheduler.next_step()

    assert len(rig.run(body)) == 12
    assert policy.engine.most_running == 5


def test_leaving_early_cancels_what_is_in_flight_and_each_reaches_the_sink():
    waiting = []

    async def stuck(context):
        if context.turn:
            waiting.append(context.session)
            await asyncio.sleep(60)
        return calls(call("look"))

    rig = Rig(ScriptedPolicy(stuck), {"answer": 3}, concurrency=5)

    async def body(scheduler):
        step = asyncio.ensure_future(scheduler.next_step())
        while len(waiting) < 5:
            await asyncio.sleep(0.001)
        step.cancel()
        await asyncio.wait((step,))
        assert step.cancelled()

    rig.run(body)
    assert len(rig.seen) == 5, "the sixth had not begun"
    assert {one.stop_reason for one in rig.seen} == {StopReason.CANCELLED}
    assert all(len(one.turns) == 1 for one in rig.seen)


def test_unknown_environments_are_refused_before_anything_is_played():
    with pytest.raises(TaskError, match=r"unknown environments \['chess'\]; known: \['answer', 'other'\]"):
        Rig(ScriptedPolicy(["3"]), {"chess": 1})


# ---------------------------------------------------------------------------------------------------
# Failures


def failing(first: int) -> ScriptedPolicy:
    """Fails the first so many replies."""
    left = [first]

    def act(context):
        left[0] -= 1
        if left[0] >= 0:
            raise EngineError("worker died")
        return "3"

    return ScriptedPolicy(act)


def test_a_group_that_failed_as_a_whole_is_played_again_under_ids_of_its_own():
    rig = Rig(failing(4), {"answer": 1}, retries=2)

    async def body(scheduler):
        return ids(await scheduler.next_step())

    assert rig.run(body) == ["rl/answer/0~2"]
    assert [one.id for one in rig.seen] == [
        "rl/answer/0/s0", "rl/answer/0/s1", "rl/answer/0~1/s0", "rl/answer/0~1/s1",
        "rl/answer/0~2/s0", "rl/answer/0~2/s1",
    ]  # fmt: skip
    assert rig.scheduler.counts["retried_groups"] == 2


def test_a_group_that_never_succeeds_is_replaced_by_the_next_task():
    rig = Rig(failing(6), {"answer": 1}, retries=2)

    async def body(scheduler):
        return ids(await scheduler.next_step())

    assert rig.run(body) == ["rl/answer/1"]
    assert rig.scheduler.counts["replaced_groups"] == 1 and len(rig.seen) == 8
    assert rig.scheduler.given_up == ("rl/answer/0",)


def test_a_prompt_that_is_too_long_is_not_tried_again():
    class Long(Answer):
        def reset(self, task):
            super().reset(task)
            return "x " * 3000 if task["n"] == 0 else "short"

    rig = Rig(model("3"), {"answer": 1}, arenas={"answer": arena(Long, name="answer")})

    async def body(scheduler):
        return ids(await scheduler.next_step())

    assert rig.run(body) == ["rl/answer/1"]
    assert Counter(one.stop_reason for one in rig.seen) == {
        StopReason.PROMPT_TOO_LONG: 2,
        StopReason.ANSWERED: 2,
    }


def test_when_nothing_succeeds_the_run_stops_with_the_last_error():
    rig = Rig(failing(10**9), {"answer": 4}, max_failures=10)

    async def body(scheduler):
        with pytest.raises(TooManyFailuresError, match=r"10 episodes failed in a row; .*worker died"):
            await scheduler.next_step()

    rig.run(body)
    assert 10 <= len(rig.seen) <= 24


def test_an_environment_that_fails_too_often_stops_the_run_by_name():
    class Flaky(Answer):
        def reset(self, task):
            if self.rng.random() < 0.7:
                raise RuntimeError("no server")
            return super().reset(task)

    arenas = {"answer": arena(Answer), "flaky": arena(Flaky, max_excluded=0.4)}
    rig = Rig(ScriptedPolicy(["3"]), {"answer": 4, "flaky": 4}, arenas=arenas, max_failures=1000)

    async def body(scheduler):
        with pytest.raises(
            TooManyFailuresError, match=r"environment 'flaky': .* max_excluded is 40%.*no server"
        ):
            for version in range(1, 100):
                await scheduler.next_step()
                scheduler.advance(version)

    rig.run(body)


def test_truncation_is_no_failure_and_never_uses_up_the_budget():
    where = arena(Answer, limits={"max_turns": 1}, max_excluded=0.0)
    rig = Rig(ScriptedPolicy([calls(call("look"))]), {"answer": 50}, arenas={"answer": where}, max_failures=1)

    async def body(scheduler):
        return await scheduler.next_step()

    groups = rig.run(body)
    assert {one.stop_reason for group in groups for one in group.trajectories} == {StopReason.MAX_TURNS}
    rig.scheduler.budget.check()


def test_a_sink_that_fails_stops_the_run_and_nothing_hangs():
    written = []

    def disk(trajectory):
        if len(written) == 3:
            raise StoreError("no space left on device")
        written.append(trajectory)

    rig = Rig(ScriptedPolicy(["3"]), {"answer": 4}, sink=disk)

    async def body(scheduler):
        with pytest.raises(StoreError, match="no space"):
            await scheduler.next_step()

    rig.run(body)
    assert len(written) == 3


def test_a_defect_in_a_task_surfaces_at_next_step():
    rig = Rig(ScriptedPolicy(lambda context: None), {"answer": 1})

    async def body(scheduler):
        with pytest.raises(AttributeError):
            await scheduler.next_step()

    rig.run(body)


# ---------------------------------------------------------------------------------------------------
# Resuming (promise 10)


def test_a_resumed_run_plays_only_what_is_missing():
    first = Rig(ScriptedPolicy(["3"]), {"answer": 2})

    async def one_step(scheduler):
        return await scheduler.next_step()

    first.run(one_step)
    on_disk = {one.id: one for one in first.seen if one.id != "rl/answer/1/s0"}
    learned = {"rl/answer/0"}

    def resumed(env, index):
        order = source(env, index)
        return None if order.id in learned else order

    again = Rig(
        ScriptedPolicy(["4"]),
        {"answer": 2},
        source=resumed,
        finished=lambda group: tuple(one for one in on_disk.values() if one.group_id == group),
        version=1,
        staleness=1,
    )
    groups = again.run(one_step)
    assert ids(groups) == ["rl/answer/1", "rl/answer/2"]
    assert [one.turns[0].message.text for one in groups[0].trajectories] == ["4", "3"]
    assert not {one.id for one in again.seen} & set(on_disk)


def test_a_failed_attempt_on_disk_is_not_played_again_but_its_next_attempt_is():
    first = Rig(failing(2), {"answer": 1})

    async def one_step(scheduler):
        return ids(await scheduler.next_step())

    assert first.run(one_step) == ["rl/answer/0~1"]
    on_disk = [one for one in first.seen if one.group_id == "rl/answer/0"]
    again = Rig(
        ScriptedPolicy(["4"]),
        {"answer": 1},
        finished=lambda group: tuple(one for one in on_disk if one.group_id == group),
    )
    assert again.run(one_step) == ["rl/answer/0~1"]
    assert [one.id for one in again.seen] == ["rl/answer/0~1/s0", "rl/answer/0~1/s1"]


def test_nothing_is_played_beyond_the_last_step():
    rig = Rig(ScriptedPolicy(["3"]), {"answer": 2}, staleness=2, steps=3)

    async def all_steps(scheduler):
        for version in range(1, 4):
            await scheduler.next_step()
            await asyncio.sleep(0)
            scheduler.advance(version)
        await asyncio.sleep(0.05)
        return scheduler.metrics["scheduler/groups_in_flight"]

    assert rig.run(all_steps) == 0
    assert len(rig.seen) == 3 * 2 * 2


def test_counts_go_on_from_an_earlier_run_s():
    rig = Rig(failing(2), {"answer": 1}, counts={"retried_groups": 3, "stale_groups": 1})

    async def one_step(scheduler):
        await scheduler.next_step()
        return scheduler.metrics

    metrics = rig.run(one_step)
    assert (metrics["scheduler/retried_groups"], metrics["scheduler/stale_groups"]) == (4, 1)
    assert metrics["scheduler/replaced_groups"] == 0 and metrics["scheduler/groups_in_flight"] == 0
    assert "scheduler/start_differs" in metrics


def test_a_step_that_was_on_disk_tells_what_a_played_one_does():
    first = Rig(ScriptedPolicy(["3"]), {"answer": 1})

    async def one_step(scheduler):
        await scheduler.next_step()
        return scheduler.metrics

    before = first.run(one_step)
    again = Rig(
        ScriptedPolicy(["4"]),
        {"answer": 1},
        finished=lambda group: tuple(one for one in first.seen if one.group_id == group),
    )
    assert again.run(one_step) == before and again.seen == []
