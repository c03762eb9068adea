"""What only a long run would show: what is held in memory, where the schedule ends, half-made lessons."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from tests.end_to_end.tiny import play, recipe
from tests.pipeline.test_updates import episode, group

from turnwise.config import BatchConfig, OptimizerConfig, RlConfig
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.learn.model import PolicyModel
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given
from turnwise.pipeline.rl import _learn
from turnwise.pipeline.source import GroupSource
from turnwise.store import RunDir, StepRecord
from turnwise.types import Kept, StopReason


def test_what_the_checkpoint_has_learned_from_is_not_read_again(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    with directory.lock():
        for n in range(6):
            for k in range(2):
                directory.append("rl", episode(f"rl/catch/{n}", k, 1.0, env="catch"))
        for step in range(1, 5):  # Groups 0 to 3 are used, 0 and 1 before the checkpoint.
            ids = tuple(f"rl/catch/{step - 1}/s{k}" for k in range(2))
            directory.append_step(StepRecord(stage="rl", step=step, trajectory_ids=ids))
        with directory.checkpoint("rl", 2):
            pass
    run = Run(recipe({"rl.groups": {"catch": 1}, "rl.minibatches": 1}), directory, lambda _: None)
    config = run.recipe.rl
    assert config is not None
    source = GroupSource(run, "rl", config, {"catch": ""})
    assert set(source._played) == {f"rl/catch/{n}" for n in range(2, 6)}

    steps = list(directory.steps("rl"))
    for record in steps:
        source.spend(record.trajectory_ids)
    (again,) = source.recorded(steps[2].trajectory_ids)
    assert [one.id for one in again.trajectories] == ["rl/catch/2/s0", "rl/catch/2/s1"]
    # Of what no step has used, the stage plays on with what it would play itself: these have other tasks.
    assert [source("catch", n) is None for n in range(7)] == [True] * 6 + [False]
    assert len(source.finished("rl/catch/4")) == 2
    assert source.finished("rl/catch/4") == (), "whoever was given them holds them now"


def test_finished_siblings_have_the_row_with_what_it_keeps_in_memory(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    when = Kept({"type": "python", "class": "datetime.date", "row": 0, "column": "when"}, date(2024, 1, 1))
    stored = replace(episode("rl/catch/0", 0, 1.0, env="catch"), task={"when": when}, sampling=None)
    changes = recipe({"rl.groups": {"catch": 1}, "rl.minibatches": 1})
    run = Run(changes, directory, lambda _: None, Given(tasks={"train": {"catch": [{"when": when}]}}))
    stored = replace(stored, seed=run.tasks("catch", "train", "rl").seed(0), harness="")
    with directory.lock():
        directory.append("rl", stored)
    assert run.recipe.rl is not None
    source = GroupSource(run, "rl", run.recipe.rl, {"catch": ""})
    assert not isinstance(source._played["rl/catch/0"][stored.id].task["when"], Kept)
    assert source("catch", 0) is not None
    (one,) = source.finished("rl/catch/0")
    kept = one.task["when"]
    assert isinstance(kept, Kept) and kept.value == date(2024, 1, 1)


def test_groups_of_an_environment_with_a_tilde_in_its_name_are_spent(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    changes = {"environments.a~1b": {"env": "catch"}, "rl.groups": {"a~1b": 1}, "rl.minibatches": 1}
    run = Run(recipe(changes), directory, lambda _: None)
    assert run.recipe.rl is not None
    source = GroupSource(run, "rl", run.recipe.rl, {"a~1b": ""})
    source.spend(["rl/a~1b/0~1/s0"])
    assert source("a~1b", 0) is None and source("a~1b", 1) is not None


def test_a_recorded_step_has_what_was_lost_and_what_was_played_in_its_place(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    first, lost = (episode("rl/catch/0", k, 1.0, env="catch") for k in range(2))
    again = replace(lost, id=f"{lost.id}~1")
    with directory.lock():
        for one in (first, replace(lost, stop_reason=StopReason.ENV_FAILED, rewards={}), again):
            directory.append("rl", one)
    run = Run(recipe({"rl.groups": {"catch": 1}, "rl.minibatches": 1}), directory, lambda _: None)
    assert run.recipe.rl is not None
    source = GroupSource(run, "rl", run.recipe.rl, {"catch": ""})
    (found,) = source.recorded([first.id, lost.id, again.id])
    assert (found.id, [one.id for one in found.scored]) == ("rl/catch/0", [first.id, again.id])
    source.spend([first.id, lost.id, again.id])
    assert source("catch", 0) is None


def test_the_schedule_ends_with_the_stage_also_where_steps_had_nothing_to_learn() -> None:
    from tests.support.models import tiny_qwen3
    from tests.support.tokenizers import tiny_tokenizer

    config = RlConfig(steps=4, groups={"a": 1}, group_size=2)
    learner = Learner(
        PolicyModel(tiny_qwen3(hidden=32, layers=1)),
        tiny_tokenizer(),
        optimizer=OptimizerConfig(lr=1.0e-3, schedule="linear"),
        rows=BatchConfig(),
        total_steps=4,
    )
    rates = []
    for step, rewards in enumerate([(0, 1), (1, 1), (0, 0), (0, 1)], 1):
        rates.append(_learn(learner, [group("a", step, *rewards)], config, 0, step).get("lr"))
    assert rates == [pytest.approx(1.0e-3), None, None, pytest.approx(0.25e-3)]
    learner.publish()
    assert (learner.step, learner.version) == (4, 1)


def test_sft_does_not_learn_from_half_of_what_is_being_collected(tmp_path: Path) -> None:
    made, path = recipe({"rl": None, "evaluate": None}), tmp_path / "tiny"
    play(made, path, stage="init")
    play(made, path, stage="collect")
    (path / "done" / "collect.json").unlink()
    with pytest.raises(RecipeError, match=r"stage 'collect' of run 'tiny' is not finished.*--stage collect"):
        play(made, path, stage="sft")
