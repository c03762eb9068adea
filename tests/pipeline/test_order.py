"""What comes when follows from the seed alone: lessons of SFT, tasks of every stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.end_to_end.tiny import recipe

from turnwise.envs.registry import make
from turnwise.errors import TaskError
from turnwise.pipeline.context import Run
from turnwise.pipeline.evaluate import _orders
from turnwise.pipeline.sft import LessonOrder
from turnwise.pipeline.tasks import TaskStream, routed
from turnwise.store import RunDir


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


def test_every_model_is_evaluated_on_the_same_episodes_and_no_two_of_a_task_are_one(tmp_path: Path) -> None:
    one_game = {"environments.chain_sum": None, "collect": None, "sft": None, "rl": None}
    run = Run(recipe(one_game | {"evaluate.tasks": {"catch": 12}}), RunDir(tmp_path), lambda event: None)
    config = run.recipe.evaluate
    assert config is not None
    sft, rl = (list(_orders(run, config, stage, range(3))) for stage in ("sft", "rl"))
    played = [(one.env, one.task, one.seed, one.sibling) for one in sft]
    assert played == [(one.env, one.task, one.seed, one.sibling) for one in rl]
    assert len({(env, seed, sibling) for env, _, seed, sibling in played}) == len(played) == 3 * 12
    assert len({(env, seed) for env, _, seed, _ in played}) == 12, "siblings start alike"
    assert all(task in run.rows("test")[env] for env, task, _, _ in played)


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
