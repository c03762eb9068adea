"""The dialect of Nemotron Nano 2 (version 3 writes `qwen_xml`): a JSON list of calls between tags.

<TOOLCALL>[{"name": "move", "arguments": {"direction": "left"}}]</TOOLCALL>
"""

from __future__ import annotations

from collections.abc import Sequence

from turnwise.chat.dialects.json_text import NAME, write_call
from turnwise.chat.dialects.tagged import Tags, read_json_calls, read_tagged
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=NAME, gap="\n\n")


class NemotronDialect:
    """``<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>``, after thinking in ``<think>…</think>``."""

    name = "nemotron"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, _TAGS, read_json_calls)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        return f"{OPEN}[{write_call(call)}]{CLOSE}"
