"""Refilling a step: groups that teach nothing give their quota back, within bounds, in whatever order."""

from __future__ import annotations

import asyncio
import random
from itertools import count

import pytest
from tests.rollout.test_scheduler import Rig, ids, settle, source
from tests.support.rollouts import model

from turnwise.errors import EngineError, TaskError
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scheduler import oldest_version
from turnwise.types import TrajectoryGroup

PLACES = {"answer": 3, "other": 1}


class Worth:
    """By chance: which groups are useful, which fail for good; and replies that take their time."""

    def __init__(self, seed: int, share: float, failing: float = 0.0) -> None:
        self.chance, self.seed, self.share, self.failing = random.Random(seed), seed, share, failing

    def fails(self, group: str) -> bool:
        return random.Random(f"{self.seed}/{group.partition('~')[0]}").random() < self.failing

    def __call__(self, group: TrajectoryGroup) -> bool:
        return self.useful(group.id)

    def useful(self, group: str) -> bool:
        return random.Random(f"{group}/{self.seed}").random() < self.share

    async def say(self, context) -> str:
        for _ in range(self.chance.randrange(12)):
            await asyncio.sleep(0)
        if self.fails(context.session.rpartition("/")[0]):
            raise EngineError("worker died")
        return "3"

    def step(self, env: str, first: int, limit: int) -> tuple[list[str], int]:
        """What a synchronous step uses up, the fewest groups that fill it or as many as it may play; and
        where the next begins."""
        used: list[str] = []
        for index in count(first):
            group = f"rl/{env}/{index}"
            if not self.fails(group):
                used.append(group)
            if sum(map(self.useful, used)) == PLACES[env] or len(used) == limit * PLACES[env]:
                return used, index + 1
        raise AssertionError


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("share", "failing"), [(0, 0), (0.15, 0), (0.5, 0), (0.5, 0.2), (1, 0.2)])
@pytest.mark.parametrize("limit", [2, 5])
@pytest.mark.parametrize("concurrency", [3, 64])
def test_a_synchronous_step_uses_up_the_fewest_groups_that_fill_it(seed, share, failing, limit, concurrency):
    worth = Worth(seed, share, failing)
    rig = Rig(
        ScriptedPolicy(worth.say),
        PLACES,
        useful=worth,
        refill_limit=limit,
        concurrency=concurrency,
        retries=0,
    )

    async def body(scheduler):
        steps = []
        for version in range(1, 7):
            groups = await scheduler.next_step()
            await settle()
            steps.append((ids(groups), len(rig.seen)))
            scheduler.advance(version)
        return steps

    played = dict.fromkeys(PLACES, 0)
    for found, episodes in rig.run(body):
        expected = []
        for env in PLACES:
            used, played[env] = worth.step(env, played[env], limit)
            expected += used
        assert found == expected
        assert episodes == 2 * sum(played.values()), "nothing is played that no step uses"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_playing_ahead_every_step_is_full_or_has_met_its_bound(seed, staleness, share):
    limit, worth = 3, Worth(seed, share)

    def delay(made):
        """Some groups end versions after they began."""
        chance = random.Random(made.session)
        return chance.random() * (0.05 if chance.random() < 0.2 else 0.003)

    policy = model("3", delay=delay)
    rig = Rig(policy, PLACES, useful=worth, refill_limit=limit, staleness=staleness, concurrency=16)

    async def body(scheduler):
        seen = []
        for version in range(1, 9):
            groups = await scheduler.next_step()
            for env, places in PLACES.items():
                own = [group for group in groups if group.env == env]
                useful = [group for group in own if worth(group)]
                others = len(own) - len(useful)
                assert len(useful) == places or len(useful) + others >= limit * places > len(useful)
                assert others <= (limit + staleness) * places, "playing on is bounded"
                oldest = min((oldest_version(group) for group in useful), default=scheduler.version)
                assert oldest >= scheduler.version - staleness
                assert scheduler._spent[env] <= (version + staleness) * places
            # No quota is lost and none is given back twice.
            flying = sum(not task.done() for task in scheduler._tasks)
            ahead = flying + sum(map(len, scheduler._ready.values()))
            assert sum(scheduler._spent.values()) == version * sum(PLACES.values()) + ahead
            seen += ids(groups)
            policy.engine.version = version
            scheduler.advance(version)
            await asyncio.sleep(0.02 * (version % 3 == 0))
        return seen

    used = rig.run(body)
    assert len(set(used)) == len(used), "no group is used up twice"


@pytest.mark.parametrize("failing", [0, 0.2])
def test_a_resumed_step_uses_up_the_same_groups_and_plays_none_again(failing):
    """Killed before the step was recorded: whatever of it was on disk, useful or not."""
    worth = Worth(3, 0.4, failing)

    def rig(on_disk):
        return Rig(
            ScriptedPolicy(worth.say),
            PLACES,
            useful=worth,
            refill_limit=4,
            retries=1,
            finished=lambda group: tuple(one for one in on_disk if one.group_id == group),
        )

    async def step(scheduler):
        return ids(await scheduler.next_step())

    whole = rig([])
    expected = whole.run(step)
    assert expected == worth.step("answer", 0, 4)[0] + worth.step("other", 0, 4)[0]
    assert 4 < len(expected) < 16
    for kept in range(len(whole.seen) + 1):
        again = rig(whole.seen[:kept])
        assert again.run(step) == expected
        assert {one.id for one in again.seen} == {one.id for one in whole.seen[kept:]}


def test_groups_of_recorded_steps_are_passed_over():
    used = {f"rl/answer/{index}" for index in (0, 1, 2, 3, 5)}

    def resumed(env, index):
        order = source(env, index)
        return None if order.id in used else order

    rig = Rig(
        ScriptedPolicy(["3"]), {"answer": 2}, source=resumed, useful=lambda group: group.task["n"] != 4,
        refill_limit=2,
    )  # fmt: skip

    async def body(scheduler):
        return ids(await scheduler.next_step())

    assert rig.run(body) == ["rl/answer/4", "rl/answer/6", "rl/answer/7"]
    assert rig.scheduler.counts["refilled_groups"] == 1


def test_a_source_that_skips_everything_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr("turnwise.rollout.scheduler.MOST_SKIPPED", 1000)
    rig = Rig(
        ScriptedPolicy(["3"]),
        {"answer": 1},
        source=lambda env, index: source(env, index) if index < 2 else None,
    )

    async def body(scheduler):
        for version in (1, 2):
            await scheduler.next_step()
            scheduler.advance(version)

    with pytest.raises(TaskError, match="the source has no group of 'answer' from 2 to 1001"):
        rig.run(body)
