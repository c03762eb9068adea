"""One process or several: the same update, the same checkpoints, and nobody hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.learn import parallel_cases
from tests.learn.parallel_cases import CASES, MUON, Case, Outcome, alone, lead, outcome, resumed
from tests.learn.processes import together
from tests.support.models import tiny_qwen3
from transformers import AutoModelForCausalLM

from turnwise.config import LoraConfig

WAYS = [("ddp", 2), ("fsdp", 2), ("fsdp", 3)]
READ = {"padding", "tokens"}
"""Metrics that depend on which samples share a micro-batch: one without a token of loss is not read."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(hidden=32).save_pretrained(path)
    return path


def assert_same(found: Outcome, wanted: Outcome) -> None:
    """To 1e-5, where updates move weights by 1e-3."""
    assert (found.step, found.version) == (wanted.step, wanted.version)
    assert found.weights.keys() == wanted.weights.keys()
    for name, value in wanted.weights.items():
        np.testing.assert_allclose(found.weights[name], value, atol=1e-5, rtol=0, err_msg=name)
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - READ:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def everyones(request: pytest.FixtureRequest, model: Path) -> dict[str, Outcome]:
    kind, count = request.param
    first, *others = together(count, lead, kind, parallel_cases.outcomes, model)
    assert others == [None] * (count - 1)
    return dict(first)


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_one_process(name: str, everyones: dict[str, Outcome], model: Path) -> None:
    wanted = outcome(alone(CASES[name], model), CASES[name])
    start = outcome(alone(CASES[name], model), CASES[name], updates=0).weights
    moved = max(float(np.abs(wanted.weights[key] - value).max()) for key, value in start.items())
    assert moved > 5e-4, "what is compared has moved"
    assert_same(everyones[name], wanted)


def test_weights_in_4_bits_are_whole_in_every_process(model: Path) -> None:
    case = parallel_cases.QUANTIZED
    found = together(2, lead, "ddp", parallel_cases.quantized, model)[0]
    assert_same(found, outcome(alone(case, model), case))
    told = together(2, lead, "fsdp", parallel_cases.quantized_and_spread, model)[0]
    assert "fsdp cannot spread weights in 4 bits" in told


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_in_one_process_is_refused_in_all(kind: str, model: Path) -> None:
    refused, no_gradient, moved, after = together(2, lead, kind, parallel_cases.refused_update, model)[0]
    assert refused.startswith("NonFiniteError: the loss is not finite in 1 of ") and "t3" in refused
    assert "call forward_backward before optim_step" in no_gradient
    assert not moved
    assert_same(after, outcome(alone(Case(), model), Case()))


@pytest.mark.parametrize(
    ("kind", "how", "said"),
    [
        ("ddp", "foreign", "MemoryError: there is none left"),
        ("fsdp", "foreign", "MemoryError: there is none left"),
        ("ddp", "ours", "LearnError: this I cannot learn from"),
        ("fsdp", "ours", "LearnError: this I cannot learn from"),
    ],
    ids=["ddp", "fsdp", "ddp, ours", "fsdp, ours"],
)
def test_an_error_in_one_process_is_told_by_the_first_and_ends_the_others(
    kind: str, how: str, said: str, model: Path
) -> None:
    (error, after), *exits = together(3, lead, kind, parallel_cases.failed_update, model, "1", how)
    assert error.startswith("LearnError: ") and f"process 1: {said}" in error
    assert "the processes of this run have ended" in after
    assert exits == [1, 1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_others(kind: str, model: Path) -> None:
    (error, _), *exits = together(3, lead, kind, parallel_cases.failed_update, model, "2", "killed")
    assert error.startswith("LearnError: ")
    assert exits == [1, -9]
    assert together(2, lead, kind, parallel_cases.failed_update, model, "0", "killed") == [-9, 1]


def test_where_the_first_process_is_interrupted_the_others_end(model: Path) -> None:
    assert together(2, lead, "ddp", parallel_cases.interrupted, model) == [1, 1]


def test_a_loss_that_cannot_be_sent_is_refused(model: Path) -> None:
    error, after = together(2, lead, "ddp", parallel_cases.unsendable, model)[0]
    assert error.startswith("LearnError: what all processes are to do cannot be sent to them")
    assert_same(after, outcome(alone(Case(), model), Case()))


KEPT = {
    "adamw": Case(optimizer={"schedule": "linear", "warmup_steps": 1}),
    "muon": Case(lengths=(30,), optimizer=MUON),
    "lora": Case(lora=LoraConfig(r=4, alpha=8)),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(
    kind: str, name: str, model: Path, tmp_path: Path
) -> None:
    case = KEPT[name]
    unbroken = alone(case, model)
    wanted = [outcome(unbroken, case, updates=1) for _ in range(3)]
    found = [
        resumed(alone, model, case, None, tmp_path / "one"),
        together(2, lead, kind, resumed, model, case, tmp_path / "one", tmp_path / "two")[0],
        resumed(alone, model, case, tmp_path / "two", tmp_path / "three"),
    ]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)
    # What several processes write is what one does.
    for end in ("", "-model", "-adapter"):
        one, two = tmp_path / f"one{end}", tmp_path / f"two{end}"
        assert one.exists() == two.exists() == (end != "-adapter" or case.lora is not None)
        assert sorted(path.name for path in one.glob("*")) == sorted(path.name for path in two.glob("*"))
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "two-model", dtype=torch.float32)
    for key, value in exported.state_dict().items():
        if key in wanted[1].weights:
            np.testing.assert_allclose(value.numpy(), wanted[1].weights[key], atol=1e-5, rtol=0)
