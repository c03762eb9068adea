"""The renderer protocol: the only way from messages to token ids and back, in every stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from turnwise.types import Message, Rendered, ToolSchema


class Renderer(Protocol):
    """Owns a tokenizer (or processor) and its chat template, with the recipe's template arguments."""

    stop_ids: tuple[int, ...]
    """A sampled id among these ends a reply."""
    fingerprint: str
    """Hash of tokenizer, template, template arguments and dialect: part of the harness hash."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> Rendered:
        """The whole conversation, ready for the assistant to speak (generation prompt included)."""
        ...

    def bridge(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> Rendered | None:
        """What to append to ``context_ids`` so that ``new_messages`` follow and the assistant may speak.

        ``context_ids`` ends with the ids that the policy sampled, stop id included where one was drawn; a
        reply that was cut is closed first. The held ids are never changed. None: this template cannot be
        extended (it rewrites what came before), so the caller starts a new segment with `prompt`.
        """
        ...

    def reply(
        self, message: Message, tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> list[int]:
        """The ids that the policy would have sampled to say ``message``, stop id included (for
        demonstrations).

        ``parse(reply(message, tools), tools)`` equals ``message`` up to call ids. ``context_ids`` are what
        the policy had read: some templates begin the thinking for it after a user's message, or after a
        tool's result, only. Without them it answers a user.
        """
        ...

    def parse(
        self, ids: Sequence[int], tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> Message:
        """What the sampled ids say. Never raises: a malformed call is a `ToolCall` with ``error`` set.

        Calls have the ids ``call_0``, ``call_1`` … in their order, or those that the policy gave them.

        ``tools`` are what the policy was told of: some families write arguments as bare text, and only a
        tool's schema says whether ``7`` is a number. ``context_ids`` as for `reply`.
        """
        ...

    def opens_thinking(self, context_ids: Sequence[int]) -> bool:
        """Whether a reply to this context begins inside of its thinking; without any, to a user."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included, for people."""
        ...
