"""What a loss reads and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) is 5e8: long past every clip, while the exponential of a broken row's ratio would make inf · 0 =
nan."""

Mean = tuple[Tensor, Tensor]
"""Sum and count, to be added up over micro-batches and ranks before they are divided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The N tokens that carry loss, whatever rows they came from.

    A sequence is one sample: a trajectory's segment. A sample is never split over micro-batches, so what is
    computed over a sequence is whole, whatever the packing. Two samples with three and two tokens of loss:

        sequences_N = [0, 0, 0, 1, 1]
    """

    logprobs_N: Tensor
    """Under the weights that are being trained; carries gradients."""
    entropies_N: Tensor
    """Of the present distribution at each token; carry gradients only where those were asked for."""
    likeliest_N: Tensor | None = None
    """Whether each token was the likeliest of that distribution; None where that was not asked for."""
    sampler_logprobs_N: Tensor
    """Of the policy that sampled, as it recorded them."""
    old_logprobs_N: Tensor | None = None
    """Under the learner's weights before the step's first update; None where those are the present ones."""
    advantages_N: Tensor
    weights_N: Tensor
    sequences_N: Tensor
    """Which sequence each token is of: an index below N."""
    fresh_N: Tensor
    """Whether exactly the present weights drew the token: any difference in logprobs is then the
    sampler's."""
    reference_logprobs_N: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss and what to report of it. Add up over micro-batches and ranks; then divide ``means``."""

    loss: Tensor
    means: dict[str, Mean]
    """Name to sum and count."""
    maxima: dict[str, Tensor]
    """-inf is the maximum of nothing, and left out."""


Loss = Callable[[LossInputs], LossOutput]


def log_ratio(logprobs_N: Tensor, other_N: Tensor) -> Tensor:
    """``logprob - other``, kept where its exponential is finite."""
    return (logprobs_N - other_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_sum(values_N: Tensor, sequences_N: Tensor) -> Tensor:
    """For each token the sum over its sequence."""
    # Indices are below N, so N sums are enough, and no size has to be read back from a GPU.
    return torch.zeros_like(values_N).index_add(0, sequences_N, values_N)[sequences_N]


def sequence_mean(values_N: Tensor, sequences_N: Tensor) -> Tensor:
    """For each token the mean over its sequence's tokens with loss."""
    return sequence_sum(values_N, sequences_N) / sequence_sum(torch.ones_like(values_N), sequences_N)


def mean(values_N: Tensor) -> Mean:
    """Sum and count."""
    values_N = values_N.detach().float()
    return values_N.sum(), torch.full_like(values_N.sum(), len(values_N))
