"""What comes when follows from the seed alone: lessons of SFT, tasks of every stage."""

from __future__ import annotations

from collections import Counter

import pytest

from turnwise.envs.registry import make
from turnwise.errors import TaskError
from turnwise.pipeline.sft import LessonOrder
from turnwise.pipeline.tasks import TaskStream, routed


def lessons(updates: int, **options: int) -> list[tuple[str, int]]:
    order = LessonOrder({"a": 7, "b": 3}, {"a": 2, "b": 4}, options.get("seed", 0))
    return [one for number in range(updates) for one in order.update(number)]


def test_each_pass_over_the_lessons_is_a_permutation() -> None:
    taken = [i for env, i in lessons(21) if env == "a"]
    passes = [taken[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    # b's batch is longer than a pass of it.
    assert Counter(i for env, i in lessons(3) if env == "b") == {0: 4, 1: 4, 2: 4}


def test_lessons_need_no_history() -> None:
    fresh = LessonOrder({"a": 7, "b": 3}, {"a": 2, "b": 4}, 0)
    assert list(fresh.update(17)) == lessons(18)[-6:]
    assert lessons(18, seed=1) != lessons(18)


def test_tasks_come_in_permutations_and_stages_in_their_own() -> None:
    rows = [{"n": n} for n in range(10)]
    stream = TaskStream("a", "train", rows, seed=0, salt="rl")
    first, second = ([stream[i]["n"] for i in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [stream[i]["n"] for i in range(10)] == first, "going back is the same again"
    other = TaskStream("a", "train", rows, seed=0, salt="collect")
    assert [other[i]["n"] for i in range(10)] != first
    assert len({stream.seed(i) for i in range(100)}) == 100 and stream.seed(3) != other.seed(3)


def test_no_tasks() -> None:
    with pytest.raises(TaskError, match="environment a has no tasks in split 'test'"):
        TaskStream("a", "test", [], seed=0)


def test_rows_go_to_the_environment_that_they_name() -> None:
    from tests.pipeline.envs import Plain, Wrong

    specs = {
        "wrong": make(Wrong, name="wrong", args={"size": 10, "environment": "plain"}),
        "plain": make(Plain, name="plain"),
    }
    found = routed(specs, "train", known=specs)
    assert [row["n"] for row in found["plain"]] == [3, 8], "the empty default row gives way"
    assert [row["n"] for row in found["wrong"]] == [0, 1, 2, 4, 5, 6, 7, 9]
    assert routed({"plain": specs["plain"]}, "train", known=specs) == {"plain": [{}]}
