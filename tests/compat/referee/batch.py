"""One batch of episodes, as TRL's ``rollout_func`` returns it and as our trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from turnwise.types import (
    Message,
    Reward,
    Sampling,
    Segment,
    StopReason,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

G, GROUPS = 4, 2
LENGTHS = (12, 7, 9, 4, 5, 11, 3, 8)
PROMPTS = (5, 3)
COMPLETION = 12
"""Tokens that the longest may have: what dr_grpo divides by."""

REWARDS: dict[str, list[float | None]] = {
    "first": [0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 3.0, 0.5],
    "second": [0.3, 0.1, None, 0.1, 0.7, 0.2, None, 0.4],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Ragged completions, tool results among them; what is told to the model carries no loss."""

    prompts: list[list[int]]
    completions: list[list[int]]
    own: list[list[int]]
    """1 for each token that the model said."""
    logprobs: list[list[float]]
    """The sampler's; 0 for what was told."""

    def rollout(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``."""
        assert len(prompts) == len(self.prompts)
        return {
            "prompt_ids": self.prompts,
            "completion_ids": self.completions,
            "logprobs": self.logprobs,
            "env_mask": self.own,
        }

    def groups(
        self, weights: Mapping[str, float], rewards: Mapping[str, Sequence[float | None]] = REWARDS
    ) -> list[TrajectoryGroup]:
        """The same siblings, as they would be if Turnwise had played them."""
        made = []
        for g in range(GROUPS):
            siblings = tuple(
                self._trajectory(
                    g, i, {name: Reward(value=rewards[name][i], weight=w) for name, w in weights.items()}
                )
                for i in range(g * G, (g + 1) * G)
            )
            made.append(TrajectoryGroup(id=f"rl/{g}/e/0", env="e", task={}, trajectories=siblings))
        return made

    def _trajectory(self, group: int, index: int, rewards: Mapping[str, Reward]) -> Trajectory:
        turns, told, at = [], list(self.prompts[index]), 0
        for own, run in groupby(self.own[index]):
            ids = self.completions[index][at : at + len(list(run))]
            if own:
                logprobs = self.logprobs[index][at : at + len(ids)]
                turns.append(
                    Turn(
                        message=Message.assistant("said"), context_ids=told, ids=ids,
                        logprobs=logprobs, versions=[0] * len(ids),
                    )
                )  # fmt: skip
                told = []
            else:
                told = told + ids
            at += len(ids)
        assert not told, "an episode ends with the model's own tokens"
        return Trajectory(
            id=f"rl/{group}/e/0/s{index}", group_id=f"rl/{group}/e/0", env="e", task={}, seed=0,
            segments=(Segment(prompt=(Message.user("hi"),), turns=tuple(turns)),), rewards=dict(rewards),
            stop_reason=StopReason.ANSWERED, sampling=Sampling(max_tokens=COMPLETION), policy="engine",
        )  # fmt: skip


def make_batch(model: Any, *, apart: float = 0.0, seed: int = 0) -> Batch:
    """Random tokens, and logprobs of them under ``model``.

    Args:
        model: Whose logprobs.
        apart: How far a sampler's logprobs are from the learner's, in standard deviations of a token's.
        seed: Of the tokens.
    """
    rng = np.random.default_rng(seed)
    prompts, completions, owned, logprobs = [], [], [], []
    for index, length in enumerate(LENGTHS):
        prompt_rng = np.random.default_rng(1000 + index // G)
        prompt = prompt_rng.integers(400, size=PROMPTS[index // G]).tolist()
        completion = rng.integers(400, size=length).tolist()
        own = (rng.random(length) < 0.7).astype(int)
        own[0] = own[-1] = 1
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        scored = logits.log_softmax(-1)[torch.arange(length), torch.tensor(completion)].numpy()
        drawn = scored + apart * rng.normal(size=length)
        prompts.append(prompt)
        completions.append(completion)
        owned.append(own.tolist())
        logprobs.append(np.where(own, drawn, 0.0).tolist())
    return Batch(prompts=prompts, completions=completions, own=owned, logprobs=logprobs)


def named(name: str, rewards: Mapping[str, Sequence[float | None]] = REWARDS) -> Any:
    """A reward function that pays what stands in the table."""

    def function(prompts: list[Any], **_: Any) -> list[float | None]:
        assert len(prompts) == len(rewards[name])
        return list(rewards[name])

    function.__name__ = name
    return function
