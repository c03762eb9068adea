"""Task streams: which task is the n-th of a stage, fixed by the recipe's seed for a resumed run."""

from __future__ import annotations

from itertools import islice

import numpy as np

from turnwise.envs.session import EnvSpec
from turnwise.errors import TaskError
from turnwise.types import Task

MAX_TASKS = 1_000_000
"""Rows of one split that are held in memory; an endless generator is cut here."""


class TaskStream:
    """The tasks of one environment and split in an endless, shuffled, reproducible order.

    Each pass over the tasks is a permutation of its own:

        TaskStream(spec, "train", seed=0)[i]      # the i-th task, i = 0, 1, 2, …
    """

    def __init__(self, spec: EnvSpec, split: str, *, seed: int, salt: str = "") -> None:
        """Read the split.

        Args:
            spec: The environment.
            split: ``train`` or ``test``.
            seed: The recipe's.
            salt: Sets stages apart that read the same split.

        Raises:
            TaskError: The split has no tasks.
        """
        self.tasks: list[Task] = list(islice(spec.tasks(split), MAX_TASKS))
        if not self.tasks:
            raise TaskError(
                f"environment {spec.name} has no tasks in split '{split}'; its tasks() must yield a row"
            )
        self._entropy = [seed, *f"{spec.name}/{split}/{salt}".encode()]
        self._order: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Distinct tasks."""
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        """The task at ``index`` of the endless order."""
        epoch, place = divmod(index, len(self.tasks))
        if epoch not in self._order:
            self._order = {epoch: np.random.default_rng([*self._entropy, epoch]).permutation(len(self.tasks))}
        return self.tasks[int(self._order[epoch][place])]

    def seed(self, index: int) -> int:
        """The seed of the episodes of the task at ``index``: siblings share it."""
        return int(np.random.default_rng([*self._entropy, 0x5EED, index]).integers(2**31))
