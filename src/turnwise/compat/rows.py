"""Data sets as tasks: rows of JSON values in the order in which TRL's trainers would take them.

A data set is anything that yields mappings: ``datasets.Dataset`` and ``IterableDataset``, a list of dicts, a
dict of columns, or a dict of splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import cache
from itertools import islice
from typing import Any

from turnwise.errors import RecipeError, TaskError

PROMPT_COLUMNS = ("prompt", "image", "images", "environment")
"""What ``remove_unused_columns`` leaves of a row."""


def split_of(dataset: Any, split: str) -> Any:
    """One split of a ``DatasetDict`` or a dict of data sets; any other data set is itself.

    Raises:
        RecipeError: It has splits, and none of this name.
    """
    if not isinstance(dataset, Mapping) or is_columns(dataset):
        return dataset
    if split not in dataset:
        raise RecipeError(
            f"the data set has the splits {', '.join(map(str, dataset))} and no '{split}': hand one over"
        )
    return dataset[split]


def is_columns(dataset: Mapping[str, Any]) -> bool:
    """Whether a mapping is a data set by columns: lists of values, and not of rows."""
    return bool(dataset) and all(
        isinstance(column, list | tuple)
        and not any(isinstance(one, Mapping) and "prompt" in one for one in column)
        for column in dataset.values()
    )


def is_stream(dataset: Any) -> bool:
    """Whether it only shows as it is read how many rows a data set has."""
    return dataset is not None and not isinstance(dataset, Sized)


def tasks_of(
    dataset: Any,
    what: str,
    *,
    limit: int | None = None,
    prompt_only: bool = False,
    image: Callable[[Any], Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows as JSON objects.

    Args:
        dataset: As above.
        what: Its name in errors.
        limit: At most so many, for a stream.
        prompt_only: Leave out all columns but the prompt's (`PROMPT_COLUMNS`).
        image: Stores an image and returns what stands for it in a row.

    Raises:
        TaskError: There is no row, or one holds what is no JSON value; the message names the column.
    """
    rows: Iterable[Any] = dataset
    if isinstance(dataset, Mapping):
        if len({len(column) for column in dataset.values()}) > 1:
            lengths = {name: len(column) for name, column in dataset.items()}
            raise TaskError(f"{what}: its columns have different lengths: {lengths}")
        rows = [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]
    found = []
    for number, row in enumerate(islice(rows, limit)):
        if not isinstance(row, Mapping):
            raise TaskError(
                f"{what}, row {number}: a row is a mapping of columns; found {type(row).__name__}"
            )
        kept = {name: value for name, value in row.items() if not prompt_only or name in PROMPT_COLUMNS}
        found.append(
            {
                str(name): _json(value, f"{what}, row {number}, column '{name}'", image)
                for name, value in kept.items()
            }
        )
    if not found:
        raise TaskError(f"{what} has no rows")
    return found


def _json(value: Any, where: str, image: Callable[[Any], Any] | None) -> Any:
    """A value as plain JSON has it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TaskError(f"{where}: {value} is no JSON number; write None where there is no value")
        return value
    if isinstance(value, Mapping):
        return {str(name): _json(one, where, image) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one, where, image) for one in value]
    if callable(getattr(value, "tolist", None)):  # Arrays and numbers of numpy and torch.
        return _json(value.tolist(), where, image)
    if hasattr(value, "getbands"):  # An image of PIL, which need not be installed.
        if image is None:
            raise TaskError(f"{where}: holds an image, and the model reads text alone; load one that sees")
        return image(value)
    raise TaskError(
        f"{where}: holds a {type(value).__name__}, and a row must be JSON: text, numbers, lists and objects. "
        "Convert the column, or remove it"
    )


class PromptOrder:
    """The order in which TRL's sampler takes a data set's rows, pass after pass without end.

    Each pass is a permutation drawn with torch from the seed, cut to whole generation batches; without a
    shuffle it is the data set's own order. (One that is smaller than a generation batch is used whole.)

    Args:
        per_step: Prompts of each environment that one generation batch takes.
        shuffle: ``shuffle_dataset``.
        seed: ``seed``.
    """

    def __init__(self, per_step: Mapping[str, int], *, shuffle: bool, seed: int) -> None:
        self._per_step, self._shuffle, self._seed = per_step, shuffle, seed

    def __call__(self, env: str, count: int) -> Callable[[int], int]:
        """The row at each place, for a data set of ``count`` rows."""
        whole = count // self._per_step[env] * self._per_step[env] or count

        @cache
        def permutation(number: int) -> Sequence[int]:
            return self._permutation(count, number)

        def at(place: int) -> int:
            number, offset = divmod(place, whole)
            return permutation(number)[offset] if self._shuffle else offset

        return at

    def _permutation(self, count: int, number: int) -> Sequence[int]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(number):  # One generator goes on from pass to pass.
            torch.randperm(count, generator=generator)
        drawn: list[int] = torch.randperm(count, generator=generator).tolist()
        return drawn
