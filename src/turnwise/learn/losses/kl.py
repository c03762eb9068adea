"""Estimates of KL(policy ‖ reference) at one sampled token, to be minimised as a part of the loss.

With ``d = logprob - reference`` and ``ρ = exp(logprob - old)``:

    k1         d                     the log-ratio itself
    k2         d² / 2
    k3         exp(-d) - 1 + d       never below zero, of low variance
    k1_ratio   ρ k1
    k3_ratio   ρ k3
    k3_sequence_ratio   s k3, with s = exp(mean of log ρ over the sequence)

What a loss needs of an estimate is its gradient. In expectation over the old policy's tokens, that of
``k1_ratio`` and ``k3_ratio`` is the gradient of the divergence at that token, however old the tokens are;
that of ``k2`` is so as long as the present weights drew them. ``k3`` has that of the opposite divergence
(reference ‖ policy); ``k3_sequence_ratio``, which TRL has beside sequence-level ratios, moves a sequence's
tokens by the mean of their k3; ``k1`` has none, in expectation: it is no choice of a recipe. Taken off a
token's advantage in place of added to the loss, ``k1`` has the very gradient that ``k2`` has here.

Source: http://joschu.net/blog/kl-approx.html for k1 to k3; DeepSeek-V3.2, arXiv:2512.02556, for the ratio;
On a few pitfalls in KL divergence gradient estimation for RL, arXiv:2506.09477, for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from turnwise.config import KlEstimator


def k2(difference_N: Tensor, ratio_N: Tensor) -> Tensor:
    """``d² / 2``."""
    return difference_N.square() / 2


def k3(difference_N: Tensor, ratio_N: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``."""
    return (-difference_N).exp() - 1 + difference_N


def k1_ratio(difference_N: Tensor, ratio_N: Tensor) -> Tensor:
    """``ρ d``."""
    return ratio_N * difference_N


def k3_ratio(difference_N: Tensor, ratio_N: Tensor) -> Tensor:
    """``ρ (exp(-d) - 1 + d)``. The ratio counts even where it is 1: through its gradient."""
    return ratio_N * k3(difference_N, ratio_N)


ESTIMATORS: dict[KlEstimator, Callable[[Tensor, Tensor], Tensor]] = {
    "k2": k2,
    "k3": k3,
    "k1_ratio": k1_ratio,
    "k3_ratio": k3_ratio,
    "k3_sequence_ratio": k3_ratio,
}
"""Of the difference to the reference and the ratio to the old policy: the token's, or the sequence's."""
