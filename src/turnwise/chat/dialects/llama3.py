"""The dialect of Llama 3.1 to 3.3: a reply that is nothing but a call, as a JSON object.

    {"name": "move", "parameters": {"direction": "left"}}

The token ``<|python_tag|>`` may stand before it, and then text before that. The templates write one call a
reply; models write several too, after each other or with ``;`` between them, and so they are read.

A plain object may be an answer, so it is a call only where it has a name and ``parameters``. JSON within
prose is prose, and prose after a call makes it a malformed one: what is to be run is said alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from turnwise.chat.dialects.json_text import NAME, call_fault, read_value, skip_space, write_call
from turnwise.chat.dialects.tagged import CallFault, Made, read_json, read_whole
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

PYTHON_TAG = "<|python_tag|>"
_BEGINS = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]*)(?P<named>"?)'
    r'(?P<called>\s*,\s*"parameters")?'
)
_BETWEEN = re.compile(r"\s*;?\s*(?=\{)")


class Llama3Dialect:
    """``{"name": …, "parameters": {…}}`` as the whole reply, after thinking in ``<think>…</think>``."""

    name = "llama3"
    tags = frozenset({PYTHON_TAG})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        if _is_call(text, {tool.name for tool in tools}):
            return Message.assistant("", *read_whole(text, 0, _read, NAME), reasoning=reasoning)
        content, tag, said = text.partition(PYTHON_TAG)
        if not tag:
            return Message.assistant(text, reasoning=reasoning)
        calls = read_whole(tag + said, len(tag), _read, NAME)
        return Message.assistant(content.rstrip("\n"), *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        return write_call(call, "parameters")


def _is_call(text: str, known: set[str]) -> bool:
    """Whether a reply without a tag is meant as a call, well written or not."""
    start = skip_space(text, 0)
    if not text.startswith("{", start):
        return False
    try:
        body, _ = read_value(text, start)
    except (ValueError, RecursionError):
        begins = _BEGINS.match(text, start)
        if begins is None:
            return False
        name, named = begins["name"], begins["named"]
        return bool(begins["called"]) or any(
            tool == name if named else tool.startswith(name) for tool in known
        )
    name = body.get("name")
    if isinstance(name, str):
        return "parameters" in body or (name in known and "arguments" in body)
    # As the small models write it: {"type": "function", "function": "move", "parameters": {…}}.
    return body.get("type") == "function" and ("parameters" in body or "function" in body)


def _read(text: str, start: int) -> tuple[list[Made], int]:
    made: list[Made] = []
    while True:
        body, end = read_json(text, start)
        error = call_fault(body, "parameters")
        if error is not None:
            raise CallFault(error, end)
        made.append((body["name"], body.get("parameters", {})))
        following = _BETWEEN.match(text, end)
        if following is None:
            return made, end
        start = following.end()
