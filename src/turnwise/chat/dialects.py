"""Dialects: how a family of models writes tool calls. Found from what the template writes, not from its text.

A call is rendered with the template and handed to each dialect; the one that reads the call back is the one.
So a forked template (other white space, a comment, an extra variable) needs no entry anywhere. A new family
is one small class with `Dialect`'s methods, added to `DIALECTS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from turnwise.chat.hermes import HermesDialect
from turnwise.chat.thinking import split_thinking
from turnwise.errors import TemplateError, boundary
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
        return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


class ResponseTemplateDialect:
    """Whatever the tokenizer's own ``response_template`` reads (transformers' ``parse_response``).

    Args:
        tokenizer: One with a ``response_template``.
        prefix: The generation prompt, which the reader has to see.
    """

    name = "response_template"
    tags: frozenset[str] = frozenset()

    def __init__(self, tokenizer: Any, prefix: str) -> None:
        self._tokenizer, self._prefix = tokenizer, prefix

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """See `Dialect.parse`. A reply that cannot be read is one malformed call."""
        try:
            with boundary(TemplateError, "the tokenizer's response_template"):
                row: Mapping[str, Any] = self._tokenizer.parse_response(text, prefix=self._prefix)
        except TemplateError as cause:
            return Message.assistant(
                "", ToolCall(name="", arguments={}, id="call_0", error=str(cause), raw=text)
            )
        calls = [self._call(call, index, text) for index, call in enumerate(row.get("tool_calls") or ())]
        reasoning = row.get("reasoning_content") or row.get("thinking") or None
        return Message.assistant(str(row.get("content") or ""), *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """A response template reads only; the JSON stands for the call."""
        return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)

    def _call(self, row: Any, index: int, text: str) -> ToolCall:
        function = row.get("function", row) if isinstance(row, Mapping) else {}
        if not isinstance(function, Mapping):
            function = {}
        name, arguments = function.get("name"), function.get("arguments", {})
        error = None
        if not isinstance(name, str) or not name:
            name, error = "", "the call has no name"
        elif not isinstance(arguments, Mapping):
            error = "the call's arguments must be an object"
        return ToolCall(
            name=name,
            arguments=arguments if error is None else {},
            id=f"call_{index}",
            error=error,
            raw=text if error else "",
        )


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (HermesDialect(),)}
"""By name, in the order in which they are tried."""


def find_dialect(
    written: str,
    calls: tuple[ToolCall, ...],
    *,
    thinking: bool,
    tools: Sequence[ToolSchema] = (),
    more: tuple[Dialect, ...] = (),
) -> Dialect | None:
    """The first dialect that reads ``calls`` back from what the template wrote; None where none does."""
    wanted = [(call.name, dict(call.arguments)) for call in calls]
    for dialect in (*DIALECTS.values(), *more):
        read = dialect.parse(written, thinking=thinking, tools=tools).tool_calls
        if [(call.name, dict(call.arguments)) for call in read if call.error is None] == wanted:
            return dialect
    return None
