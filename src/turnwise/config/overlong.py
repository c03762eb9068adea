"""`OverlongConfig`: what RL makes of episodes that ran into a limit, or came near it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.section import Section

OverlongReason = Literal[
    "cut_reply", "max_tokens", "max_turns", "max_tool_calls", "time_limit", "env_truncated"
]


class LengthPenaltyConfig(Section):
    """A reward ``overlong`` that falls from 0 to -1 over the last ``cache`` tokens before a limit.

    It is only learned from: no stored or evaluated reward has it.
    """

    of: Literal["episode", "reply"] = "episode"
    """What is measured: all tokens that the episode sampled, or its longest reply."""
    cache: int = Field(ge=1)
    """Tokens over which it falls."""
    max_tokens: int | None = Field(None, ge=1)
    """The limit; if not set, ``sampling.max_tokens`` for replies, the environment's ``limits.max_tokens`` for
    episodes."""
    weight: float = Field(1.0, gt=0)


class OverlongConfig(Section):
    """What becomes of episodes that ran into a limit, or came near it (docs/algorithms.md)."""

    mask: bool = False
    """No loss on episodes that ended for one of ``reasons``; their siblings are still compared with them."""
    reasons: list[OverlongReason] = Field(["cut_reply", "max_tokens"], min_length=1)
    """The ends that ``mask`` is about, as trajectories name them in ``stop_reason``."""
    penalty: LengthPenaltyConfig | None = None
