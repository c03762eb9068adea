"""Drawing tokens: a batch of logits and each row's own settings in, ids with their log-probabilities out.

A draw inverts the cumulative distribution at a uniform number that depends on (seed, index of the token)
alone, so that a request's tokens do not depend on what else is in the batch. ``cumsum`` and ``searchsorted``
do it some ten times faster than ``torch.multinomial``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


@dataclass(slots=True, kw_only=True)
class Draws:
    """How each of R rows is to be drawn; arrays ``[R]``. Made once for a batch that stays together."""

    temperature: npt.NDArray[np.float32]
    """0 is greedy."""
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    key: npt.NDArray[np.uint64]
    """`key_of` each row's seed."""
    greedy: npt.NDArray[np.bool_] = field(init=False)
    any_greedy: bool = field(init=False)
    all_greedy: bool = field(init=False)
    any_cut: bool = field(init=False)
    divisor: npt.NDArray[np.float32] | None = field(init=False)
    """What logits are divided by; None where that is 1 for all."""

    def __post_init__(self) -> None:
        self.greedy = self.temperature == 0
        self.any_greedy, self.all_greedy = bool(self.greedy.any()), bool(self.greedy.all())
        self.any_cut = bool(((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)).any())
        divisor = np.where(self.greedy, np.float32(1), self.temperature)
        self.divisor = divisor if (divisor != 1).any() else None


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What was drawn, on the host; one value for each row."""

    ids: list[int]
    logprobs: list[float]
    """Under the softmax at the row's temperature, before anything was cut; at temperature 0, of the softmax
    at 1."""
    kept_mass: list[float] | None
    """Probability that top-k, top-p and min-p left; None where no row cuts."""


def key_of(seed: int) -> int:
    """64 well-mixed bits of any integer."""
    return _mix((seed + _GOLDEN) & _MASK)


def uniforms(key: npt.NDArray[np.uint64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for each (key, index): SplitMix64 started at the key, jumped to the index.

    Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014. 23 bits are used: a float32
    product with the total mass then stays below it.
    """
    x = key + index.astype(np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    bits = (x ^ (x >> np.uint64(31))) >> np.uint64(41)
    numbers: npt.NDArray[np.float32] = bits.astype(np.float32) * np.float32(2.0**-23)
    return numbers


def draw(logits: Tensor, draws: Draws, index: npt.NDArray[np.int64]) -> Drawn:
    """Draw one token for each row.

    Args:
        logits: ``[R, vocabulary]``. Rows that are not finite get some token, and a logprob that is nan.
        draws: How to draw.
        index: ``[R]``: which token of its reply each row draws.
    """
    if draws.divisor is not None:
        logits = logits.float() / _on(logits, draws.divisor)[:, None]
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    mass = None if draws.all_greedy and not draws.any_cut else logprobs.exp()
    kept = None
    if draws.any_cut:
        assert mass is not None
        mass, kept = _cut(mass, draws)
    if draws.all_greedy:
        ids = logits.argmax(-1, keepdim=True)
    else:
        assert mass is not None
        ids = _invert(mass, _on(logits, uniforms(draws.key, index)))
        if draws.any_greedy:
            ids = torch.where(_on(logits, draws.greedy)[:, None], logits.argmax(-1, keepdim=True), ids)
    return Drawn(
        ids=ids[:, 0].tolist(),
        logprobs=logprobs.gather(1, ids)[:, 0].tolist(),
        kept_mass=None if kept is None else kept.tolist(),
    )


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _on(logits: Tensor, array: npt.NDArray[np.float32] | npt.NDArray[np.bool_]) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if logits.device.type == "cpu" else tensor.to(logits.device, non_blocking=True)


def _invert(mass: Tensor, number: Tensor) -> Tensor:
    """``[R, 1]``: the first token whose cumulative mass exceeds ``number`` × total; never one without
    mass.
    """
    cumulative = mass.cumsum(-1)
    target = number[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=mass.shape[-1] - 1)


def _cut(mass: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Zero what top-k, then top-p (of what top-k left), then min-p cut; and the share of the mass that is
    left.

    Order and definitions are those of transformers' logits warpers. The most likely token always stays.
    """
    device = mass.device
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(mass.shape[-1], device=device)
    top_k = torch.from_numpy(np.where(draws.top_k > 0, draws.top_k, mass.shape[-1])).to(device)
    keep = rank < top_k[:, None]
    left = torch.where(keep, ordered, 0.0)
    before = left.cumsum(-1, dtype=torch.float64) - left
    top_p = torch.from_numpy(draws.top_p).to(device)[:, None]
    # top_p = 1 keeps all, rounding or not.
    keep &= (before < top_p * left.sum(-1, keepdim=True, dtype=torch.float64)) | (top_p >= 1)
    min_p = torch.from_numpy(draws.min_p).to(device)[:, None]
    keep &= ordered >= min_p * ordered[:, :1]
    keep[:, 0] = True
    left = torch.where(keep, ordered, 0.0)
    return torch.zeros_like(mass).scatter_(1, order, left), left.sum(-1)
