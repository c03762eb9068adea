"""Several processes, of whose rows only some show images: the vision tower is everyone's all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.learn.parallel_cases import EVERYTHING
from tests.learn.processes import together
from tests.learn.test_vision import SAMPLES
from tests.support.tokenizers import tiny_tokenizer
from tests.support.vision import VlFamily, vl_model, vl_renderer

from turnwise import images
from turnwise.config import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from turnwise.learn.learner import Learner
from turnwise.learn.model import load_model
from turnwise.learn.normalise import weigh
from turnwise.learn.worker import Opening, open_everywhere
from turnwise.pipeline.ranks import joined
from turnwise.types import Sample

ONE, _, WORDS, *_ = SAMPLES
ROWS: dict[str, list[Sample]] = {
    "one of four": [ONE, *(replace(WORDS, trajectory_id=f"words {i}") for i in range(3))],
    "one alone": [ONE],
    "none": [replace(WORDS, trajectory_id=f"words {i}") for i in range(3)],
}


def updated(learner: Learner) -> dict[str, tuple[dict[str, float], list[Any], dict[str, Any]]]:
    """Of each set of rows, after one another: metrics, logprobs and weights."""
    found = {}
    for name, rows in ROWS.items():
        samples = learner.with_reference(weigh(rows, "sequence"))
        metrics = learner.forward_backward(samples, EVERYTHING, entropy_gradient=True) | learner.optim_step()
        weights = {name: tensor.detach().numpy().copy() for name, tensor in learner.publish().tensors()}
        found[name] = metrics, learner.logprobs(samples), weights
    return found


def lead(kind: str, opening: Opening, work: Callable[[Learner], Any]) -> Any:
    with joined(ParallelConfig.model_validate({"kind": kind, "timeout": 60})) as ranks:
        assert ranks is not None
        if not ranks.first:
            return None
        return work(open_everywhere(ranks, opening, tokenizer=tiny_tokenizer()))


@pytest.mark.parametrize(
    ("kind", "family"), [("ddp", "qwen3_vl"), ("fsdp", "qwen3_vl"), ("fsdp", "qwen2_5_vl")]
)
def test_updates_are_those_of_one_process(kind: str, family: VlFamily, tmp_path: Path) -> None:
    vl_model(family).save_pretrained(tmp_path / "model")
    folder = images.ImageFolder(tmp_path / "images")
    folder.keep(ONE.images)
    opening = Opening(
        model=ModelConfig(name=str(tmp_path / "model")),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        rows=BatchConfig(micro_tokens=60),
        total_steps=5,
        seed=3,
        reference=True,
        vision=vl_renderer().vision,
        images=tmp_path / "images",
    )
    model = load_model(opening.model, device="cpu", seed=3, vision=opening.vision)
    model.keep_reference()
    alone = updated(
        Learner(
            model, tiny_tokenizer(), optimizer=opening.optimizer, rows=opening.rows, total_steps=5, seed=3
        )
    )
    found, other = together(2, lead, kind, opening, updated)
    assert other is None
    for name, (metrics, logprobs, weights) in alone.items():
        assert found[name][0] == pytest.approx(metrics, rel=1e-4, abs=1e-6), name
        for ours, theirs in zip(found[name][1], logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        for key, value in weights.items():
            np.testing.assert_allclose(
                found[name][2][key], value, atol=1e-5, rtol=0, err_msg=f"{name}: {key}"
            )
