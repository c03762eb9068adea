"""The Phi-4-mini dialect: JSON between tags, or after the word ``functools``.

    <|tool_call|>[{"name": "move", "arguments": {"direction": "left"}}]<|/tool_call|>

One object or a list of them. Without the tags in its prompt the model falls back to ``functools[{…}]`` as its
whole reply, which vLLM's ``phi4_mini_json`` reads too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from turnwise.chat.dialects.tagged import Tags, read_json_calls, read_tagged, read_whole
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE, BARE = "<|tool_call|>", "<|/tool_call|>", "functools"
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=_NAME)
_BARE = re.compile(rf"\s*{BARE}(?=\s*\[)")


class PhiDialect:
    """``<|tool_call|>[{"name": …, "arguments": {…}}]<|/tool_call|>``."""

    name = "phi"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        bare = _BARE.match(text)
        if bare is not None:
            calls = read_whole(text, bare.end(), read_json_calls, _NAME)
            return Message.assistant("", *calls, reasoning=reasoning)
        content, calls = read_tagged(text, _TAGS, read_json_calls)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        body = {"name": call.name, "arguments": dict(call.arguments)}
        return f"{OPEN}{json.dumps([body], ensure_ascii=False)}{CLOSE}"
