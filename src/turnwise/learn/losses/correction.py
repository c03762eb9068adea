"""Sampler correction: weights for tokens that were not drawn by the policy that the learner believes in.

The sampler's probabilities are never quite the learner's: other kernels, another precision, weights of an
earlier version, a distribution cut by top-p. With a correction the loss compares the present weights with
the learner's own before the step (the old policy), and ``r = exp(old - sampler)`` accounts for the rest:

    ignore              1
    tis                 clip(r, low, high)
    icepop              r if low ≤ r ≤ high, else 0
    sequence_truncate   clip(R, low, high)                     R = Π r over the token's sequence
    sequence_mask       R if low ≤ R ≤ high, else 0
    geometric_mask      1 if low ≤ exp(mean log r) ≤ high, else 0

The weights carry no gradient and multiply the policy term. What is rejected stays in the denominator, which
was fixed over the whole step: an update of which half is rejected is half as large.

Sources: tis: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al. 2025).
icepop: Every Step Evolves (Ring-1T), arXiv:2510.18855. The sequence's: When Speed Kills Stability (Liu et
al. 2025). Three policies in place of two: Batch size-invariance for policy optimization, arXiv:2110.00641.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from turnwise.config import CorrectionKind
from turnwise.learn.losses.base import MAX_LOG_RATIO, sequence_mean, sequence_sum

Correct = Callable[[Tensor, Tensor, float, float], Tensor]
"""From ``log r`` and the sequences, both ``[N]``, and the bounds to weights ``[N]``."""


def ignore(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """1: tokens are taken as if the old policy had drawn them."""
    return torch.ones_like(log_r_N)


def tis(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """Truncated importance sampling: ``clip(r, low, high)``."""
    return log_r_N.exp().clamp(low, high)


def icepop(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """``r`` within the bounds, 0 outside: a token that the two disagree on is left out."""
    return _within(log_r_N.exp(), low, high)


def sequence_truncate(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """`tis` of the whole sequence's importance weight."""
    return _product(log_r_N, sequences_N).clamp(low, high)


def sequence_mask(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """`icepop` of the whole sequence's importance weight."""
    return _within(_product(log_r_N, sequences_N), low, high)


def geometric_mask(log_r_N: Tensor, sequences_N: Tensor, low: float, high: float) -> Tensor:
    """1 where the geometric mean of the sequence's ratios is within the bounds, 0 elsewhere.

    Unlike the product, the mean does not run away with length.
    """
    ratio_N = sequence_mean(log_r_N, sequences_N).exp()
    return ((ratio_N >= low) & (ratio_N <= high)).to(log_r_N.dtype)


CORRECTIONS: dict[CorrectionKind, Correct] = {
    "ignore": ignore,
    "tis": tis,
    "icepop": icepop,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
    "geometric_mask": geometric_mask,
}


def _product(log_r_N: Tensor, sequences_N: Tensor) -> Tensor:
    return sequence_sum(log_r_N, sequences_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _within(ratio_N: Tensor, low: float, high: float) -> Tensor:
    return ratio_N * ((ratio_N >= low) & (ratio_N <= high))
