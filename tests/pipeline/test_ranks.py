"""What a recipe says of several processes, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, OptimizerConfig, ParallelConfig
from turnwise.errors import LearnError, RecipeError
from turnwise.learn.learner import Learner
from turnwise.pipeline.context import Run
from turnwise.pipeline.learning import open_learner
from turnwise.pipeline.ranks import joined
from turnwise.pipeline.resume import check_unchanged
from turnwise.recipe import load_recipe
from turnwise.store import RunDir
from turnwise.view.events import Event, Note

TRAINING = "name: r\nenvironments: {catch: {}}\nmodel: {name: MODEL}\nrl: {steps: 1, groups: {catch: 1}}\n"


def test_alone_there_is_nothing_to_join() -> None:
    with joined(ParallelConfig(kind="fsdp")) as ranks:
        assert ranks is None


def test_several_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(LearnError, match=r"model.device is cuda:1, for 2 processes: write cuda;"),
        joined(ParallelConfig(), "cuda:1"),
    ):
        pass


def test_one_process_trains_as_ever_and_says_that_nothing_is_sharded(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(TRAINING.replace("MODEL", str(tmp_path / "model")) + "parallel: {kind: fsdp}\n")
    told: list[Event] = []
    run = Run(load_recipe(path), RunDir(tmp_path / "run"), told.append)
    learner = open_learner(
        run, run.model_before("rl"), optimizer=OptimizerConfig(), rows=BatchConfig(), total_steps=1
    )
    assert type(learner) is Learner and not learner.model.sharded
    assert [one.text for one in told if isinstance(one, Note)] == [
        "parallel.kind does nothing in one process: start several with torchrun"
    ]


def test_where_nothing_is_trained_there_is_nothing_to_share(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\nenvironments: {catch: {}}\nmodel: {name: m}\ncollect: {episodes: {catch: 1}}\n"
        "parallel: {kind: fsdp}\n"
    )
    with pytest.raises(RecipeError, match=r"parallel\.kind: does nothing without sft or rl"):
        load_recipe(path)


def test_a_run_may_go_on_in_another_way(tmp_path: Path) -> None:
    path, directory = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    for kind in ("ddp", "fsdp"):
        path.write_text(TRAINING.replace("MODEL", "m") + f"parallel: {{kind: {kind}}}\n")
        with directory.lock():
            check_unchanged(directory, load_recipe(path), allowed=False)
