"""Losses: pure functions on the policy's own tokens, each a plain weighted sum.

Everything is flat over the N tokens that carry loss, whatever rows they came from. Normalisation is in
``weights_N`` (`turnwise.learn.normalise`), so a micro-batch's losses and gradients simply add up. What others
call a loss is here a term and a normalisation: TRL's ``loss_type`` in Turnwise's words is

    TRL        loss   normalise
    grpo       ppo    sequence
    dapo       ppo    token
    dr_grpo    ppo    constant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from turnwise.config import RlConfig
from turnwise.errors import RecipeError

_MAX_LOG_RATIO = 20.0
"""exp(20) is 5e8: long past every clip, while the exponential of a broken row's ratio would make inf · 0 =
nan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tokens that carry loss."""

    logprobs_N: Tensor
    """Under the weights that are being trained; the only part that carries gradients."""
    entropies_N: Tensor
    old_logprobs_N: Tensor
    """Of the policy that sampled."""
    advantages_N: Tensor
    weights_N: Tensor
    fresh_N: Tensor
    """Whether exactly the present weights drew the token: any difference in logprobs is then the
    sampler's."""
    reference_logprobs_N: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss and what to report of it. Add up over micro-batches and ranks; then divide ``means``."""

    loss: Tensor
    means: dict[str, tuple[Tensor, Tensor]]
    """Name to sum and count."""
    maxima: dict[str, Tensor]


Loss = Callable[[LossInputs], LossOutput]


def ppo(inputs: LossInputs, *, clip_low: float, clip_high: float, kl: float = 0.0) -> LossOutput:
    """``-min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A)`` with ``ρ = exp(logprob - old)``, for each token.

    Source: Proximal Policy Optimization, arXiv:1707.06347, equation 7; apart bounds ("clip-higher"): DAPO,
    arXiv:2503.14476, §3.1.

    Args:
        inputs: The tokens.
        clip_low: How far a bad token's probability may fall before its gradient stops.
        clip_high: How far a good token's probability may rise.
        kl: Weight of `kl_to_reference`.
    """
    log_ratio_N = (inputs.logprobs_N - inputs.old_logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    advantages_N = inputs.advantages_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    terms_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    means = {
        "clip_low": _mean((ratio_N < 1 - clip_low) & (advantages_N < 0)),
        "clip_high": _mean((ratio_N > 1 + clip_high) & (advantages_N > 0)),
    }
    return _policy_output(inputs, terms_N, kl, means)


def reinforce(inputs: LossInputs, *, kl: float = 0.0) -> LossOutput:
    """``-A logprob``: the plain policy gradient, right for tokens that the present weights drew.

    Source: Williams 1992, doi:10.1007/BF00992696.
    """
    return _policy_output(inputs, -inputs.advantages_N * inputs.logprobs_N, kl, {})


def cross_entropy(inputs: LossInputs) -> LossOutput:
    """``-logprob``: maximum likelihood of demonstrated tokens. Advantages and old logprobs are not read."""
    terms_N = -inputs.logprobs_N
    return LossOutput(
        loss=(inputs.weights_N * terms_N).sum(),
        means={"nll": _mean(terms_N), "entropy": _mean(inputs.entropies_N)},
        maxima={},
    )


def kl_to_reference(logprobs_N: Tensor, old_logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """``ρ (exp(d) - d - 1)`` with ``d = reference - logprob`` and ``ρ = exp(logprob - old)``, for each token.

    It estimates KL(policy ‖ reference) and is never below zero. The ratio counts even where it is 1: with its
    gradient this has the gradient of that divergence, without it (on-policy) that of the opposite one.

    Source: the estimator k3 of http://joschu.net/blog/kl-approx.html, corrected as in DeepSeek-V3.2,
    arXiv:2512.02556; TRL's default.
    """
    difference_N = (reference_logprobs_N - logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_N = (logprobs_N - old_logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    return ratio_N * (difference_N.exp() - difference_N - 1)


def make_loss(config: RlConfig) -> Loss:
    """The loss that a recipe asks for.

    ``dapo`` is `ppo` in the setting of its paper, and is held to it: token normalisation and an upper clip
    that is higher than the lower.

    Raises:
        RecipeError: The settings contradict each other, or one of them would do nothing.
    """
    if config.loss == "reinforce":
        idle = sorted({"clip_low", "clip_high"} & config.model_fields_set)
        if idle:
            raise RecipeError(
                f"rl.{idle[0]} does nothing with rl.loss=reinforce; remove it, or use rl.loss=ppo"
            )
        return partial(reinforce, kl=config.kl)
    if config.loss == "dapo" and config.normalise != "token":
        raise RecipeError(
            f"rl.loss=dapo normalises over tokens, and rl.normalise is {config.normalise!r}; "
            "remove it, or use rl.loss=ppo"
        )
    if config.loss == "dapo" and config.clip_high <= config.clip_low:
        raise RecipeError(
            f"rl.loss=dapo clips higher above than below, and rl.clip_high is {config.clip_high} with "
            f"rl.clip_low {config.clip_low}; set rl.clip_high (0.28 in the paper), or use rl.loss=ppo"
        )
    return partial(ppo, clip_low=config.clip_low, clip_high=config.clip_high, kl=config.kl)


def _policy_output(
    inputs: LossInputs, terms_N: Tensor, kl: float, means: dict[str, tuple[Tensor, Tensor]]
) -> LossOutput:
    """Add the KL term and what every policy loss reports."""
    if kl > 0:
        if inputs.reference_logprobs_N is None:
            raise RecipeError("a KL term needs samples with reference_logprobs_T: see Learner.with_reference")
        kl_N = kl_to_reference(inputs.logprobs_N, inputs.old_logprobs_N, inputs.reference_logprobs_N)
        terms_N = terms_N + kl * kl_N
        means = {**means, "kl_reference": _mean(kl_N)}
    with torch.no_grad():
        log_ratio_N = (inputs.logprobs_N - inputs.old_logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        ratio_N = log_ratio_N.exp()
        approx_kl_N = ratio_N - 1 - log_ratio_N
        gap_N = log_ratio_N.abs() * inputs.fresh_N
        fresh = inputs.fresh_N.sum()
        means = {
            **means,
            "entropy": _mean(inputs.entropies_N),
            "ratio": _mean(ratio_N),
            "approx_kl": _mean(approx_kl_N),
            "mismatch": (gap_N.sum(), fresh),
            "mismatch_kl": ((approx_kl_N * inputs.fresh_N).sum(), fresh),
        }
        maxima = {"ratio_max": ratio_N.max(), "mismatch_max": gap_N.max()} if len(ratio_N) else {}
    return LossOutput(loss=(inputs.weights_N * terms_N).sum(), means=means, maxima=maxima)


def _mean(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count."""
    values_N = values_N.detach().float()
    return values_N.sum(), torch.full_like(values_N.sum(), len(values_N))
