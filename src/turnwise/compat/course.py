"""`Course`: which rows each update of SFT learns from, in the order of transformers' Trainer.

epoch 0                                     epoch 1
permutation(seed)                           permutation(seed + 1)
[micro][micro] [micro][micro] [micro]       …          accumulated = 2: the last update takes what is left
update 0       update 1       update 2      update 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from turnwise.compat.translate import Plan

T = TypeVar("T")


class Course:
    """The order of a data set's rows, pass after pass.

    Args:
        rows: How many there are.
        micro: Rows of a micro-batch, over all processes.
        accumulated: Micro-batches of an update.
        whole: Leave out an epoch's last micro-batch where it is not full (``dataloader_drop_last``).
        seed: Of the permutations; None takes rows as they come.
    """

    def __init__(self, rows: int, *, micro: int, accumulated: int, whole: bool, seed: int | None) -> None:
        self._rows, self._size, self._accumulated, self._seed = rows, micro * accumulated, accumulated, seed
        self.micro_batches = len(batches(range(rows), micro, whole=whole))
        self._used = min(rows, self.micro_batches * micro)
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def updates(self) -> int:
        """Of an epoch."""
        return math.ceil(self.micro_batches / self._accumulated)

    def update(self, number: int) -> Sequence[int]:
        """The rows of update ``number``, counted from 0."""
        epoch, place = divmod(number, self.updates)
        return self._order(epoch)[: self._used][place * self._size : (place + 1) * self._size]

    def _permutation(self, epoch: int) -> Sequence[int]:
        if self._seed is None:
            return range(self._rows)
        drawn: list[int] = torch.randperm(
            self._rows, generator=torch.Generator().manual_seed(self._seed + epoch)
        ).tolist()
        return drawn

    def done(self, updates: int) -> float:
        """Epochs that are done after so many updates, as transformers counts them: by micro-batches."""
        epoch, place = divmod(updates, self.updates)
        return epoch + place * self._accumulated / self.micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class CoursePlan(Plan):
    """A plan that counts its epochs by its course."""

    course: Course

    def epoch_of(self, step: int) -> float:
        """As of `Plan`."""
        return self.course.done(step)


def batches(rows: Sequence[T], size: int, *, whole: bool) -> list[Sequence[T]]:
    """So many at a time; ``whole`` leaves out a last batch that is not full, where it is not the only one."""
    made = [rows[start : start + size] for start in range(0, len(rows), size)]
    return made[:-1] if whole and len(made) > 1 and len(made[-1]) < size else made


def shuffled(rows: Sequence[T], seed: int) -> list[T]:
    """In the order of ``datasets.Dataset.shuffle``."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
