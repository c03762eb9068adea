"""Calls as ``<invoke name=…>`` with bare text in ``<parameter name=…>``: MiniMax, and Muse with a prefix.

    <minimax:tool_call>
    <invoke name="move">
    <parameter name="direction">left</parameter>
    <parameter name="steps">3</parameter>
    </invoke>
    </minimax:tool_call>

Strings stand as they are, everything else as JSON (see `turnwise.chat.dialects.arguments`), and nothing is
escaped (see `turnwise.chat.dialects.argument_tags`). White space in a value belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from turnwise.chat.dialects.argument_tags import ArgumentTags, made_call
from turnwise.chat.dialects.arguments import known_arguments, parameters_of, read_argument, write_argument
from turnwise.chat.dialects.json_text import skip_space
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, found, read_tagged
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema


class Invoke:
    """The form of a list of calls.

    Args:
        prefix: Of the names of its tags: ``atem:``.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix, self._closing = prefix, f"</{prefix}invoke>"
        self.name = re.compile(rf'<{prefix}invoke name="([^"<>]*)')
        self._opening = re.compile(rf'<{prefix}invoke name="([^"<>]+)">')
        self._arguments = ArgumentTags(
            opening=rf'<{prefix}parameter name="(?P<key>[^"<>]*)">',
            form=f'<{prefix}parameter name="…">',
            closing=f"</{prefix}parameter>",
            ends=(self._closing,),
            call=rf'<{prefix}invoke name="[^"<>]+">(?=\s*</?{prefix}(?:parameter name=|invoke>))',
            due=rf'^<{prefix}parameter name="(?P<key>[^"<>]*)">',
        )

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> tuple[list[Made], int]:
        """The calls from ``start`` on, one at least, and the place after them.

        Raises:
            CallFault: One of them cannot be read.
        """
        made: list[Made] = []
        position = skip_space(text, start)
        while opening := self._opening.match(text, position):
            call, end = self._read_one(text, opening, tools)
            made.append(call)
            position = skip_space(text, end)
        if not made:
            raise CallFault(f'expected <{self._prefix}invoke name="…">, found {found(text, start)}', position)
        return made, position

    def write(self, call: ToolCall) -> str:
        """The text of one call."""
        lines = [
            f'<{self._prefix}parameter name="{key}">{write_argument(value)}</{self._prefix}parameter>'
            for key, value in call.arguments.items()
        ]
        return "\n".join([f'<{self._prefix}invoke name="{call.name}">', *lines, self._closing])

    def _read_one(self, text: str, opening: re.Match[str], tools: Sequence[ToolSchema]) -> tuple[Made, int]:
        name = opening.group(1)
        parameters = parameters_of(name, tools)
        entries, end = self._arguments.read(text, opening.end(), known_arguments(parameters))
        if not text.startswith(self._closing, end):
            raise CallFault(f"expected {self._closing}, found {found(text, end)}", end)
        call = made_call(
            name, entries, lambda entry: read_argument(entry[1], entry[0]["key"], parameters), end
        )
        return call, end + len(self._closing)


_INVOKE = Invoke()
OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=_INVOKE.name, gap="\n")


class MiniMaxDialect:
    """``<minimax:tool_call><invoke …>…</invoke></minimax:tool_call>``, after thinking."""

    name = "minimax"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, _TAGS, lambda text, start: _INVOKE.read(text, start, tools))
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        return f"{OPEN}\n{_INVOKE.write(call)}\n{CLOSE}"
