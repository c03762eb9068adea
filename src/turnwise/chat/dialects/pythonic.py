"""The pythonic dialects: a list of Python calls, between tags (LFM2) or as the whole reply.

    I will look.<|tool_call_start|>[move(direction='left', steps=3), look()]<|tool_call_end|>

Only literals are read; nothing is evaluated. Beyond Python's own notation three things are taken, since the
families' templates write them and no Python could be meant: ``true``, ``false`` and ``null``, raw line breaks
in strings, and an apostrophe inside a word (``'it's'``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from turnwise.chat.dialects.literals import LiteralReader
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, read_tagged, read_whole, sound
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

_NAME = re.compile(r"([^\s,=()\[\]{}'\"<>|]+)\s*\(")
_NAME_HERE = re.compile(r"[^\s,=()\[\]{}'\"<>|]+(?=\s*\()")
_KEY_HERE = re.compile(r"[^\s,=()\[\]{}'\"<>|]+(?=\s*=)")
_BEGINS = re.compile(rf"\s*\[\s*{_NAME.pattern}\s*(?:\)|[^\s,=()\[\]{{}}'\"]+\s*=(?!=))")

# What may stand in a string, by its quotes. Possessive: a long string keeps no places to come back to.
_STRINGS = {
    '"""': re.compile(r'(?:[^"\\]|\\.|"(?!""))*+', re.DOTALL),
    "'''": re.compile(r"(?:[^'\\]|\\.|'(?!''))*+", re.DOTALL),
    '"': re.compile(r'(?:[^"\\]|\\.)*+', re.DOTALL),
    "'": re.compile(r"(?:[^'\\]|\\.|(?<=\w)'(?=\w))*+", re.DOTALL),
}
_ESCAPE = re.compile(
    r"\\(?:[abfnrtv\\'\"\n]|[0-7]{1,3}|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|N\{[^{}]*\})"
)


class PythonicDialect:
    """``[name(key=value, …), …]``, after thinking in ``<think>…</think>``.

    Args:
        name: Of the dialect.
        opening: The tag before a list of calls; without one the whole reply is the list.
        closing: The tag after it.
    """

    def __init__(self, name: str, *, opening: str = "", closing: str = "") -> None:
        self.name = name
        self.tags = frozenset({opening, closing} - {""})
        self._tags = Tags(opening=opening, closing=closing, name=_NAME)

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        if self.tags:
            content, calls = read_tagged(text, self._tags, _read)
        elif _BEGINS.match(text):
            content, calls = "", read_whole(text, 0, _read, _NAME)
        else:
            content, calls = text, []
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
        return f"{self._tags.opening}[{call.name}({arguments})]{self._tags.closing}"


def _read(text: str, start: int) -> tuple[list[Made], int]:
    reader = _PythonReader(text, start)
    made: list[Made] = []
    reader.need("[")
    reader.each("]", lambda: made.append(reader.call()))
    if not made:
        raise CallFault("the list of calls is empty", reader.at)
    return made, reader.at


class _PythonReader(LiteralReader):
    """Reads calls and literals."""

    quotes = "a string stands between quotes"

    def call(self) -> Made:
        """``name(key=value, …)``."""
        name = self.match(_NAME_HERE)
        if not name:
            raise self.fault("name(key=value, …)")
        self.need("(")
        arguments = self.entries(")", self._parameter, "=", 1)
        return sound(name, arguments, self.at)

    def string(self) -> str | None:
        quote = next((quote for quote in _STRINGS if self.take(quote)), None)
        if quote is None:
            return None
        start = self.at
        inside = _STRINGS[quote].match(self.text, start)
        assert inside is not None
        if not self.text.startswith(quote, inside.end()):
            raise CallFault(f"a string is not closed by {quote}", start)
        self.at = inside.end() + len(quote)
        try:
            return _ESCAPE.sub(lambda match: _unescaped(match.group()), inside.group())
        except UnicodeDecodeError as cause:
            raise CallFault(f"{cause.object.decode()} is no character", start) from cause

    def key(self) -> str:
        string = self.string()
        if string is None:
            raise self.fault("a key between quotes")
        return string

    def _parameter(self) -> str:
        key = self.match(_KEY_HERE)
        if not key:
            raise self.fault("key=value (arguments are given by name)")
        return key


def _unescaped(escape: str) -> str:
    return escape.encode().decode("unicode_escape")


LFM = PythonicDialect("lfm", opening="<|tool_call_start|>", closing="<|tool_call_end|>")
PYTHONIC = PythonicDialect("pythonic")
