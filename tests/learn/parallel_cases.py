"""What a learner is put through, alone and over several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tests.support.samples import random_sample
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from turnwise.errors import LearnError, RecipeError, TurnwiseError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import LossInputs, LossOutput, policy_loss, ppo
from turnwise.learn.model import load_model
from turnwise.learn.normalise import weigh
from turnwise.learn.worker import Opening, open_everywhere
from turnwise.pipeline.ranks import joined
from turnwise.types import Sample

CLIPPED = partial(policy_loss, term=partial(ppo, clip_low=0.2, clip_high=0.28))
EVERYTHING = partial(CLIPPED, kl=0.1, entropy=0.05)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe's choices, and what an update learns from."""

    lengths: tuple[int, ...] = (9, 20, 5, 31, 12, 7, 18)
    bare: int = 0
    """More samples, without a token of loss."""
    micro_tokens: int = 40
    lora: LoraConfig | None = None
    quantization: Literal["nf4"] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    everything: bool = False
    """KL to the reference and an entropy bonus."""
    calls: int = 1
    """Of forward_backward in an update."""

    def opening(self, model: Path) -> Opening:
        return Opening(
            model=ModelConfig(name=str(model), lora=self.lora, quantization=self.quantization),
            optimizer=OptimizerConfig(**{"lr": 1e-3, **self.optimizer}),
            rows=BatchConfig(**{"micro_tokens": self.micro_tokens, **self.rows}),
            total_steps=5,
            seed=3,
            reference=self.everything,
        )


MUON = {"kind": "muon", "muon_lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": None}
CASES = {
    "adamw": Case(),
    "one sample": Case(lengths=(14,)),
    "without loss": Case(lengths=(14, 9), bare=3),
    "clipped": Case(optimizer={"max_grad_norm": 1e-3}),
    "two calls": Case(calls=2),
    "kl and entropy": Case(everything=True),
    "checkpointed, small chunks": Case(rows={"gradient_checkpointing": True, "logprob_chunk": 3}),
    # Of one micro-batch, and not clipped: Muon rounds to bfloat16, which a sum in another order may change.
    "muon": Case(lengths=(30,), optimizer=MUON),
    "lora": Case(lora=LoraConfig(r=4, alpha=8)),
    "lora, dropout, kl and entropy": Case(lora=LoraConfig(r=4, alpha=8, dropout=0.3), everything=True),
}


QUANTIZED = Case(lora=LoraConfig(r=4, alpha=8), quantization="nf4", everything=True)


@dataclass
class Outcome:
    """What came of a case."""

    metrics: list[dict[str, float]]
    weights: dict[str, np.ndarray[Any, Any]]
    logprobs: list[np.ndarray[Any, Any]]
    step: int
    version: int


Open = Callable[[Case, Path], Learner]


def samples_of(case: Case) -> list[Sample]:
    rng = np.random.default_rng(5)
    lengths = (*case.lengths, *[11] * case.bare)
    rows = [random_sample(rng, n, id=f"t{i}") for i, n in enumerate(lengths)]
    for i in range(len(case.lengths), len(rows)):
        rows[i] = replace(rows[i], loss_mask_T=np.zeros_like(rows[i].loss_mask_T))
    return weigh(rows, "sequence")


def update(learner: Learner, case: Case) -> dict[str, float]:
    samples: Sequence[Sample] = samples_of(case)
    loss = CLIPPED
    if case.everything:
        samples, loss = learner.with_reference(samples), EVERYTHING
    metrics: dict[str, float] = {}
    for part in range(case.calls):
        metrics |= learner.forward_backward(
            samples[part :: case.calls], loss, entropy_gradient=case.everything
        )
    return metrics | learner.optim_step()


def weights_of(learner: Learner) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.detach().numpy().copy() for name, tensor in learner.publish().tensors()}


def outcome(learner: Learner, case: Case, updates: int = 2) -> Outcome:
    metrics = [update(learner, case) for _ in range(updates)]
    weights, logprobs = weights_of(learner), learner.logprobs(samples_of(case))
    return Outcome(metrics, weights, logprobs, learner.step, learner.version)


def outcomes(open_learner: Open, model: Path) -> dict[str, Outcome]:
    return {name: outcome(open_learner(case, model), case) for name, case in CASES.items()}


def quantized(open_learner: Open, model: Path) -> Outcome:
    return outcome(open_learner(QUANTIZED, model), QUANTIZED)


def quantized_and_spread(open_learner: Open, model: Path) -> str:
    try:
        open_learner(QUANTIZED, model)
    except RecipeError as refused:
        return str(refused)
    return ""


def alone(case: Case, model: Path) -> Learner:
    opening = case.opening(model)
    policy = load_model(opening.model, device="cpu", seed=opening.seed)
    if opening.reference:
        policy.keep_reference()
    return Learner(
        policy, tiny_tokenizer(), optimizer=opening.optimizer, rows=opening.rows,
        total_steps=opening.total_steps, seed=opening.seed,
    )  # fmt: skip


def lead(kind: str, work: Callable[..., Any], *args: Any, timeout: float = 60) -> Any:
    """In the first process what ``work(open, *args)`` returns; ``open(case, model)`` opens a learner."""
    config = ParallelConfig.model_validate({"kind": kind, "timeout": timeout})
    with joined(config) as ranks:
        assert ranks is not None
        if not ranks.first:
            return None

        def open_learner(case: Case, model: Path) -> Learner:
            return open_everywhere(ranks, case.opening(model), tokenizer=tiny_tokenizer())

        return work(open_learner, *args)


# -- what goes wrong ---------------------------------------------------------------------------------


def error_of(work: Callable[[], Any]) -> str:
    """``NonFiniteError: …``; what is not a `TurnwiseError` is the test's."""
    try:
        work()
    except TurnwiseError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("there was no error")


def refused_update(open_learner: Open, model: Path) -> tuple[str, str, bool, Outcome]:
    """The errors of a loss that is not finite and of the step after it; whether weights moved; updates."""
    case = Case()
    learner = open_learner(case, model)
    before = weights_of(learner)
    samples = samples_of(case)
    samples[3] = replace(samples[3], advantages_T=np.full_like(samples[3].advantages_T, np.nan))
    refused = error_of(lambda: learner.forward_backward(samples, CLIPPED))
    no_gradient = error_of(learner.optim_step)
    moved = any((before[name] != value).any() for name, value in weights_of(learner).items())
    return refused, no_gradient, moved, outcome(learner, case)


def broken(inputs: LossInputs, *, rank: str, how: str) -> LossOutput:
    """A loss that one process cannot compute."""
    if os.environ["RANK"] == rank:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise LearnError("this I cannot learn from") if how == "ours" else MemoryError("there is none left")
    return CLIPPED(inputs)


def failed_update(open_learner: Open, model: Path, rank: str, how: str) -> tuple[str, str]:
    """The error of an update that fails in one process, and that of the next."""
    learner = open_learner(Case(), model)
    loss = partial(broken, rank=rank, how=how)
    return (
        error_of(lambda: learner.forward_backward(samples_of(Case()), loss)),
        error_of(lambda: update(learner, Case())),
    )


def unsendable(open_learner: Open, model: Path) -> tuple[str, Outcome]:
    learner = open_learner(Case(), model)
    error = error_of(lambda: learner.forward_backward(samples_of(Case()), lambda inputs: CLIPPED(inputs)))
    return error, outcome(learner, Case())


def interrupted(open_learner: Open, model: Path) -> None:
    update(open_learner(Case(), model), Case())
    raise KeyboardInterrupt


# -- keeping -----------------------------------------------------------------------------------------


def resumed(open_learner: Open, model: Path, case: Case, start: Path | None, end: Path) -> Outcome:
    """One update from a checkpoint, and another checkpoint; the model beside it, and its adapters."""
    learner = open_learner(case, model)
    if start is not None:
        learner.load(start)
    found = outcome(learner, case, updates=1)
    learner.save(end)
    learner.export(end.with_name(f"{end.name}-model"))
    if case.lora is not None:
        learner.publish().save_adapter(end.with_name(f"{end.name}-adapter"))  # type: ignore[attr-defined]
    return found
