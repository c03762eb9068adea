"""The Cohere dialect (Command R7B and later): every part of a reply between tokens of its own.

    <|START_THINKING|>Left, then.<|END_THINKING|><|START_ACTION|>[
        {"tool_call_id": "0", "tool_name": "move", "parameters": {"direction": "left"}}
    ]<|END_ACTION|>

and an answer ``<|START_RESPONSE|>Done.<|END_RESPONSE|>``. A generation prompt may have opened the thinking or
the response. Ids that the model gives its calls are not kept: calls are known by their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial

from turnwise.chat.dialects.tagged import Tags, read_json_calls, read_tagged, split_between
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<|START_ACTION|>", "<|END_ACTION|>"
THINKING, THINKING_END = "<|START_THINKING|>", "<|END_THINKING|>"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=re.compile(r'"tool_name"\s*:\s*"([^"\\]*)"'))
_ANSWER = re.compile(r"<\|START_(RESPONSE|TEXT)\|>")
_ANSWER_END = re.compile(r"<\|END_(RESPONSE|TEXT)\|>\s*$")
_read = partial(read_json_calls, name="tool_name", arguments="parameters")


class CohereDialect:
    """``<|START_ACTION|>[{"tool_name": …, "parameters": {…}}]<|END_ACTION|>``."""

    name = "cohere"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_between(text, THINKING, THINKING_END, opened=thinking, call=OPEN)
        content, calls = read_tagged(text, _TAGS, _read)
        content = _ANSWER_END.sub("", _ANSWER.sub("", content, count=1), count=1)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        body = {"tool_call_id": "0", "tool_name": call.name, "parameters": dict(call.arguments)}
        return f"{OPEN}[{json.dumps(body, ensure_ascii=False)}]{CLOSE}"
