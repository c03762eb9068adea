"""Promise 8: one step's gradient is the same for one micro-batch or eight, packed or padded, in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.support.models import tiny_qwen3
from tests.support.samples import random_sample
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, CorrectionKind, LossName, OptimizerConfig, RlConfig
from turnwise.learn.learner import Learner
from turnwise.learn.losses import make_loss
from turnwise.learn.model import PolicyModel
from turnwise.learn.normalise import weigh
from turnwise.types import Sample

LENGTHS = (31, 25, 12, 20, 9, 20, 7, 16)
ONE = BatchConfig(micro_tokens=4096)


def learner(rows: BatchConfig = ONE, *, together: bool = True) -> Learner:
    model = PolicyModel(tiny_qwen3(hidden=32))
    model.packs = model.packs and together
    return Learner(model, tiny_tokenizer(), optimizer=OptimizerConfig(), rows=rows, total_steps=1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Eight rows of six trajectories: two have two segments each. Their logprobs lie about the model's."""
    rng = np.random.default_rng(7)
    names = ["a", "a", "b", "c", "d", "d", "e", "f"]
    rows = [random_sample(rng, n, id=f"g/{name}", replies=3) for n, name in zip(LENGTHS, names, strict=True)]
    scored = learner().logprobs(rows)

    def about(logprobs: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], scale: float) -> Any:
        noise = rng.normal(0, scale, size=len(mask))
        return np.where(mask, logprobs + noise, 0).astype(np.float32)

    return [
        replace(
            row,
            logprobs_T=about(logprobs, row.loss_mask_T, 0.2),
            old_logprobs_T=about(logprobs, row.loss_mask_T, 0.1),
            reference_logprobs_T=about(logprobs, row.loss_mask_T, 0.3),
        )
        for row, logprobs in zip(rows, scored, strict=True)
    ]


def reversed_rows(samples: list[Sample]) -> list[Sample]:
    return samples[::-1]


def shuffled_rows(samples: list[Sample]) -> list[Sample]:
    return [samples[i] for i in np.random.default_rng(1).permutation(len(samples))]


LAYOUTS: dict[str, tuple[Callable[[], Learner], int]] = {
    "eight micro-batches": (lambda: learner(BatchConfig(micro_tokens=8)), 8),
    "packed": (lambda: learner(BatchConfig(micro_tokens=128, row_tokens=64)), 2),
    "packed in one row": (lambda: learner(BatchConfig(micro_tokens=256, row_tokens=256)), 1),
    "padded": (lambda: learner(together=False), 1),
    "padded, in small chunks": (
        lambda: learner(BatchConfig(micro_tokens=64, logprob_chunk=3), together=False),
        3,
    ),
}
"""Each with the micro-batches that it makes of the samples."""

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"loss": name} for name in get_args(LossName)},
    "gspo within its clips": {"loss": "gspo", "clip_low": 0.5, "clip_high": 0.5},
    "luspo within its clips": {"loss": "luspo", "clip_low": 0.5, "clip_high": 0.5},
    "dppo that cuts": {"loss": "dppo", "clip_low": 1e-4, "clip_high": 1e-4},
    "cispo that caps": {"loss": "cispo", "clip_high": 0.05},
    **{kind: {"correction": {"kind": kind, "low": 0.95, "high": 1.1}} for kind in get_args(CorrectionKind)},
    "sequence_mask": {"correction": {"kind": "sequence_mask", "low": 0.7, "high": 2.0}},
    "kl": {"kl": 0.1},
    "entropy": {"entropy": 0.1},
    "everything": {
        "loss": "gspo", "clip_low": 0.1, "clip_high": 0.1, "kl": 0.1, "kl_estimator": "k2",
        "entropy": 0.1, "correction": {"kind": "sequence_truncate"},
    },
}  # fmt: skip
NORMALISE = {"dr_grpo": "constant", "luspo": "sum", "luspo within its clips": "sum", "gspo": "sequence"}


def gradients(of: Learner, samples: list[Sample], name: str) -> tuple[dict[str, float], dict[str, Any]]:
    settings = {"normalise": NORMALISE.get(name, "token"), **SETTINGS[name]}
    config = RlConfig.model_validate({"steps": 1, "groups": {"e": 1}, **settings})
    constant = 64 if config.normalise == "constant" else None
    metrics = of.forward_backward(
        weigh(samples, config.normalise, max_tokens=constant),
        make_loss(config),
        entropy_gradient=config.entropy > 0,
    )
    return metrics, {name: p.grad.clone() for name, p in of.model.trainable if p.grad is not None}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_steps_gradient_is_the_same_however_it_is_cut(name: str, samples: list[Sample]) -> None:
    wanted_metrics, wanted = gradients(learner(), samples, name)
    assert len(learner()._pack(samples)) == 1
    if name.endswith("mask") or name == "icepop":
        assert 0 < wanted_metrics["correction_rejected"] < 1
    size = max(float(gradient.norm()) for gradient in wanted.values())
    assert size > 1e-3, "what is compared is not all but zero"
    # One way of cutting has every order, all ways have one.
    ways = [(layout, shuffled_rows) for layout in LAYOUTS] + [("packed", reversed_rows)]
    for layout, order in ways:
        make, batches = LAYOUTS[layout]
        cut = make()
        rows = order(samples)
        assert len(cut._pack(rows)) == batches, layout
        metrics, found = gradients(cut, rows, name)
        assert found.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            apart = float((found[parameter] - gradient).norm())
            assert apart <= 1e-5 * float(gradient.norm()) + 1e-8 * size, f"{layout}: {parameter}"
        for key in wanted_metrics.keys() - {"padding"}:
            assert metrics[key] == pytest.approx(wanted_metrics[key], rel=1e-4, abs=1e-6), f"{layout}: {key}"


def test_a_sequence_is_a_segment(samples: list[Sample]) -> None:
    """Two segments of one trajectory have a ratio each: they may be in different micro-batches."""
    cut = learner(BatchConfig(micro_tokens=256, row_tokens=256))
    (batch,) = cut._pack(samples)
    inputs = cut._inputs(batch)
    owners = [one.trajectory_id for one in batch.samples]
    counts = [int(one.loss_mask_T.sum()) for one in batch.samples]
    assert len(set(owners)) == 6 and torch.bincount(inputs.sequences_N).tolist() == counts


def test_rows_without_a_token_of_loss_do_not_shift_the_others(samples: list[Sample]) -> None:
    bare = replace(samples[0], loss_mask_T=np.zeros(LENGTHS[0], dtype=np.bool_), trajectory_id="g/bare")
    _, wanted = gradients(learner(), samples, "gspo within its clips")
    _, found = gradients(learner(), [bare, *samples], "gspo within its clips")
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    cut = learner(BatchConfig(micro_tokens=256, row_tokens=256))
    (batch,) = cut._pack([bare, *samples])
    sequences = cut._inputs(batch).sequences_N
    assert int(sequences.max()) == len(samples) - 1


def test_a_loss_with_another_denominator_would_be_seen(samples: list[Sample]) -> None:
    """The comparison can fail: a mean over each micro-batch, as others take it, gives another gradient."""
    loss = make_loss(RlConfig.model_validate({"steps": 1, "groups": {"e": 1}}))

    def local(inputs: Any) -> Any:
        return loss(replace(inputs, weights_N=torch.full_like(inputs.weights_N, 1 / len(inputs.weights_N))))

    norms = []
    for rows in (ONE, BatchConfig(micro_tokens=8)):
        of = learner(rows)
        of.forward_backward(samples, local)
        norms.append(float(next(p.grad for _, p in of.model.trainable if p.grad is not None).norm()))
    assert norms[1] > 2 * norms[0]
