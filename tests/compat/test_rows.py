"""Data sets become tasks as they are, in the order in which TRL's sampler takes them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl.trainer.utils import RepeatSampler

from turnwise.compat.rows import PromptOrder, is_columns, is_stream, split_of, tasks_of
from turnwise.errors import RecipeError, TaskError

ROWS = [{"prompt": f"{n}", "answer": [{"half": n / 2, "of": [n]}]} for n in range(7)]


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        Dataset.from_list(ROWS),
        IterableDataset.from_generator(lambda: iter(ROWS)),
        {"prompt": [row["prompt"] for row in ROWS], "answer": [row["answer"] for row in ROWS]},
    ],
    ids=["list", "Dataset", "IterableDataset", "columns"],
)
def test_every_kind_of_data_set_has_the_same_rows(dataset: Any) -> None:
    assert tasks_of(dataset, "rows") == ROWS
    assert tasks_of(dataset, "rows", limit=3) == ROWS[:3]


def test_a_stream_is_read_no_further_than_it_must() -> None:
    def endless() -> Iterator[dict[str, str]]:
        for n in range(100):
            assert n < 3, "read too far"
            yield {"prompt": str(n)}

    assert len(tasks_of(endless(), "rows", limit=3)) == 3
    assert is_stream(endless())
    assert not is_stream(ROWS)


def test_splits_are_taken_by_name() -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS[:2]), test=Dataset.from_list(ROWS[2:]))
    assert tasks_of(split_of(splits, "train"), "rows") == ROWS[:2]
    assert tasks_of(split_of({"train": ROWS[:2], "test": ROWS[2:]}, "test"), "rows") == ROWS[2:]
    assert is_columns({"prompt": ["a", "b"]})
    with pytest.raises(RecipeError, match="the splits train, test and no 'dev'"):
        split_of(splits, "dev")


def test_numbers_of_numpy_are_plain_and_what_is_no_json_is_refused_by_column() -> None:
    row = {"prompt": "a", "grid": np.arange(4).reshape(2, 2), "at": np.float32(0.5), "pair": (1, None)}
    assert tasks_of([row], "rows") == [
        {"prompt": "a", "grid": [[0, 1], [2, 3]], "at": 0.5, "pair": [1, None]}
    ]
    for value, said in (
        (datetime.date(2024, 1, 1), "a date"),
        (float("nan"), "nan is no JSON number"),
        ({"deep": [object()]}, "a object"),
    ):
        with pytest.raises(TaskError, match=rf"rows, row 1, column 'when'.*{said}"):
            tasks_of([{"prompt": "a"}, {"prompt": "b", "when": value}], "rows")


def test_images_are_handed_to_whoever_stores_them() -> None:
    pillow = pytest.importorskip("PIL.Image")
    picture = pillow.new("RGB", (2, 2))
    rows = [{"prompt": "a", "images": [picture]}]
    assert tasks_of(rows, "rows", image=lambda one: {"stored": one.size}) == [
        {"prompt": "a", "images": [{"stored": (2, 2)}]}
    ]
    with pytest.raises(TaskError, match="column 'images': holds an image"):
        tasks_of(rows, "rows")


def test_remove_unused_columns_leaves_the_prompt() -> None:
    assert tasks_of(ROWS[:1], "rows", prompt_only=True) == [{"prompt": "0"}]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "per_step"), [(7, 2), (6, 3), (5, 5)])
def test_prompts_come_in_the_order_of_trls_sampler(count: int, per_step: int, shuffle: bool) -> None:
    sampler = RepeatSampler(range(count), mini_repeat_count=1, batch_size=per_step, shuffle=shuffle, seed=42)
    wanted = [row for _ in range(3) for row in sampler]
    at = PromptOrder({"shop": per_step}, shuffle=shuffle, seed=42)("shop", count)
    assert [at(place) for place in range(len(wanted))] == wanted


def test_a_data_set_smaller_than_a_batch_is_used_whole() -> None:
    at = PromptOrder({"shop": 4}, shuffle=True, seed=0)("shop", 3)
    assert sorted(at(place) for place in range(3)) == [0, 1, 2]
    assert sorted(at(place) for place in range(3, 6)) == [0, 1, 2]
