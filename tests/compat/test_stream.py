"""Data sets that show only as they are read how many rows they have: read as steps need them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.compat.trainers import trainer
from turnwise.compat.stream import Stream
from turnwise.errors import TaskError


class StopAfter(TrainerCallback):
    """Ends the training after so many updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.updates


def by_parity(row: Any, number: int) -> tuple[str, Any]:
    return ("odd" if row["n"] % 2 else "even"), {**row, "at": number}


def test_rows_are_read_when_they_are_asked_for_and_kept() -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, int]]:
        for n in count():
            read.append(n)
            yield {"n": n}

    stream = Stream(rows(), by_parity, ["even", "odd"])
    stream.limit = 10
    even, odd = stream.of("even"), stream.of("odd")
    assert read == [] and len(odd) == 10
    assert odd[1] == {"n": 3, "at": 3} and read == [0, 1, 2, 3]
    assert [even[0]["n"], even[1]["n"], odd[0]["n"]] == [0, 2, 1] and read == [0, 1, 2, 3]
    # No more than the plan takes of all is read for one, which has its own again then.
    assert odd[7]["n"] == 5 and read == list(range(10))
    with pytest.raises(IndexError):
        odd[10]
    assert [row["n"] for row in even] == [0, 2, 4, 6, 8] * 2


def test_what_is_wrong_with_a_stream_is_said_with_the_row() -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"n": 0}
        raise OSError("the disk is gone")

    stream = Stream(rows(), by_parity, ["even", "odd"])
    stream.limit = 9
    with pytest.raises(TaskError, match=r"train_dataset, row 1: OSError: the disk is gone"):
        stream.of("odd")[0]
    short = Stream(iter([{"n": 0}]), by_parity, ["even", "odd"])
    short.limit = 9
    assert short.of("even")[8]["n"] == 0
    with pytest.raises(TaskError, match="train_dataset has no rows for the environment 'odd'"):
        short.of("odd")[0]


def test_a_trainer_reads_a_slow_stream_as_its_steps_go_on_its_own_thread(tmp_path: Path) -> None:
    read: list[int] = []
    threads = set()

    def rows() -> Iterator[dict[str, Any]]:
        for n in count():
            threads.add(threading.current_thread())
            time.sleep(0.002)
            read.append(n)
            yield {"prompt": [{"role": "user", "content": f"Say {n}."}], "n": n}

    seen: list[int] = []

    def reward(completions: Any, n: list[int], **_: Any) -> list[float]:
        seen.append(n[0])
        return [float(len(one[0]["content"])) for one in completions]

    began = time.monotonic()
    made = trainer(
        tmp_path, train_dataset=rows(), reward_funcs=reward, max_steps=20_000, shuffle_dataset=False,
        callbacks=[StopAfter(2)],
    )  # fmt: skip
    assert time.monotonic() - began < 20 and len(read) <= 1, "40 000 rows take 80 s"
    made.train()
    assert sorted(seen) == [0, 1, 2, 3], "two prompts a step, in the order of the stream"
    assert len(read) <= 8 and threads == {threading.current_thread()}


def test_a_stream_that_ends_early_begins_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(completions: Any, n: list[int], **_: Any) -> list[float]:
        seen.append(n[0])
        return [float(len(one)) for one in completions]

    made = trainer(
        tmp_path, train_dataset=({"prompt": "Say.", "n": n} for n in range(3)), reward_funcs=reward,
        max_steps=2,
    )  # fmt: skip
    made.train()
    assert sorted(seen) == [0, 0, 1, 2]
    with pytest.raises(TaskError, match="train_dataset has no rows"):
        trainer(tmp_path, train_dataset=iter([]))
