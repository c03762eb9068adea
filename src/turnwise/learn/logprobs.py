"""Log-probabilities of sampled tokens, without the logits of a whole batch ever existing.

The head is applied only where the next token carries loss, so prompts and observations cost nothing in it,
and to ``chunk`` tokens at a time; backward makes each chunk's logits again. At 8,192 tokens and Qwen3's
vocabulary of 151,936 the logits would be 5 GB in float32, and as much again for their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LogitFunction = Callable[[Tensor], Tensor]
"""Hidden states ``[N, hidden]`` to logits ``[N, vocabulary]``."""


class Scored(NamedTuple):
    """What a model says of N tokens."""

    logprobs_N: Tensor
    """Float32; they carry gradients."""
    entropies_N: Tensor
    """Of the distributions that the tokens are of, float32."""
    likeliest_N: Tensor | None
    """Whether each token was the likeliest; None where that was not asked for."""


class Head:
    """A causal language model's output layer, with what some families do to its logits.

    Gemma caps them softly, Granite divides and Cohere multiplies by a constant. `turnwise.learn.model`
    compares it with the model's own logits before it is used.
    """

    def __init__(self, model: Any) -> None:
        self._linear: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        self._scale = float(scale or 1.0) / float(divisor or 1.0)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self._linear(hidden_ND)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def token_logprobs(
    logits_of: LogitFunction,
    hidden_ND: Tensor,
    targets_N: Tensor,
    temperatures_N: Tensor | None,
    *,
    chunk: int,
    entropy_gradient: bool = False,
    accuracy: bool = False,
) -> Scored:
    """Logprob of each target and entropy, under ``softmax(logits / temperature)``.

    Args:
        logits_of: The head.
        hidden_ND: Hidden states of the positions before the targets.
        targets_N: The tokens that were sampled.
        temperatures_N: None where all are 1.
        chunk: Tokens whose logits exist at one time.
        entropy_gradient: Let entropies carry gradients, which takes as much memory again for a chunk.
        accuracy: Say which targets were the likeliest.
    """
    logprobs, entropies, likeliest = [], [], list[Any]()
    for start in range(0, max(1, len(targets_N)), chunk):
        part = slice(start, start + chunk)
        inputs = (
            logits_of,
            hidden_ND[part],
            targets_N[part],
            None if temperatures_N is None else temperatures_N[part],
            entropy_gradient,
            accuracy,
        )
        # A single chunk's logits are within the bound as they are: nothing is made twice.
        again = torch.is_grad_enabled() and len(targets_N) > chunk
        logprobs_n, entropies_n, likeliest_n = (
            checkpoint(_score, *inputs, use_reentrant=False) if again else _score(*inputs)
        )
        logprobs.append(logprobs_n)
        entropies.append(entropies_n)
        likeliest.append(likeliest_n)
    return Scored(torch.cat(logprobs), torch.cat(entropies), torch.cat(likeliest) if accuracy else None)


def _score(
    logits_of: LogitFunction,
    hidden_ND: Tensor,
    targets_N: Tensor,
    temperatures_N: Tensor | None,
    entropy_gradient: bool,
    accuracy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk."""
    logits_NV = logits_of(hidden_ND).float()
    if temperatures_N is not None:
        logits_NV = logits_NV / temperatures_N[:, None]
    logprobs_NV = logits_NV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # Where a family masks part of its vocabulary with minus infinity, 0 · log 0 is 0, as is its gradient.
        finite_NV = logprobs_NV.masked_fill(logprobs_NV.isneginf(), 0)
        entropies_N = -(logprobs_NV.exp() * finite_NV).sum(-1)
    likeliest_N = logprobs_NV.detach().argmax(-1) == targets_N if accuracy else None
    return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], entropies_N, likeliest_N
