"""Whatever a tokenizer's own ``response_template`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.chat.dialects.json_text import write_call
from turnwise.errors import TemplateError, boundary
from turnwise.types import Message, ToolCall, ToolSchema


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
        return write_call(call)

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
