"""The Mistral dialects: calls after the token ``[TOOL_CALLS]``, at the end of the reply.

Tokenizers up to version 7 (``mistral``): a list of objects.

    [TOOL_CALLS][{"name": "move", "arguments": {"direction": "left"}, "id": "a1b2c3d4e"}]

Version 11 and later (``mistral_args``): the token before each call.

    I will look.[TOOL_CALLS]move[ARGS]{"direction": "left"}[TOOL_CALLS]look[CALL_ID]a1b2c3d4e[ARGS]{}

Ids that the model gives its calls are not kept: calls are known by their order. Reasoning models think
between ``[THINK]`` and ``[/THINK]``, early ones between the tags that others use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from turnwise.chat.dialects.json_text import NAME, skip_space, write_arguments, write_call
from turnwise.chat.dialects.tagged import (
    CallFault,
    Made,
    Reading,
    found,
    malformed,
    numbered,
    read_json,
    read_json_calls,
    sound,
)
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
THINK, THINK_END = "[THINK]", "[/THINK]"
_HEAD = re.compile(r"\s*([^\s\[\]{}\"]+)\s*(?:\[CALL_ID\]\s*[^\s\[\]{}\"]*\s*)?\[ARGS\]")


class MistralDialect:
    """``[TOOL_CALLS]`` and calls, to the reply's end.

    Args:
        name: Of the dialect.
        tags: Tokens that a call is written with.
        named: Finds the name (its group) in a call that could not be read.
        read: Reads what stands after the token.
        write: What stands after it.
    """

    def __init__(
        self,
        name: str,
        *,
        tags: frozenset[str],
        named: re.Pattern[str],
        read: Reading,
        write: Callable[[ToolCall], str],
    ) -> None:
        self.name, self.tags = name, tags
        self._named, self._read, self._write = named, read, write

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text before the calls is the content; see `Dialect.parse`."""
        reasoning, text = _split_thinking(text, opened=thinking)
        start = text.find(CALLS)
        content = text[:start] if start >= 0 else text
        calls: list[ToolCall] = []
        while start >= 0:
            try:
                made, end = self._read(text, start + len(CALLS))
                following = skip_space(text, end)
                if following < len(text) and not text.startswith(CALLS, following):
                    raise CallFault(f"expected the end of the call, found {found(text, end)}", end)
                calls += numbered(made, len(calls))
                start = text.find(CALLS, end)
            except CallFault as fault:
                following = text.find(CALLS, fault.at)
                raw = text[start : following if following >= 0 else len(text)].rstrip()
                calls.append(malformed(raw, str(fault), len(calls), self._named))
                start = following
        return Message.assistant(content if content.strip() else "", *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        return f"{CALLS}{self._write(call)}"


def _split_thinking(text: str, *, opened: bool) -> tuple[str | None, str]:
    stripped = text.lstrip()
    if not stripped.startswith(THINK):
        return split_thinking(text, opened=opened)
    thought, _, rest = stripped[len(THINK) :].partition(THINK_END)
    return thought.strip("\n") or None, rest.lstrip("\n")


def _read_named(text: str, start: int) -> tuple[list[Made], int]:
    head = _HEAD.match(text, start)
    if head is None:
        raise CallFault(f"expected NAME{ARGS} and an object, found {found(text, start)}", start)
    arguments, end = read_json(text, head.end())
    return [sound(head[1], arguments, end)], end


MISTRAL = MistralDialect(
    "mistral",
    tags=frozenset({CALLS}),
    named=NAME,
    read=read_json_calls,
    write=lambda call: f"[{write_call(call)}]",
)
MISTRAL_ARGS = MistralDialect(
    "mistral_args",
    tags=frozenset({CALLS, CALL_ID, ARGS}),
    named=re.compile(r"\[TOOL_CALLS\]\s*([^\s\[\]{}\"]+)"),
    read=_read_named,
    write=lambda call: f"{call.name}{ARGS}{write_arguments(call)}",
)
