"""Optimizers and schedules: how gradients move weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from turnwise.config import OptimizerConfig
from turnwise.errors import LearnError
from turnwise.learn.model import PolicyModel
from turnwise.learn.shards import replicate, spread, whole

RATES = {"adamw": "lr", "muon": "lr_muon"}
"""What the rate of each part is called."""


def schedule(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at update ``step``, counted from 0.

    Warm-up rises linearly, the first update being already a part of it (at 0 it would be lost). Linear and
    cosine then fall from 1 so that they would reach ``floor`` right after the last update.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.floor + (1 - config.floor) * left


class Optimizer:
    """AdamW, or Muon on hidden matrices with AdamW on everything else, under one schedule.

    Weight decay falls on matrices and embeddings, not on norms and biases.
    Source of Muon: https://kellerjordan.github.io/posts/muon/, as in ``torch.optim.Muon``.
    """

    def __init__(self, model: PolicyModel, config: OptimizerConfig, *, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self._names = [name for name, _ in model.trainable]
        self._parameters = [parameter for _, parameter in model.trainable]
        if not self._parameters:
            raise LearnError("the model has no parameters to train")
        hidden = _hidden_matrices(model) if config.kind == "muon" else set()
        matrices = [p for p in self._parameters if id(p) in hidden]
        rest = [p for p in self._parameters if id(p) not in hidden]
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if matrices:
            muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
            self._parts["muon"] = muon, config.muon_lr
        if rest:
            groups = [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                fused=True,
            )
            self._parts["adamw"] = adamw, config.lr

    @property
    def main(self) -> torch.optim.Optimizer:
        """The one that people look into: AdamW, or Muon where it has all weights."""
        return next(reversed(self._parts.values()))[0]

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to ``max_grad_norm``; returns their norm before that."""
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if limit is None else limit)
        return replicate(norm)

    def step(self, step: int) -> dict[str, float]:
        """Move the weights, at update ``step`` of the schedule; returns the learning rates."""
        rates = self.rates(step)
        for name, (optimizer, _) in self._parts.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[RATES[name]]
                if name == "muon":  # It looks at whole matrices.
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad = replicate(parameter.grad)
            optimizer.step()
        return rates

    def rates(self, step: int) -> dict[str, float]:
        """The learning rates of update ``step``."""
        factor = schedule(self.config, step, self.total_steps)
        return {RATES[name]: base * factor for name, (_, base) in self._parts.items()}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: moments and momenta, and the names they belong to."""
        parts = {
            name: {
                number: {key: whole(value) for key, value in moments.items()}
                for number, moments in optimizer.state_dict()["state"].items()
            }
            for name, (optimizer, _) in self._parts.items()
        }
        return {"kind": self.config.kind, "names": self._names, "parts": parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` was taken; settings stay those of the recipe.

        Raises:
            LearnError: It is of another kind of optimizer, or of other parameters.
        """
        if state["kind"] != self.config.kind:
            raise LearnError(
                f"the checkpoint was made with optimizer.kind={state['kind']!r} and the recipe says "
                f"{self.config.kind!r}; restore the recipe, or start a new run"
            )
        if state["names"] != self._names:
            raise LearnError(
                f"the checkpoint trains {_some(state['names'])} and the model {_some(self._names)}; "
                "restore model.name and model.lora, or start a new run"
            )
        for name, (optimizer, _) in self._parts.items():
            groups = optimizer.state_dict()["param_groups"]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            place = replicate if name == "muon" else _as_is
            moments = {
                number: {
                    key: place(spread(value, like=parameters[number])) if value.ndim else value
                    for key, value in moments.items()
                }
                for number, moments in state["parts"][name].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _hidden_matrices(model: PolicyModel) -> set[int]:
    """Ids of the 2-D parameters between the embeddings and the head."""
    outside = {
        id(p) for part in model.module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()
    }
    head = model.causal.get_output_embeddings()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    return {id(p) for _, p in model.trainable if p.ndim == 2 and id(p) not in outside}


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} parameters ({', '.join(names[:2])} …)"
