"""The Hermes dialect: one JSON object for each call, between tags. Qwen2.5, Qwen3, Hermes 2 and 3, and ours.

    I will look.
    <tool_call>
    {"name": "move", "arguments": {"direction": "left"}}
    </tool_call>

Read as text, as the servers do (vLLM and SGLang ``hermes``, transformers' ``parse_response``), so that an
endpoint and an engine are judged alike. The JSON is read from its first brace to its last, not from tag to
tag: an argument that holds ``</tool_call>`` does not end its call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from turnwise.chat.dialects.json_text import call_fault, read_value, reason, skip_space
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')


class HermesDialect:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, after thinking in ``<think>…</think>``."""

    name = "hermes"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        before, found, rest = text.partition(OPEN)
        if not found:
            return Message.assistant(text, reasoning=reasoning)
        # The line break before a call belongs to the form, not to the content.
        contents = [before.removesuffix("\n")]
        calls: list[ToolCall] = []
        while found:
            call, rest = self._call(rest, len(calls))
            calls.append(call)
            between, found, rest = rest.partition(OPEN)
            if between.strip():
                contents.append(between.strip())
        content = "\n".join(contents) if contents[0] else "\n".join(contents[1:])
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, as most templates of this dialect write it."""
        body = {"name": call.name, "arguments": dict(call.arguments)}
        return f"{OPEN}\n{json.dumps(body, ensure_ascii=False)}\n{CLOSE}"

    def _call(self, text: str, index: int) -> tuple[ToolCall, str]:
        """The call whose opening tag stands before ``text``, and what follows it."""
        start = skip_space(text, 0)
        try:
            body, end = read_value(text, start)
            error = call_fault(body)
        except (ValueError, RecursionError) as cause:
            body, end, error = None, start, f"the call is not valid JSON: {reason(cause)}"
        closing = skip_space(text, end)
        if error is None and text.startswith(CLOSE, closing):
            call = ToolCall(name=body["name"], arguments=body.get("arguments", {}), id=f"call_{index}")
            return call, text[closing + len(CLOSE) :]

        # Malformed: it reaches to its closing tag, or to where another call opens, or to the end.
        close, opening = text.find(CLOSE, end), text.find(OPEN, end)
        if close >= 0 and (opening < 0 or close < opening):
            stop, said = close + len(CLOSE), text[: close + len(CLOSE)]
            error = error or "there is text between the JSON object and </tool_call>"
        else:
            stop = opening if opening >= 0 else len(text)
            said = text[:stop].rstrip()
            error = f"{error}, and </tool_call> is missing" if error else "</tool_call> is missing"
        name = _NAME.search(said)
        call = ToolCall(
            name=name.group(1) if name else "",
            arguments={},
            id=f"call_{index}",
            error=error,
            raw=OPEN + said,
        )
        return call, text[stop:]
