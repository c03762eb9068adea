"""Samples made by hand: random tokens, several replies, weights as given."""

from __future__ import annotations

import numpy as np

from turnwise.types import Sample


def random_sample(
    rng: np.random.Generator,
    length: int,
    *,
    id: str = "t0",
    env: str = "catch",
    vocab: int = 512,
    replies: int = 2,
    temperature: float = 1.0,
    advantage: float | None = None,
) -> Sample:
    """A row of ``length`` tokens of which some stretches carry loss; its sampler's logprobs are made up."""
    mask_T = np.zeros(length, dtype=np.bool_)
    for start in rng.integers(1, length, size=replies):
        mask_T[start : start + 1 + int(rng.integers(4))] = True
    given = rng.normal() if advantage is None else advantage
    return Sample(
        token_ids_T=rng.integers(vocab, size=length).astype(np.int32),
        loss_mask_T=mask_T,
        logprobs_T=np.where(mask_T, rng.normal(-6, 0.3, size=length), 0).astype(np.float32),
        advantages_T=np.where(mask_T, given, 0).astype(np.float32),
        weights_T=np.zeros(length, dtype=np.float32),
        versions_T=np.where(mask_T, 0, -1).astype(np.int32),
        trajectory_id=id,
        group_id=id.rpartition("/")[0],
        env=env,
        temperature=temperature,
    )
