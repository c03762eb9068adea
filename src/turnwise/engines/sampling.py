"""Drawing tokens: a batch of logits and each row's own settings in, ids with their log-probabilities out.

A draw inverts the cumulative distribution at a uniform number that depends on (seed, index of the token)
alone, so that a request's tokens do not depend on what else is in the batch. Vocabulary-wide passes are what
sampling costs: they are kept few, and the inversion looks at one block of the vocabulary (a whole ``cumsum``
is the slowest of them, and ``torch.multinomial`` ten times slower than that).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 64
"""Tokens of the vocabulary that are summed up before the inversion looks inside."""


@dataclass(slots=True, kw_only=True)
class Draws:
    """How each of R rows is to be drawn; arrays ``[R]``."""

    temperature: npt.NDArray[np.float32]
    """0 is greedy."""
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seed: npt.NDArray[np.uint64]
    index: npt.NDArray[np.int64]
    """Which token of its reply each row draws."""


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What was drawn, on the host; one value for each row."""

    ids: list[int]
    logprobs: list[float]
    """Under the softmax at the row's temperature, before anything was cut; at temperature 0, of the softmax
    at 1."""
    kept_mass: list[float] | None
    """Probability that top-k, top-p and min-p left; None where no row cuts."""


def uniforms(seed: npt.NDArray[np.uint64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for each (seed, index): SplitMix64's finaliser over both.

    Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014. 23 bits are used: a float32
    product with the total mass then stays below it.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    x = _mix(seed + golden) + (index.astype(np.uint64) + np.uint64(1)) * golden
    bits = _mix(x) >> np.uint64(41)
    return bits.astype(np.float32) * np.float32(2.0**-23)


def draw(logits: Tensor, draws: Draws) -> Drawn:
    """Draw one token for each row of ``logits`` ``[R, vocabulary]``."""
    temperature = draws.temperature
    greedy = temperature == 0
    if (temperature != 1).any():
        divisor = torch.from_numpy(np.where(greedy, np.float32(1), temperature)).to(logits.device)
        logits = logits.float() / divisor[:, None]
    elif logits.dtype != torch.float32:
        logits = logits.float()
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    if blocks * BLOCK != vocabulary:
        logits = torch.nn.functional.pad(logits, (0, blocks * BLOCK - vocabulary), value=float("-inf"))
    blocked = logits.view(rows, blocks, BLOCK)
    highest = blocked.amax(-1)
    top = highest.amax(-1, keepdim=True)
    mass = (blocked - top[..., None]).exp_()
    block_mass = mass.sum(-1)
    total = block_mass.sum(-1)

    kept = None
    if _cuts(draws):
        mass, kept = _cut(mass.view(rows, -1), total, draws)
        mass = mass.view(rows, blocks, BLOCK)
        block_mass = mass.sum(-1)
    if greedy.all():
        ids = _first_maximum(blocked, highest)
    else:
        number = torch.from_numpy(uniforms(draws.seed, draws.index)).to(logits.device)
        ids = _invert(mass, block_mass, number)
        if greedy.any():
            ids = torch.where(
                torch.from_numpy(greedy).to(logits.device), _first_maximum(blocked, highest), ids
            )
    logprobs = logits.gather(1, ids[:, None])[:, 0] - top[:, 0] - total.log()
    # One transfer: ids below 2^24 are exact in float32, larger vocabularies do not exist.
    columns = [ids.float(), logprobs] if kept is None else [ids.float(), logprobs, kept]
    host = torch.stack(columns).tolist()
    return Drawn(ids=[int(i) for i in host[0]], logprobs=host[1], kept_mass=None if kept is None else host[2])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _cuts(draws: Draws) -> bool:
    return bool((draws.top_k > 0).any() or (draws.top_p < 1).any() or (draws.min_p > 0).any())


def _first_maximum(blocked: Tensor, highest: Tensor) -> Tensor:
    """``argmax`` over the vocabulary, by way of the blocks' maxima; ties go to the lowest id."""
    block = highest.argmax(-1, keepdim=True)
    inside = blocked.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].argmax(-1)
    return block[:, 0] * BLOCK + inside


def _invert(mass: Tensor, block_mass: Tensor, number: Tensor) -> Tensor:
    """The first token whose cumulative mass exceeds ``number`` × total: never one without mass.

    Rows that are not finite find some token, and a logprob that says so.
    """
    cumulative = block_mass.cumsum(-1)
    target = (number * cumulative[:, -1])[:, None]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = mass.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1)
    # Sums in two orders differ in the last bit: the target is kept below what the block really holds.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0**-23))
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1))[:, 0]


def _cut(mass: Tensor, total: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
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
    return torch.zeros_like(mass).scatter_(1, order, left), left.sum(-1) / total
