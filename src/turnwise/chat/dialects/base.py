"""`Dialect`: how a family of models writes tool calls; and the plain one, which has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from turnwise.chat.dialects.json_text import write_call
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema


class Dialect(Protocol):
    """Reads replies of one family."""

    name: str
    tags: frozenset[str]
    """Tokens that a call is written with: they stay tokens where a malformed call is shown again."""

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """The message that a reply's text says, its end-of-turn token left out. Never raises.

        Calls get the ids ``call_0``, ``call_1`` … in order; what is no usable call has ``error`` and ``raw``
        set.

        Args:
            text: All that was sampled.
            thinking: The generation prompt had opened the thinking already.
            tools: What the policy was told of: the types of arguments that are written as bare text.
        """
        ...

    def format(self, call: ToolCall) -> str:
        """The text of one call, for a reply whose malformed call keeps the template from writing it."""
        ...


class PlainDialect:
    """No tool calls: text, and thinking before it."""

    name = "plain"
    tags: frozenset[str] = frozenset()

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """See `Dialect.parse`."""
        reasoning, content = split_thinking(text, opened=thinking)
        return Message.assistant(content, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """Nothing better than the JSON of it."""
        return write_call(call)
