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

from collections.abc import Sequence

from turnwise.chat.dialects.json_text import NAME, call_fault, write_call
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, read_json, read_tagged
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# The line break before a call belongs to the form, not to the content.
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=NAME, gap="\n")


class HermesDialect:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, after thinking in ``<think>…</think>``."""

    name = "hermes"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, _TAGS, _read)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, as most templates of this dialect write it."""
        return f"{OPEN}\n{write_call(call)}\n{CLOSE}"


def _read(text: str, start: int) -> tuple[list[Made], int]:
    body, end = read_json(text, start)
    error = call_fault(body)
    if error is not None:
        raise CallFault(error, end)
    return [(body["name"], body.get("arguments", {}))], end
