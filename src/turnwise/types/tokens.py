"""What goes into an engine and what comes out of it, and what a policy answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from turnwise.types.chat import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Messages as the model reads them."""

    ids: list[int]
    images: tuple[str, ...] = ()
    """Hashes of the images, in the order of their placeholders in ``ids``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Stored on every trajectory, so that training can know the behaviour policy."""

    max_tokens: int = 512
    """Upper bound for one reply."""
    temperature: float = 1.0
    """0 is greedy: the logprob is then that of the untempered softmax."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    seed: int | None = None
    """Same seed, same prompt, same weights: same tokens, whatever else is in the running batch."""
    stop_ids: tuple[int, ...] = ()
    """A sampled id among these ends the reply and is part of it."""

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p cut the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Finish(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """A stop id was sampled."""
    LENGTH = "length"
    """``max_tokens`` or the engine's context was used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled.

    prompt  [5, 6, 7]      ids [8, 9, 2]   logprobs [-.1, -.7, -.2]   versions [3, 3, 4]
    2 is the stop id and is part of the reply; the weights changed before the last token was drawn.
    """

    ids: list[int]
    logprobs: list[float]
    """One for each id: log of its probability under the softmax at the sampling temperature."""
    versions: list[int]
    """One for each id: the weights that drew it."""
    finish: Finish
    kept_mass: list[float] | None = None
    """One for each id where top-k, top-p or min-p cut the distribution: the mass that was kept. None there
    from an engine that cannot tell; its logprobs are those of the cut distribution."""
    cached_tokens: int = 0
    """How many prompt tokens were not prefilled, because a session or a sibling held them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a policy answers. Without ids it was demonstrated (by a teacher, a person), not sampled."""

    message: Message
    context_ids: list[int] | None = None
    """What was appended before the reply: the whole prompt when ``new_segment``, the bridge otherwise."""
    new_segment: bool = False
    """The held tokens could not be extended: the conversation was rendered anew."""
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    versions: list[int] | None = None
    kept_mass: list[float] | None = None
    finish: Finish = Finish.STOP
    images: tuple[str, ...] = ()
    cached_tokens: int = 0
    """How many tokens of the whole context the engine did not prefill."""
