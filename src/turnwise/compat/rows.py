"""Data sets as tasks: rows of JSON values in the order in which TRL's trainers would take them.

A data set is anything that yields mappings: ``datasets.Dataset`` and ``IterableDataset``, a list of dicts, a
dict of columns, or a dict of splits. What a column holds that is no JSON (dates, bytes, NaN) stays in memory,
and is handed to ``reset`` and to reward functions as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cache
from itertools import islice
from typing import Any

from turnwise.errors import RecipeError, TaskError
from turnwise.types import Kept

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


def rows_of(dataset: Any, what: str) -> Iterator[Any]:
    """The rows as the data set has them.

    Raises:
        TaskError: There is none, or columns of different lengths.
    """
    rows: Iterable[Any] = dataset
    if isinstance(dataset, Mapping):
        if len({len(column) for column in dataset.values()}) > 1:
            lengths = {name: len(column) for name, column in dataset.items()}
            raise TaskError(f"{what}: its columns have different lengths: {lengths}")
        rows = [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise TaskError(f"{what} has no rows")


def tasks_of(
    dataset: Any,
    what: str,
    *,
    limit: int | None = None,
    prompt_only: bool = False,
    image: Callable[[Any], Any] | None = None,
) -> list[dict[str, Any]]:
    """All rows, as `task_of` makes them.

    Args:
        dataset: As above.
        what: Its name in errors.
        limit: At most so many, for a stream.
        prompt_only: Leave out all columns but the prompt's (`PROMPT_COLUMNS`).
        image: Stores an image and returns what stands for it in a row.

    Raises:
        TaskError: There is no row, or one is none.
    """
    return [
        task_of(row, what, number, prompt_only=prompt_only, image=image)
        for number, row in enumerate(islice(rows_of(dataset, what), limit))
    ]


def task_of(
    row: Any, what: str, number: int, *, prompt_only: bool = False, image: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """A row as a JSON object; a column that is no JSON is a `Kept`.

    Args:
        row: A mapping of columns.
        what: The data set's name in errors.
        number: The row's.
        prompt_only: As of `tasks_of`, as is ``image``.
        image: Stores an image and returns what stands for it.

    Raises:
        TaskError: It is no mapping, or its prompt holds what is no JSON value; the message names the column.
    """
    if not isinstance(row, Mapping):
        raise TaskError(f"{what}, row {number}: a row is a mapping of columns; found {type(row).__name__}")
    task: dict[str, Any] = {}
    for name, value in row.items():
        if prompt_only and name not in PROMPT_COLUMNS:
            continue
        try:
            task[str(name)] = _json(value, f"{what}, row {number}, column '{name}'", image)
        except TaskError:
            if name in PROMPT_COLUMNS:
                raise
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            stands = {"type": "python", "class": kind, "row": number, "column": str(name)}
            task[str(name)] = Kept(stands, value)
    return task


def in_memory(task: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the values that it keeps in memory."""
    return {name: value.value if isinstance(value, Kept) else value for name, value in task.items()}


def need_prompt(task: Mapping[str, Any], what: str, number: int) -> None:
    """Refuse a row without a prompt, where nothing else gives one.

    Raises:
        TaskError: It has none.
    """
    if task.get("prompt") is None:
        raise TaskError(
            f"{what}, row {number}: it has no 'prompt', only {', '.join(task) or 'nothing'}; rename the "
            "column, or pass an environment_factory whose reset returns the prompt"
        )


def check_prompt(task: Mapping[str, Any], what: str, number: int) -> None:
    """Refuse a prompt that a reply would have to go on with, where here a reply is a message of its own.

    Raises:
        TaskError: It ends with an assistant's message.
    """
    prompt = task.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise TaskError(
            f"{what}, row {number}: the prompt ends with an assistant's message, and a reply is a message of "
            "its own here, never the rest of one: leave that message out, and tell in the user's how a reply "
            "shall begin"
        )


def _json(value: Any, where: str, image: Callable[[Any], Any] | None) -> Any:
    """A value as plain JSON has it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TaskError(f"{where}: {value} is no JSON number; write None where there is no value")
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _json(one, where, image) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one, where, image) for one in value]
    dates = getattr(getattr(value, "dtype", None), "kind", None) in ("M", "m")  # Which would become numbers.
    if callable(getattr(value, "tolist", None)) and not dates:  # Arrays and numbers of numpy and torch.
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
