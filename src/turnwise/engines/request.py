"""One request for a reply, from its arrival to its completion."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from turnwise.chat.vision import Placed, positions
from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Completion, Finish, Sampling


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A reply in the making. Only the engine's thread touches it once it was submitted."""

    prompt: npt.NDArray[np.int64]
    sampling: Sampling
    session: str | None
    seed: int
    """Drawn at arrival where the sampling settings give none."""
    limit: int
    """Tokens to sample at most: ``max_tokens``, or what the context leaves."""
    stop: frozenset[int]
    images: tuple[Placed, ...] = ()
    """In the prompt."""
    merge: int = 1
    """Patches along the side of an image token."""
    order: int = -1
    """Rank of arrival."""
    slot: int = -1
    """Where its KV is; -1 while it is queued and after its end."""
    leader: Request | None = None
    """Computes a prefix that this request waits to copy."""
    shared: int = 0
    """How many tokens it waits for."""
    cached_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)

    @property
    def shift(self) -> int:
        """From where a token after the prompt stands to its place on each axis: images take fewer places."""
        return sum(max(one.grid[1:]) // self.merge - one.tokens for one in self.images)

    def axes(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Time, height and width of the tokens from ``start`` to ``stop``, ``[3, stop - start]``."""
        length = max(stop, len(self.prompt))
        return positions(length, self.images, self.merge)[:, start:stop]

    def add(self, token: int, logprob: float, kept: float | None, version: int) -> Finish | None:
        """Take a sampled token; says why the reply is over, if it is."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if kept is not None:
            self.kept_mass.append(kept)
        if token in self.stop:
            return Finish.STOP
        return Finish.LENGTH if len(self.ids) >= self.limit else None

    def completion(self, finish: Finish) -> Completion:
        """The finished reply."""
        return Completion(
            ids=self.ids,
            logprobs=self.logprobs,
            versions=self.versions,
            finish=finish,
            kept_mass=self.kept_mass if self.sampling.truncates else None,
            cached_tokens=self.cached_tokens,
        )


def make_request(
    prompt_ids: Sequence[int], sampling: Sampling, *, session: str | None, max_context: int, vocabulary: int
) -> Request:
    """Check what a caller asks for, where the caller still waits for it.

    Raises:
        ContextOverflowError: The prompt leaves no room for a single token.
        EngineError: The prompt or the sampling settings mean nothing.
    """
    prompt = np.asarray(prompt_ids, dtype=np.int64)
    if prompt.ndim != 1 or len(prompt) == 0:
        raise EngineError(f"prompt_ids must be a non-empty row of token ids; found shape {prompt.shape}")
    if len(prompt) >= max_context:
        raise ContextOverflowError(len(prompt), max_context - 1, "the prompt")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocabulary:
        raise EngineError(
            f"prompt_ids hold the id {low if low < 0 else high}; the model's vocabulary is 0 to "
            f"{vocabulary - 1}. Is the renderer's tokenizer that of this model?"
        )
    check_sampling(sampling)
    return Request(
        prompt=prompt,
        sampling=sampling,
        session=session,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        limit=min(sampling.max_tokens, max_context - len(prompt)),
        stop=frozenset(sampling.stop_ids),
    )


def check_sampling(sampling: Sampling) -> None:
    """Raise `EngineError` for settings out of their range."""
    ranges = (
        ("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1"),
        (
            "temperature",
            sampling.temperature,
            sampling.temperature >= 0 and math.isfinite(sampling.temperature),
            "0 (greedy) or more",
        ),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (keep all) or more"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "between 0 and 1"),
    )
    for name, value, fits, allowed in ranges:
        if not fits:
            raise EngineError(f"sampling.{name} is {value}; it must be {allowed}")
