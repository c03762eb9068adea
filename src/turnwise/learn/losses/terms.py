"""Policy terms: pure functions from the tokens to one number each, before weights, correction and KL.

Each takes the inputs and ``log_ratio_N``, the logprobs less those of the old policy, and stops or dampens the
gradient where the ratio ``ρ`` has gone far enough. Below, ``sg`` is what carries no gradient and ``A`` the
token's advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from turnwise.learn.losses.base import (
    MAX_LOG_RATIO,
    LossInputs,
    Mean,
    mean,
    sequence_mean,
    sequence_sum,
)


class Terms(NamedTuple):
    """One term a token, to be minimised, and what to report."""

    terms_N: Tensor
    means: dict[str, Mean]
    maxima: Mapping[str, Tensor] = MappingProxyType({})


Term = Callable[[LossInputs, Tensor], Terms]


def ppo(
    inputs: LossInputs,
    log_ratio_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
) -> Terms:
    """``-min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A)`` with ``ρ = exp(logprob - old)``, for each token.

    Source: Proximal Policy Optimization, arXiv:1707.06347, equation 7; apart bounds ("clip-higher"): DAPO,
    arXiv:2503.14476, §3.1; the cap ("two-sided clipping"): INTELLECT-2, arXiv:2505.07291, §3.4.

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the old policy's.
        clip_low: How far a bad token's probability may fall before its gradient stops.
        clip_high: How far a good token's probability may rise.
        ratio_cap: Bound on the first ρ. Above ``1 + clip_high`` it matters for bad tokens alone: one that has
            become more frequent has a gradient that grows with its ratio, and none from there on.
    """
    return _clipped(inputs, log_ratio_N.exp(), clip_low, clip_high, ratio_cap)


def gspo(
    inputs: LossInputs,
    log_ratio_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
) -> Terms:
    """``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` with one ratio for a whole sequence:
    ``s = exp(mean of log ρ over the sequence)``.

    The gradient takes each token's own way, ``s_t = sg(s) ρ_t / sg(ρ_t)``. Where all of a sequence's tokens
    have the same advantage and weight, that is the gradient of ``s`` itself; where credit differs by turn,
    each token's advantage moves its own logprob.

    Source: Group Sequence Policy Optimization, arXiv:2507.18071, equations 5 to 7; 13 and 14 (GSPO-token).

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the old policy's.
        clip_low: As of `ppo`, but of the sequence's ratio, which stays far closer to 1: 3e-4 in the paper.
        clip_high: 4e-4 in the paper.
        ratio_cap: As of `ppo`.
    """
    own_N = log_ratio_N - log_ratio_N.detach()
    log_s_N = sequence_mean(log_ratio_N.detach(), inputs.sequences_N)
    return _clipped(inputs, (log_s_N + own_N).exp(), clip_low, clip_high, ratio_cap)


def rloo(inputs: LossInputs, log_ratio_N: Tensor, *, clip_low: float, clip_high: float) -> Terms:
    """``-min(R A, clip(R, 1 - clip_low, 1 + clip_high) A)`` once for a whole sequence, ``R = Π ρ`` over it.

    A token has its share of the value, ``1 / length``, and as its gradient that of its own logprob,
    ``R A ∇logprob``: with ``normalise: sum`` they add up to the sequence's, and where credit differs by turn
    each turn's advantage moves its own tokens. The product runs away with length: on-policy this is
    REINFORCE, and a few updates later most sequences are clipped.

    Source: Back to Basics: Revisiting REINFORCE Style Optimization, arXiv:2402.14740; the clip: TRL 1.16.

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the old policy's.
        clip_low: As of `ppo`, but of the sequence's ratio.
        clip_high: As before.
    """
    own_N = log_ratio_N - log_ratio_N.detach()
    log_r_N = sequence_sum(log_ratio_N.detach(), inputs.sequences_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    terms_N, means, maxima = _clipped(inputs, (log_r_N + own_N).exp(), clip_low, clip_high)
    lengths_N = sequence_sum(torch.ones_like(log_r_N), inputs.sequences_N)
    return Terms(terms_N - terms_N.detach() * (1 - 1 / lengths_N), means, maxima)


def cispo(inputs: LossInputs, log_ratio_N: Tensor, *, clip_high: float) -> Terms:
    """``-sg(min(ρ, 1 + clip_high)) A logprob``: the ratio weighs a token's gradient and never stops it.

    Source: MiniMax-M1, arXiv:2506.13585, equations 4 and 5, without a lower bound as there; a cap of 5
    (``clip_high`` of 4) from ScaleRL, arXiv:2510.13786.
    """
    ratio_N = log_ratio_N.detach().exp()
    capped_N = ratio_N.clamp(max=1 + clip_high)
    high_N = (ratio_N > 1 + clip_high) & (inputs.advantages_N > 0)
    return Terms(-capped_N * inputs.advantages_N * inputs.logprobs_N, {"clip_high": mean(high_N)})


def sapo(inputs: LossInputs, log_ratio_N: Tensor, *, tau_positive: float, tau_negative: float) -> Terms:
    """``-4/τ σ(τ (ρ - 1)) A``, with one τ for A > 0 and another for the rest.

    The gradient's weight is ``4 σ (1 - σ) ρ``: 1 on-policy, whatever τ, and it fades smoothly on both sides
    where `ppo` cuts.

    Source: Soft Adaptive Policy Optimization, arXiv:2511.20347, equations 5 to 7.

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the old policy's.
        tau_positive: The larger, the sooner a token of positive advantage loses its gradient.
        tau_negative: As before, for the others, whose gradient spreads over the whole vocabulary: above
            ``tau_positive`` in the paper.
    """
    tau_N = torch.where(inputs.advantages_N > 0, tau_positive, tau_negative).to(log_ratio_N.dtype)
    gate_N = torch.sigmoid(tau_N * (log_ratio_N.exp() - 1))
    return Terms(-4 / tau_N * gate_N * inputs.advantages_N, {"gate": mean(4 * gate_N * (1 - gate_N))})


def dppo(
    inputs: LossInputs,
    log_ratio_N: Tensor,
    *,
    divergence: Literal["tv", "kl"],
    clip_low: float,
    clip_high: float,
    max_ratio: float,
) -> Terms:
    """``-keep sg(min(ρ, max_ratio)) A logprob``; a token is left out where it moves away from the old policy
    and the two have come apart by more than a bound.

    How far is measured between the two-way distributions "this token or another", with probabilities ``π``
    now and ``μ`` before:

        tv   |π - μ|
        kl   μ log(μ / π) + (1 - μ) log((1 - μ) / (1 - π))

    A ratio overrates what happens to rare tokens and underrates it for frequent ones; a divergence does not.
    (The paper's top-K variants need the sampler's distribution, of which one logprob a token is recorded.)

    Source: Rethinking the Trust Region in LLM Reinforcement Learning, arXiv:2602.04879, §4; the cap on the
    ratio as in its reference implementation.

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the old policy's.
        divergence: Which one.
        clip_low: Its bound where a bad token has become rarer: 0.15 for tv, 0.05 for kl.
        clip_high: Its bound where a good token has become more frequent.
        max_ratio: Cap on ρ as a weight.
    """
    ratio_N = log_ratio_N.detach().exp()
    now_N = inputs.logprobs_N.detach().exp()
    before_N = (inputs.logprobs_N.detach() - log_ratio_N.detach()).exp()
    if divergence == "tv":
        apart_N = (now_N - before_N).abs()
    else:
        # A rounded probability of 1 would leave nothing for the other tokens.
        others, others_before = ((1 - one_N).clamp(min=1e-7) for one_N in (now_N, before_N))
        apart_N = -before_N * log_ratio_N.detach() + others_before * (others_before / others).log()
    advantages_N = inputs.advantages_N
    low_N = (advantages_N < 0) & (ratio_N < 1) & (apart_N > clip_low)
    high_N = (advantages_N > 0) & (ratio_N > 1) & (apart_N > clip_high)
    weights_N = ratio_N.clamp(max=max_ratio) * ~(low_N | high_N)
    return Terms(
        -weights_N * advantages_N * inputs.logprobs_N,
        {"clip_low": mean(low_N), "clip_high": mean(high_N)},
    )


def vespo(
    inputs: LossInputs,
    log_ratio_N: Tensor,
    *,
    k_positive: float,
    lambda_positive: float,
    k_negative: float,
    lambda_negative: float,
) -> Terms:
    """``-sg(φ(w)) A logprob`` with ``φ(w) = w^k exp(λ (1 - w))`` of the sequence's whole importance weight
    ``w``, the product of its ratios, not their mean.

    φ is 1 on-policy and falls to 0 on both sides, so that a sequence that has drifted far loses its say. It
    has one k and λ for A > 0 or 0, others below. With a correction, ``w`` is made of ratios to the old
    policy, each times its token's weight (1e-8 where that is 0).

    Source: VESPO, arXiv:2602.10693; the clamp of w to [1e-8, e^20] as in TRL 1.16.

    Args:
        inputs: The tokens.
        log_ratio_N: Logprobs less the sampler's.
        k_positive: The larger, the sooner a sequence that has become rarer loses its say.
        lambda_positive: The larger, the sooner one that has become more frequent does.
        k_negative: As ``k_positive``, for negative advantages.
        lambda_negative: As ``lambda_positive``, for negative advantages.
    """
    log_w_N = sequence_sum(log_ratio_N.detach(), inputs.sequences_N).clamp(LEAST_LOG_W, MAX_LOG_RATIO)
    positive_N = inputs.advantages_N >= 0
    k_N = torch.where(positive_N, k_positive, k_negative).to(log_w_N.dtype)
    lambda_N = torch.where(positive_N, lambda_positive, lambda_negative).to(log_w_N.dtype)
    phi_N = (k_N * log_w_N + lambda_N * (1 - log_w_N.exp())).exp()
    return Terms(-phi_N * inputs.advantages_N * inputs.logprobs_N, {"gate": mean(phi_N)})


def reinforce(inputs: LossInputs, log_ratio_N: Tensor) -> Terms:
    """``-A logprob``: the plain policy gradient, right for tokens that the present weights drew.

    Source: Williams 1992, doi:10.1007/BF00992696.
    """
    return Terms(-inputs.advantages_N * inputs.logprobs_N, {})


LEAST_LOG_W = -18.420681
"""log(1e-8)."""


def _clipped(
    inputs: LossInputs, ratio_N: Tensor, clip_low: float, clip_high: float, ratio_cap: float | None = None
) -> Terms:
    """The pessimistic one of the ratio and the clipped ratio, and how often they differ: on average, and in
    the sequence of which most is clipped above, or least below.
    """
    advantages_N = inputs.advantages_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    capped_N = ratio_N if ratio_cap is None else ratio_N.clamp(max=ratio_cap)
    low_N = (ratio_N < 1 - clip_low) & (advantages_N < 0)
    high_N = (ratio_N > 1 + clip_high) & (advantages_N > 0)
    maxima = {}
    if len(ratio_N):
        shares = {"spared_low_max": ~low_N, "clip_high_max": high_N}
        maxima = {
            name: sequence_mean(one_N.to(ratio_N.dtype), inputs.sequences_N).max()
            for name, one_N in shares.items()
        }
    return Terms(
        -torch.minimum(capped_N * advantages_N, clipped_N * advantages_N),
        {"clip_low": mean(low_N), "clip_high": mean(high_N)},
        maxima,
    )
