"""`GroupSource`: which group is the n-th of an environment, and what of it is done already.

Group ids are ``rl/<environment>/<n>``, and a retry's ``rl/<environment>/<n>~1``; siblings add ``/s0``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from turnwise.config import RlConfig
from turnwise.pipeline.context import Run
from turnwise.rollout.group import GroupOrder
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
        self._finished: dict[str, Trajectory] = {one.id: one for one in run.directory.read(stage)}
        self._spent: set[str] = set()
        """Groups that need no playing: learned from, or played in vain."""
        for trajectory in self._finished.values():
            base, retry, _ = trajectory.group_id.partition("~")
            if retry:
                self._spent.add(base)

    def __call__(self, env: str, index: int) -> GroupOrder | None:
        """The order of one group, with the siblings that are on disk; None if it was used up before."""
        group = f"{self.stage}/{env}/{index}"
        if group in self._spent:
            return None
        stream = self.streams[env]
        ids = [f"{group}/s{k}" for k in range(self.size)]
        return GroupOrder(
            id=group,
            env=env,
            task=stream[index],
            seed=stream.seed(index),
            size=self.size,
            finished=tuple(self._finished[one] for one in ids if one in self._finished),
        )

    def spend(self, trajectory_ids: Iterable[str]) -> None:
        """Note that an update has used these trajectories."""
        for one in trajectory_ids:
            group, _, _ = one.rpartition("/")
            self._spent.add(group.partition("~")[0])

    def recorded(self, trajectory_ids: Sequence[str]) -> list[TrajectoryGroup]:
        """The groups of a recorded step, from disk, in the order in which they were used."""
        siblings: dict[str, list[Trajectory]] = defaultdict(list)
        for one in trajectory_ids:
            trajectory = self._finished[one]
            siblings[trajectory.group_id].append(trajectory)
        return [
            TrajectoryGroup(id=group, env=found[0].env, task=found[0].task, trajectories=tuple(found))
            for group, found in siblings.items()
        ]
