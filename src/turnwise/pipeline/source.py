"""`GroupSource`: which group is the n-th of an environment, and what of it is on disk already.

Group ids are ``rl/<environment>/<n>``, and a retry's ``rl/<environment>/<n>~1``; siblings add ``/s0``, and
one whose environment was lost is played again as ``/s0~1``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, takewhile

from turnwise.codec import from_record
from turnwise.config import RlConfig
from turnwise.pipeline.context import Run, sampling_of
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.record import episode_of
from turnwise.store import RunDir
from turnwise.types import Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)


class GroupSource:
    """Orders groups for the scheduler.

    Args:
        run: The run, whose finished episodes of ``stage`` are taken into account.
        stage: The stage's name.
        config: The stage's groups.
        harness: The present one of each environment.
    """

    def __init__(self, run: Run, stage: str, config: RlConfig, harness: Mapping[str, str]) -> None:
        self.stage, self.size, self.harness = stage, config.group_size, harness
        self.sampling = sampling_of(config.sampling, seed=run.recipe.seed)
        self.streams = {env: run.tasks(env, "train", stage) for env in config.groups}
        self._played: dict[str, dict[str, Trajectory]] = defaultdict(dict)
        """By group: what the last checkpoint has not learned from, until somebody takes it."""
        for one in _of_use(run.directory, stage):
            self._played[one.group_id][one.id] = one
        self._spent: set[str] = set()
        """Groups that a step has used up, retried or not."""

    def __call__(self, env: str, index: int) -> GroupOrder | None:
        """The order of one group; None if a step has used it up, or it was begun under another recipe."""
        group = f"{self.stage}/{env}/{index}"
        if group in self._spent:
            return None
        stream = self.streams[env]
        order = GroupOrder(id=group, env=env, task=stream[index], seed=stream.seed(index), size=self.size)
        begun = self._begun(group)
        if all(self._as_ordered(one, order) for one in begun):
            for one in begun:  # The same row, which may keep in memory what no disk does.
                self._played[one.group_id][one.id] = replace(one, task=order.task)
            return order
        log.warning(
            "group %s is left out: its %d finished episodes are of another harness, task, seed or sampling, "
            "and siblings must not differ in these", group, len(begun),
        )  # fmt: skip
        return None

    def finished(self, group: str) -> tuple[Trajectory, ...]:
        """The siblings of a group that were on disk at the start, given once; a retry has its own id."""
        return tuple(self._played.pop(group, {}).values())

    def _begun(self, group: str) -> list[Trajectory]:
        """What is on disk of a group and its retries."""
        names = chain([group], (f"{group}~{attempt}" for attempt in count(1)))
        return [
            one for name in takewhile(self._played.__contains__, names) for one in self._played[name].values()
        ]

    def _as_ordered(self, one: Trajectory, order: GroupOrder) -> bool:
        """Whether an episode on disk is what would be played now."""
        now = self.harness[order.env], order.task, order.seed
        return (one.harness, one.task, one.seed) == now and one.sampling in (None, self.sampling)

    def spend(self, trajectory_ids: Iterable[str], given_up: Iterable[str] = ()) -> None:
        """Note that a step has used these trajectories up, whether it learned from them or not.

        Args:
            trajectory_ids: The step's.
            given_up: Groups that were played for it in vain, and counted.
        """
        self._spent |= {episode_of(_group_of(one)) for one in trajectory_ids}
        self._spent |= {episode_of(group) for group in given_up}

    def recorded(self, trajectory_ids: Sequence[str]) -> list[TrajectoryGroup]:
        """The groups of a recorded step, from disk, in the order in which they were used. Given once."""
        siblings: dict[str, list[Trajectory]] = defaultdict(list)
        for one in trajectory_ids:
            group = _group_of(one)
            siblings[group].append(self._played[group].pop(one))
        return [
            TrajectoryGroup(id=group, env=found[0].env, task=found[0].task, trajectories=tuple(found))
            for group, found in siblings.items()
        ]


def _of_use(directory: RunDir, stage: str) -> Iterator[Trajectory]:
    """The stage's trajectories without those that its last checkpoint has learned from.

    A long run has more of them than memory holds; what is left are a few steps' and what was in flight.
    """
    checkpoint = directory.latest(stage)
    reached = checkpoint.step if checkpoint is not None else 0
    past = {
        one for record in directory.steps(stage) if record.step <= reached for one in record.trajectory_ids
    }
    for record in directory.records(stage):
        if record["id"] not in past:
            yield from_record(record)


def _group_of(trajectory_id: str) -> str:
    return trajectory_id.rpartition("/")[0]
