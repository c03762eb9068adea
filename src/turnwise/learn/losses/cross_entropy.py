"""The loss of supervised learning."""

from __future__ import annotations

from turnwise.learn.losses.base import LossInputs, LossOutput, mean


def cross_entropy(inputs: LossInputs) -> LossOutput:
    """``-logprob``: maximum likelihood of demonstrated tokens. Advantages and old logprobs are not read."""
    terms_N = -inputs.logprobs_N
    means = {"nll": mean(terms_N), "entropy": mean(inputs.entropies_N)}
    if inputs.likeliest_N is not None:
        means["accuracy"] = mean(inputs.likeliest_N)
    return LossOutput(loss=(inputs.weights_N * terms_N).sum(), means=means, maxima={})
