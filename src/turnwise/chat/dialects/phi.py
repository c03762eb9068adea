"""The Phi-4-mini dialect: JSON between tags, or after the word ``functools``.

    <|tool_call|>[{"name": "move", "arguments": {"direction": "left"}}]<|/tool_call|>

One object or a list of them. Without the tags in its prompt the model falls back to ``functools[{…}]`` as its
whole reply, which vLLM's ``phi4_mini_json`` reads too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from turnwise.chat.dialects.json_text import NAME, write_call
from turnwise.chat.dialects.tagged import Tags, read_json_calls, read_tagged, read_whole
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE, BARE = "<|tool_call|>", "<|/tool_call|>", "functools"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=NAME)
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
            calls = read_whole(text, bare.end(), read_json_calls, NAME)
            return Message.assistant("", *calls, reasoning=reasoning)
        content, calls = read_tagged(text, _TAGS, read_json_calls)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        return f"{OPEN}[{write_call(call)}]{CLOSE}"
