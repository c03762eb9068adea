"""Policies: whoever answers a conversation. An engine with a renderer, an endpoint, a teacher, a script."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from turnwise.types import Message, Reply, Sampling, ToolSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a policy sees when it is its turn."""

    turn: int = 0
    """How many replies came before."""
    session: str
    """The episode's id: one conversation, whose KV an engine may keep."""
    messages: Sequence[Message]
    """The whole conversation so far."""
    new_messages: Sequence[Message]
    """Its end that was not there at the policy's last reply; all of it before the first."""
    tools: Sequence[ToolSchema]
    sampling: Sampling
    """With ``max_tokens`` lowered to what the episode's budget leaves, and a seed of this turn's own."""
    held_ids: Sequence[int] | None = None
    """Tokens of the current segment, context and sampled; None before the first reply and without ids."""
    held_images: Sequence[str] = ()
    """Hashes of the images in ``held_ids``."""
    max_context: int | None = None
    """The most tokens that context and reply may reach together; None leaves it to the engine."""
    teacher: Callable[[Sequence[Message]], Awaitable[Message]] | None = None
    """Asks the environment's own demonstrator; for the policy that passes on what it says, no other."""


class Policy(Protocol):
    """Answers conversations, many at a time."""

    name: str
    """``engine``, ``teacher``, ``endpoint:…``, ``person``, ``script``: stored on the trajectory."""

    async def act(self, context: Context) -> Reply:
        """Answer.

        Raises:
            ContextOverflowError: The context leaves no room for a reply; the episode ends as truncated.
            PolicyError: No answer could be had; the episode ends as failed.
        """
        ...

    async def release(self, session: str) -> None:
        """The episode is over: forget what is held for it."""
        ...
