"""Trainers on a tiny random model, and what their callbacks see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer
from turnwise import GRPOConfig, GRPOTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"Say {n}."}], "n": n} for n in range(6)]


def longer(completions: Sequence[Any], **_: Any) -> list[float]:
    """Pays by the character."""
    return [float(len(one[0]["content"])) for one in completions]


def config(path: Path, **changes: Any) -> GRPOConfig:
    """Three updates of two prompts, four episodes each, in a second."""
    settings: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(**settings | changes)


def model(seed: int = 0) -> Any:
    """Thirty thousand parameters."""
    return tiny_qwen3(vocab=len(tiny_tokenizer()), hidden=32, layers=1, seed=seed)


def trainer(
    path: Path, *, of: type[GRPOTrainer] = GRPOTrainer, given: Any = None, **changes: Any
) -> GRPOTrainer:
    """One that pays for length; arguments of the trainer by name, all others of its config."""
    own = {"reward_funcs": longer, "train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    names = (
        *own, "eval_dataset", "callbacks", "optimizers", "quantization_config", "peft_config", "tools",
        "rollout_func", "environment_factory", "reward_processing_classes",
    )  # fmt: skip
    own |= {name: changes.pop(name) for name in names if name in changes}
    return of(given if given is not None else model(), args=config(path, **changes), **own)


def weights(module: Any) -> dict[str, torch.Tensor]:
    """A copy of all of them."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Events(TrainerCallback):
    """Notes each event with the number of updates by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def noted(args: Any, state: Any, control: Any, **more: Any) -> None:
            self.seen.append((name, state.global_step))
            if name == "on_log":
                self.logs.append(dict(more["logs"]))

        return noted

    @property
    def names(self) -> list[str]:
        """The events without their numbers."""
        return [name for name, _ in self.seen]
