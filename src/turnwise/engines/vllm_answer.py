"""What a vLLM server answers to a request for tokens, checked and taken apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turnwise.errors import EngineError
from turnwise.types import Finish, Sampling

NO_LOGPROB = -9999.0
"""What vLLM writes where it has none."""


class ForeignTokenError(EngineError):
    """A server answered with something that cannot be learned from: a token without logprob or version."""


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What a server sampled.

    ids [8, 9, 2]   logprobs [-.1, -.7, -.2]   labels ["turnwise:run:3", "turnwise:run:3", "turnwise:run:4"]
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """The weights that drew each token, as the server names them."""
    finish: str = ""
    """vLLM's reason: ``stop``, ``length``, or ``abort`` for a request that was ended from outside."""
    cached_tokens: int = 0


def drawn_of(answer: Mapping[str, Any], url: str) -> Drawn:
    """Check and take apart an answer of ``/inference/v1/generate``.

    Raises:
        ForeignTokenError: A token has no logprob, or nobody knows which weights drew it.
    """
    choices = answer.get("choices") or []
    if len(choices) != 1:
        raise ForeignTokenError(f"{url} answered with {len(choices)} choices; one was asked for")
    choice = choices[0]
    ids = choice.get("token_ids") or []
    content = (choice.get("logprobs") or {}).get("content") or []
    if [entry.get("token_id") for entry in content] != ids:
        raise ForeignTokenError(
            f"{url} answered {len(ids)} token ids with the logprobs of {len(content)} others"
        )
    logprobs = [entry["logprob"] for entry in content]
    for position, logprob in enumerate(logprobs):
        if logprob is None or not math.isfinite(logprob) or logprob <= NO_LOGPROB:
            raise ForeignTokenError(f"{url} gives token {position} of {len(ids)} the logprob {logprob}")
    labels: list[str] = []
    for span in choice.get("weight_versions") or []:
        if span["start"] != len(labels):
            break
        labels += [span["version"]] * (span["end"] - span["start"])
    if len(labels) != len(ids):
        raise ForeignTokenError(
            f"{url} says of {len(labels)} of {len(ids)} tokens which weights drew them; vLLM 0.32 or newer "
            "says it of all"
        )
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return Drawn(
        ids=ids,
        logprobs=logprobs,
        labels=labels,
        finish=str(choice.get("finish_reason")),
        cached_tokens=details.get("cached_tokens") or 0,
    )


def finish_of(drawn: Drawn, sampling: Sampling) -> Finish | None:
    """Why a reply is over; None where it was ended from outside.

    Raises:
        EngineError: The server ended it for a reason of its own.
    """
    if drawn.ids and drawn.ids[-1] in sampling.stop_ids:
        return Finish.STOP
    if len(drawn.ids) >= sampling.max_tokens:
        return Finish.LENGTH
    if drawn.finish != "abort":
        raise EngineError(
            f"the server ended a reply of {len(drawn.ids)} tokens ('{drawn.finish}') that had no stop id and "
            f"{sampling.max_tokens} tokens to go"
        )
    return None


def seed_of(seed: int | None, *, drawn: int) -> int | None:
    """Of what is left of a reply: the first seed again would repeat the first draws."""
    if seed is None or drawn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{drawn}".encode(), digest_size=7).digest(), "big")
