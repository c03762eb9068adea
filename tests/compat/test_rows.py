"""Data sets become tasks as they are, in the order in which TRL's sampler takes them."""

from __future__ import annotations

import copy
import datetime
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl.trainer.utils import RepeatSampler

import turnwise
from tests.compat.trainers import model, trainer
from tests.support.tokenizers import tiny_tokenizer
from tests.support.trajectories import trajectory
from turnwise.codec import decode, encode
from turnwise.compat.environments import placed
from turnwise.compat.rows import (
    PromptOrder,
    check_prompt,
    in_memory,
    is_columns,
    is_stream,
    split_of,
    task_of,
    tasks_of,
)
from turnwise.envs.base import Env
from turnwise.envs.spec import class_spec
from turnwise.errors import RecipeError, TaskError
from turnwise.images import revived
from turnwise.store import RunDir

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


def test_numbers_of_numpy_are_plain_and_a_prompt_that_is_no_json_is_refused() -> None:
    row = {"prompt": "a", "grid": np.arange(4).reshape(2, 2), "at": np.float32(0.5), "pair": (1, None)}
    assert tasks_of([row], "rows") == [
        {"prompt": "a", "grid": [[0, 1], [2, 3]], "at": 0.5, "pair": [1, None]}
    ]
    for value, said in (
        (datetime.date(2024, 1, 1), "a date"),
        (float("nan"), "nan is no JSON number"),
        ([{"role": "user", "content": object()}], "a object"),
    ):
        with pytest.raises(TaskError, match=rf"rows, row 1, column 'prompt'.*{said}"):
            tasks_of([{"prompt": "a"}, {"prompt": value}], "rows")


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2024, 1, 1), b"xx", float("nan"), {"deep": [object()]}, {3: 4}, threading.Lock(),
        np.datetime64("2024-01-01", "ns"),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_what_is_no_json_is_kept_in_memory_and_stands_on_disk(value: Any) -> None:
    task = tasks_of([{"prompt": "a"}, {"prompt": "b", "when": value}], "rows")[1]
    assert in_memory(task)["when"] is value is revived(copy.deepcopy(task))["when"]
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    stands = {"type": "python", "class": name, "row": 1, "column": "when"}
    stored = decode(encode(replace(trajectory(), task=task))).task
    assert stored == {"prompt": "b", "when": stands} == task


def test_reset_and_rewards_are_handed_what_is_kept(tmp_path: Path) -> None:
    whens = [datetime.datetime(2024, 1, day) for day in (1, 2)]
    rows = [
        {"prompt": [{"role": "user", "content": "Hi."}], "when": when, "score": score, "data": b"\xff"}
        for when, score in zip(whens, (1.0, float("nan")), strict=True)
    ]
    seen: list[Any] = []

    class Shop:
        def reset(self, when: Any, data: bytes, **row: Any) -> None:
            assert data == b"\xff"
            seen.append(("reset", when))

    def reward(completions: Any, when: Any, score: Any, data: Any, **_: Any) -> list[float]:
        assert set(data) == {b"\xff"} and all(isinstance(one, float) for one in score)
        seen.append(("reward", when[0]))
        return [float(len(one[0]["content"])) for one in completions]

    data = Dataset.from_list(rows)
    made = trainer(
        tmp_path, train_dataset=data, eval_dataset=data, eval_strategy="steps", eval_steps=1, max_steps=1,
        reward_funcs=reward, environment_factory=Shop,
    )  # fmt: skip
    made.train()
    for when in whens:
        assert seen.count(("reset", when)) == 8 and seen.count(("reward", when)) == 2
    stored = next(RunDir(tmp_path).read("rl")).task["when"]
    assert stored == {"type": "python", "class": "datetime.datetime", "row": stored["row"], "column": "when"}


def test_what_is_kept_is_not_sent() -> None:
    class Near(Env):
        def reset(self, task: Any) -> str:
            return "Hi."

    class Far(Near):
        isolation = "process"

    row = task_of({"prompt": "a", "when": b""}, "rows", 0)
    near = class_spec(Near, name="far")
    assert placed(row, 0, {"far": near}, routed=False) == ("far", row)
    known = {"far": replace(near, env_class=Far)}
    with pytest.raises(TaskError, match="row 0, column 'when': holds a bytes, and environment far"):
        placed(row, 0, known, routed=False)


def test_a_formatting_function_is_handed_it_too(tmp_path: Path) -> None:
    told: list[Any] = []

    def text(row: Mapping[str, Any]) -> str:
        told.append(row["when"])
        return "hello"

    when = datetime.date(2024, 1, 1)
    turnwise.SFTTrainer(
        model(), args=turnwise.SFTConfig(output_dir=str(tmp_path), report_to="none", max_steps=1),
        train_dataset=[{"when": when}], processing_class=tiny_tokenizer(), formatting_func=text,
    )  # fmt: skip
    assert told == [when]


def test_a_prompt_that_a_reply_would_go_on_with_is_refused() -> None:
    ends = {"prompt": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Sure:"}]}
    with pytest.raises(TaskError, match="rows, row 7: the prompt ends with an assistant's message"):
        check_prompt(ends, "rows", 7)
    for prompt in ("Sure:", [], ends["prompt"][:1], None):
        check_prompt({"prompt": prompt}, "rows", 0)


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
