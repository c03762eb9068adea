"""`make_loss`: the loss that a recipe asks for, of a term, a correction, a KL divergence and an entropy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from turnwise.config import KlEstimator, RlConfig
from turnwise.errors import LearnError
from turnwise.learn.losses.base import (
    MAX_LOG_RATIO,
    Loss,
    LossInputs,
    LossOutput,
    Mean,
    log_ratio,
    mean,
    sequence_mean,
)
from turnwise.learn.losses.correction import CORRECTIONS, Correct
from turnwise.learn.losses.kl import ESTIMATORS
from turnwise.learn.losses.terms import (
    LEAST_LOG_W,
    Term,
    cispo,
    dppo,
    gspo,
    ppo,
    reinforce,
    rloo,
    sapo,
    vespo,
)


def policy_loss(
    inputs: LossInputs,
    *,
    term: Term,
    correct: Correct | None = None,
    bounds: tuple[float, float] = (0.0, float("inf")),
    within: bool = False,
    shared: bool = False,
    off_policy_kl: float | None = None,
    kl: float = 0.0,
    kl_estimator: KlEstimator = "k3_ratio",
    entropy: float = 0.0,
) -> LossOutput:
    """``Σ weight (correction · term + kl · KL - entropy · H)``, over all tokens with loss.

    Args:
        inputs: The tokens.
        term: From `turnwise.learn.losses.terms`.
        correct: From `turnwise.learn.losses.correction`. With it the term's ratio is that to the learner's
            own old logprobs; without, to the sampler's.
        bounds: Of the correction: low and high.
        within: Multiply the correction into each token's ratio rather than its term, for a term of a whole
            sequence's ratio to the sampler (`vespo`).
        shared: Give each token the mean of its sequence's weights, for a term whose gradient is the
            sequence's (`gspo`).
        off_policy_kl: Where the sampler's logprobs are higher than the present ones by more than this, in the
            mean over a sequence, tokens of negative advantage have no policy term.
            Source: DeepSeek-V3.2, arXiv:2512.02556, equation 9.
        kl: Weight of the divergence to the reference, which no correction touches.
        kl_estimator: From `turnwise.learn.losses.kl`.
        entropy: Weight of the mean entropy of the policy, which is raised.

    Raises:
        LearnError: The samples have no reference logprobs, or the entropies carry no gradients.
    """
    old_N = inputs.sampler_logprobs_N
    means: dict[str, Mean] = {}
    maxima: dict[str, Tensor] = {}
    if correct is not None:
        old_N = inputs.logprobs_N.detach() if inputs.old_logprobs_N is None else inputs.old_logprobs_N
    log_ratio_N = log_ratio(inputs.logprobs_N, old_N)
    if correct is None:
        terms_N, told, most = term(inputs, log_ratio_N)
    else:
        weights_N = correct(log_ratio(old_N, inputs.sampler_logprobs_N), inputs.sequences_N, *bounds)
        if within:
            log_weights_N = weights_N.log().clamp(LEAST_LOG_W, MAX_LOG_RATIO)
            terms_N, told, most = term(inputs, log_ratio_N + log_weights_N)
        else:
            terms_N, told, most = term(inputs, log_ratio_N)
            terms_N = terms_N * (sequence_mean(weights_N, inputs.sequences_N) if shared else weights_N)
        means |= {"correction": mean(weights_N), "correction_rejected": mean(weights_N == 0)}
        if len(weights_N):
            maxima |= {"correction_max": weights_N.max(), "correction_cut_max": (1 - weights_N).max()}
    means.update(told)
    maxima.update(most)
    if off_policy_kl is not None:
        rarer_N = (inputs.sampler_logprobs_N - inputs.logprobs_N).detach()
        kept_N = (inputs.advantages_N >= 0) | (sequence_mean(rarer_N, inputs.sequences_N) <= off_policy_kl)
        terms_N = terms_N * kept_N
        means["off_policy_masked"] = mean(~kept_N)
    if kl > 0:
        if inputs.reference_logprobs_N is None:
            raise LearnError("a KL term needs samples with reference_logprobs_T: see Learner.with_reference")
        difference_N = log_ratio(inputs.logprobs_N, inputs.reference_logprobs_N)
        log_s_N = log_ratio_N
        if kl_estimator == "k3_sequence_ratio":
            log_s_N = sequence_mean(log_ratio_N, inputs.sequences_N)
        kl_N = ESTIMATORS[kl_estimator](difference_N, log_s_N.exp())
        terms_N = terms_N + kl * kl_N
        means["kl_reference"] = mean(kl_N)
    if entropy > 0:
        if inputs.logprobs_N.requires_grad and not inputs.entropies_N.requires_grad:
            raise LearnError(
                "an entropy bonus needs entropies that carry gradients: call Learner.forward_backward with "
                "entropy_gradient=True"
            )
        terms_N = terms_N - entropy * inputs.entropies_N
    told, most = _report(inputs, log_ratio_N.detach())
    return LossOutput(
        loss=(inputs.weights_N * terms_N).sum(), means={**means, **told}, maxima={**maxima, **most}
    )


def make_loss(config: RlConfig) -> Loss:
    """The loss that a recipe asks for. What cannot stand together was refused with the recipe."""
    kind = config.correction.kind
    return partial(
        policy_loss,
        term=_term(config),
        correct=None if kind == "none" else CORRECTIONS[kind],
        bounds=config.correction.bounds,
        within=config.loss == "vespo",
        shared=config.loss in ("gspo", "luspo"),
        off_policy_kl=config.off_policy_kl,
        kl=config.kl if config.kl_in == "loss" else 0.0,
        kl_estimator=config.kl_estimator,
        entropy=config.entropy,
    )


def _term(config: RlConfig) -> Term:
    low, high = config.clips
    match config.loss:
        case "ppo" | "dapo" | "dr_grpo" | "bnpo":
            return partial(ppo, clip_low=low, clip_high=high, ratio_cap=config.ratio_cap)
        case "gspo" | "luspo":
            return partial(gspo, clip_low=low, clip_high=high, ratio_cap=config.ratio_cap)
        case "rloo":
            return partial(rloo, clip_low=low, clip_high=high)
        case "cispo":
            return partial(cispo, clip_high=high)
        case "sapo":
            return partial(sapo, **config.sapo.model_dump())
        case "dppo":
            return partial(dppo, clip_low=low, clip_high=high, **config.dppo.model_dump())
        case "vespo":
            return partial(vespo, **config.vespo.model_dump())
        case "reinforce":
            return reinforce


@torch.no_grad()
def _report(inputs: LossInputs, log_ratio_N: Tensor) -> tuple[dict[str, Mean], dict[str, Tensor]]:
    """What every policy loss reports: means and maxima."""
    ratio_N = log_ratio_N.exp()
    mismatch_N = log_ratio(inputs.logprobs_N, inputs.sampler_logprobs_N)
    gap_N = mismatch_N.abs() * inputs.fresh_N
    mismatch_kl_N = (mismatch_N.exp() - 1 - mismatch_N) * inputs.fresh_N
    fresh = inputs.fresh_N.sum()
    means = {
        "entropy": mean(inputs.entropies_N),
        "ratio": mean(ratio_N),
        "approx_kl": mean(ratio_N - 1 - log_ratio_N),
        "mismatch": (gap_N.sum(), fresh),
        "mismatch_kl": (mismatch_kl_N.sum(), fresh),
    }
    if not len(ratio_N):
        return means, {}
    # Of no fresh token at all there is no largest gap, which -inf says without waiting for the device.
    largest = gap_N.masked_fill(~inputs.fresh_N, -torch.inf).max()
    return means, {"ratio_max": ratio_N.max(), "mismatch_max": largest}
