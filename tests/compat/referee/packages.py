"""The two packages under one name each, and how a script is run with either."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tests.compat.referee.scripted import tokenizer

PackageName = Literal["trl", "turnwise"]
PACKAGES: tuple[PackageName, ...] = ("trl", "turnwise")

UNEVALUATED = {
    "eval_loss", "eval_entropy",
    *(f"eval_clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")),
}  # fmt: skip
"""What TRL computes by a further pass over what an evaluation played: a policy gradient's loss, of which the
advantages' mean is 0, and ratios of a policy to itself. We play and score."""
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos",
         "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip
"""Keys whose values depend on the machine."""
ENDED = ("completions/mean_terminated_length", "completions/min_terminated_length",
         "completions/max_terminated_length")  # fmt: skip
INVENTED = {*ENDED, *(f"eval_{key}" for key in ENDED), "tools/failure_frequency"}
"""Where no episode ended by itself, or no tool was called, TRL says 0 and we say None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a script left behind."""

    log: list[dict[str, Any]]
    trainer: Any
    events: list[tuple[str, int]] = field(default_factory=list)
    """Callback events with the global step at which they came."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training, without evaluations and without the summary at the end."""
        return [line for line in self.log if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.log if any(key.startswith("eval_") for key in line)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


def config(package: PackageName, out: Path, /, algorithm: str = "GRPO", **settings: Any) -> Any:
    """A script's ``GRPOConfig`` for two CPU cores."""
    given: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        # The scripts are about what is said; a model that learns would say something else.
        "learning_rate": 1e-12,
        **settings,
    }
    return getattr(importlib.import_module(package), f"{algorithm}Config")(**given)


def trainer(
    package: PackageName, model: Any, out: Path, /, *, rows: Sequence[Mapping[str, Any]] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None, algorithm: str = "GRPO",
    given: Mapping[str, Any] | None = None, tokens: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """A trainer of either package on the same model and rows; ``given`` are its other arguments."""
    from datasets import Dataset

    kinds = {"train_dataset": rows, "eval_dataset": eval_rows}
    data = {name: Dataset.from_list([dict(r) for r in one]) for name, one in kinds.items() if one is not None}
    made = getattr(importlib.import_module(package), f"{algorithm}Trainer")
    return made(
        model=model, args=config(package, out, algorithm, **settings), processing_class=tokens or tokenizer(),
        **data, **(given or {}),
    )  # fmt: skip


def train(package: PackageName, model: Any, out: Path, /, **script: Any) -> Run:
    made = trainer(package, model, out, **script)
    made.train()
    return Run(log=made.state.log_history, trainer=made)


def differences(
    theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]],
    *, apart: Sequence[str] = (), tolerance: float = 1e-5,
) -> list[str]:  # fmt: skip
    """Where two logs tell different things: lines, keys of theirs that ours lacks, values.

    Args:
        theirs: TRL's.
        ours: Ours, which may have more keys.
        apart: Keys whose values differ on purpose; they must be there.
        tolerance: Of numbers, relative and absolute.
    """
    found = [] if len(theirs) == len(ours) else [f"{len(theirs)} lines, ours {len(ours)}"]
    for number, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        for key, value in their.items():
            if key in UNEVALUATED:
                continue
            if key not in our:
                found.append(f"line {number}: no {key}, which is {value}")
            elif key in TIMES or key in apart or (our[key] is None and key in INVENTED and not value):
                continue
            elif not same(value, our[key], tolerance, least=0.0 if key == "learning_rate" else tolerance):
                found.append(f"line {number}: {key} is {value}, ours {our[key]}")
    for number, line in enumerate(ours):
        found += [f"line {number}: {key} is NaN" for key, value in line.items() if isinstance(value, float)
                  and math.isnan(value)]  # fmt: skip
    return found


def agree(*args: Any, **settings: Any) -> None:
    """Fail with every one of the `differences`."""
    found = differences(*args, **settings)
    assert not found, "\n".join(["they differ", *found])


def same(their: Any, our: Any, tolerance: float, least: float) -> bool:
    if isinstance(their, float | int) and isinstance(our, float | int):
        if math.isnan(their):
            return False
        return math.isclose(their, our, rel_tol=tolerance, abs_tol=least)
    return bool(their == our)
