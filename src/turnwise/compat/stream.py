"""`Stream`: the rows of a data set that only shows as it is read how many it has, read as steps need them.

    stream = Stream(dataset, place, ["sql", "game"])
    stream.limit = 640                     # of the plan: no more than these are ever read
    stream.of("game")[3]                   # reads until the fourth row of this environment is there

What was read is kept: siblings, retries and resumed runs ask for a row again. A stream that ends before the
plan does begins anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from turnwise.errors import TaskError, boundary
from turnwise.types import Task

Place = Callable[[Any, int], tuple[str, Task]]
"""From a row and its number: the environment that plays it, and the task."""


class Stream:
    """Reads a data set once, for several environments, from one thread at a time.

    Args:
        rows: Of the data set.
        place: What becomes of a row.
        names: The environments'.
    """

    def __init__(self, rows: Iterable[Any], place: Place, names: Iterable[str]) -> None:
        self.limit = 1
        """Rows to read at most, whatever is asked for."""
        self._rows, self._place = iter(rows), place
        self._read: dict[str, list[Task]] = {name: [] for name in names}
        self._count, self._ended = 0, False
        self._lock = threading.Lock()

    def of(self, env: str) -> StreamRows:
        """The rows of one environment."""
        return StreamRows(self, env)

    def read(self, env: str, count: int) -> Sequence[Task]:
        """What was read for an environment, when these are so many, or no more are to be had.

        Raises:
            TaskError: A row is none, or the data set's own code raised; the message says at which row.
        """
        found = self._read[env]
        with self._lock:
            while len(found) < count and self._count < self.limit and not self._ended:
                with boundary(TaskError, f"train_dataset, row {self._count}"):
                    try:
                        row = next(self._rows)
                    except StopIteration:
                        self._ended = True
                        break
                    name, task = self._place(row, self._count)
                self._read[name].append(task)
                self._count += 1
        return found


class StreamRows(Sequence[Task]):
    """The rows of one environment, over and over where there are fewer than the plan takes."""

    def __init__(self, stream: Stream, env: str) -> None:
        self.stream, self._env = stream, env

    def __len__(self) -> int:
        """Not how many there are, which nobody knows, but how many are asked for at most."""
        return self.stream.limit

    def __getitem__(self, index: Any) -> Any:
        """The row at an index; reads on until it is there.

        Raises:
            TaskError: There is none for this environment.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = self.stream.read(self._env, index + 1)
        if not found:
            raise TaskError(f"train_dataset has no rows for the environment '{self._env}'")
        return found[index % len(found)]

    def __iter__(self) -> Iterator[Task]:
        """All that may be asked for."""
        return (self[index] for index in range(len(self)))

    def prepare(self, count: int) -> None:
        """Read until the first ``count`` rows are there, on the thread that calls."""
        self.stream.read(self._env, count)
