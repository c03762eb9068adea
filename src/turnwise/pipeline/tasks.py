"""Task streams: which task is the n-th of a stage, fixed by the recipe's seed for a resumed run.

A row is played by the environment that lists it, or by the one that it names in an ``environment`` column,
so that one data set can feed several environments. A data set's rows take the place of those that its
environments list themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import orjson

from turnwise.envs.session import EnvSpec
from turnwise.errors import TaskError
from turnwise.pipeline.shuffle import EndlessShuffle
from turnwise.rollout.arena import route
from turnwise.types import Task

MAX_TASKS = 1_000_000
"""Rows of one split that are held in memory; an endless generator is cut here."""


def read_rows(path: Path, known: Collection[str]) -> dict[str, list[Task]]:
    """The rows of a JSON-lines file by environment, without the column that names it.

    Raises:
        TaskError: The file cannot be read, or a line is no JSON object or names no known environment; the
            message says which line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as cause:
        raise TaskError(f"the data set {path} cannot be read: {cause.strerror}") from cause
    rows: dict[str, list[Task]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as cause:
            raise TaskError(f"{path}, line {number}: no JSON ({cause})") from None
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: a row is a JSON object; found {type(row).__name__}")
        try:
            env = route(row, known)
        except TaskError as cause:
            raise TaskError(f"{path}, line {number}: {cause}") from None
        rows.setdefault(env, []).append({key: value for key, value in row.items() if key != "environment"})
    return rows


def routed(
    specs: Mapping[str, EnvSpec],
    split: str,
    *,
    known: Collection[str],
    data: Mapping[str, Sequence[Task]] | None = None,
) -> dict[str, Sequence[Task]]:
    """Every row of a split, by the environment that plays it.

    Args:
        specs: The environments that play this split; each lists its rows.
        split: ``train`` or ``test``.
        known: All environments of the run: what a row may name.
        data: A data set's rows by environment; such an environment is not asked for its own.

    Raises:
        TaskError: A row is no JSON object, or names an unknown environment.
    """
    own: dict[str, list[Task]] = {name: [] for name in specs}
    from_others: dict[str, list[Task]] = {name: [] for name in known}
    held: dict[str, Sequence[Task]] = {name: rows for name, rows in (data or {}).items() if rows}
    for name, spec in specs.items():
        if name in held:
            continue
        for number, row in enumerate(islice(spec.tasks(split), MAX_TASKS)):
            try:
                target = name if row.get("environment") is None else route(row, known)
            except TaskError as cause:
                raise TaskError(f"environment {name}: tasks('{split}'): row {number}: {cause}") from None
            (own if target == name else from_others)[target].append(row)
    # One empty row is what an environment lists that has no tasks of its own.
    listed: dict[str, Sequence[Task]] = {
        name: [] if rows == [{}] and from_others[name] else rows for name, rows in own.items()
    }
    # What is handed over may be read as it is needed: it is not looked through here.
    return {
        name: [*rows, *from_others[name]] if from_others[name] else rows
        for name, rows in {**listed, **{name: rows for name, rows in held.items() if name in own}}.items()
    }


class TaskStream:
    """The tasks of one environment and split in an endless, shuffled, reproducible order.

    Each pass over the tasks is a permutation of its own:

        TaskStream("catch", "train", tasks, seed=0)[i]      # the i-th task, i = 0, 1, 2, …

    Args:
        env: The environment's name in the recipe.
        split: ``train`` or ``test``.
        tasks: Its rows of the split.
        seed: The recipe's.
        salt: Sets stages apart that read the same split.
        order: The row at each index; a shuffle by the seed if None.

    Raises:
        TaskError: There are no tasks.
    """

    def __init__(
        self,
        env: str,
        split: str,
        tasks: Sequence[Task],
        *,
        seed: int,
        salt: str = "",
        order: Callable[[int], int] | None = None,
    ) -> None:
        if not tasks:
            raise TaskError(
                f"environment {env} has no tasks in split '{split}'; its tasks() must yield a row, or the "
                f"recipe's tasks.{split} name a file with rows whose 'environment' is {env}"
            )
        self.tasks = tasks
        self._entropy = [seed, *f"{env}/{split}/{salt}".encode()]
        self._order = order or EndlessShuffle(len(tasks), self._entropy).__getitem__

    def __len__(self) -> int:
        """Distinct tasks."""
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        """The task at ``index`` of the endless order."""
        return self.tasks[self._order(index)]

    def seed(self, index: int) -> int:
        """The seed of the episodes of the task at ``index``: siblings share it."""
        return int(np.random.default_rng([*self._entropy, 0x5EED, index]).integers(2**31))
