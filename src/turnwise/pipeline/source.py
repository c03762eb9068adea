"""`GroupSource`: which group is the n-th of an environment, and what of it is on disk already.

Group ids are ``rl/<environment>/<n>``, and a retry's ``rl/<environment>/<n>~1``; siblings add ``/s0``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from turnwise.codec import from_record
from turnwise.config import RlConfig
from turnwise.pipeline.attempts import episode_of
from turnwise.pipeline.context import Run
from turnwise.rollout.group import GroupOrder
from turnwise.store import RunDir
from turnwise.types import Trajectory, TrajectoryGroup


class GroupSource:
    """Orders groups for the scheduler.

    Args:
        run: The run, whose finished episodes of ``stage`` are taken into account.
        stage: The stage's name.
        config: The stage's groups.
    """

    def __init__(self, run: Run, stage: str, config: RlConfig) -> None:
        self.stage, self.size = stage, config.group_size
        self.streams = {env: run.tasks(env, "train", stage) for env in config.groups}
        self._played: dict[str, dict[str, Trajectory]] = defaultdict(dict)
        """By group: what the last checkpoint has not learned from, until somebody takes it."""
        for one in _of_use(run.directory, stage):
            self._played[one.group_id][one.id] = one
        self._spent: set[str] = set()
        """Groups that a step has used up, retried or not."""

    def __call__(self, env: str, index: int) -> GroupOrder | None:
        """The order of one group; None if a step has used it up."""
        group = f"{self.stage}/{env}/{index}"
        if group in self._spent:
            return None
        stream = self.streams[env]
        return GroupOrder(id=group, env=env, task=stream[index], seed=stream.seed(index), size=self.size)

    def finished(self, group: str) -> tuple[Trajectory, ...]:
        """The siblings of a group that were on disk at the start, given once; a retry has its own id."""
        return tuple(self._played.pop(group, {}).values())

    def spend(self, trajectory_ids: Iterable[str]) -> None:
        """Note that a step has used these trajectories up, whether it learned from them or not."""
        for one in trajectory_ids:
            self._spent.add(episode_of(_group_of(one)))

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
