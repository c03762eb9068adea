"""The Gemma dialects: calls in a notation of their own, its strings between quote tokens.

Gemma 4:

    <|channel>thought
    Left, then.
    <channel|><|tool_call>call:move{direction:<|"|>left<|"|>,steps:[1,2],opts:{fast:true}}<tool_call|>

FunctionGemma (Gemma 3): the same between ``<start_function_call>`` and ``<end_function_call>``, strings
between ``<escape>``, no thinking channel.

A string ends at the next quote token, and only there: it may hold closing tags. There is no way to write the
quote token itself in one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turnwise.chat.dialects.literals import LiteralReader
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, read_json, read_tagged, sound, split_between
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

_CHANNEL_NAME = re.compile(r"\Athought(?:\n|\Z)")
_NAME = re.compile(r"call:\s*([^\s{}<>]+)")
_NAME_HERE = re.compile(r"[^\s{}<>]+")
_KEY = re.compile(r"[^:,\[\]{}]+")
# Keys that the notation's signs would cut stand between quote tokens.
_PLAIN_KEY = re.compile(r"[^\s:,\[\]{}<>\"]+")


class GemmaDialect:
    """``call:NAME{key:value,…}`` between two tags.

    Args:
        name: Of the dialect.
        opening: The tag before a call.
        closing: The tag after it.
        quote: The token at both ends of a string.
        split: From the text, and whether the thinking is open already, to the thinking and the rest.
    """

    def __init__(
        self,
        name: str,
        *,
        opening: str,
        closing: str,
        quote: str,
        split: Callable[..., tuple[str | None, str]] = split_thinking,
    ) -> None:
        self.name = name
        self.tags = frozenset({opening, closing, quote})
        self._tags = Tags(opening=opening, closing=closing, name=_NAME)
        self._quote, self._split = quote, split

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = self._split(text, opened=thinking)
        content, calls = read_tagged(text, self._tags, self._read)
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, arguments in the order that they have."""
        body = self._write(dict(call.arguments))
        return f"{self._tags.opening}call:{call.name}{body}{self._tags.closing}"

    def _read(self, text: str, start: int) -> tuple[list[Made], int]:
        reader = _GemmaReader(text, start, self._quote)
        reader.need("call:")
        name = reader.match(_NAME_HERE)
        if not name:
            raise reader.fault("the tool's name")
        reader.need("{")
        arguments = reader.entries("}", reader.key, ":", 1)
        return [sound(name, arguments, reader.at)], reader.at

    def _write(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote}{value}{self._quote}"
        if isinstance(value, Mapping):
            return (
                "{" + ",".join(f"{self._key(key)}:{self._write(item)}" for key, item in value.items()) + "}"
            )
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(self._write, value)) + "]"
        return json.dumps(value)

    def _key(self, key: str) -> str:
        return key if _PLAIN_KEY.fullmatch(key) else self._write(key)


class _GemmaReader(LiteralReader):
    """Reads what stands between a call's tags."""

    def __init__(self, text: str, at: int, quote: str) -> None:
        super().__init__(text, at)
        self._quote = quote
        self.quotes = f"a string stands between {quote} and {quote}"

    def string(self) -> str | None:
        if self.take(self._quote):
            start = self.at
            end = self.text.find(self._quote, start)
            if end < 0:
                raise CallFault(f"a string is not closed by {self._quote}", start)
            self.at = end + len(self._quote)
            return self.text[start:end]
        if self.take('"'):
            # JSON's own way cannot be misread, and models write it.
            string, self.at = read_json(self.text, self.at - 1)
            return str(string)
        return None

    def key(self) -> str:
        string = self.string()
        if string is None:
            string = self.match(_KEY).strip()
            if not string:
                raise self.fault("a key")
        return string


def split_channels(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    r"""Thinking between Gemma 4's channel tokens at a reply's beginning, and the rest of the reply.

    >>> split_channels("<|channel>thought\nTwo and two.\n<channel|>Four.")
    ('Two and two.', 'Four.')
    """
    thought, rest = split_between(text, "<|channel>", "<channel|>", opened=opened, call="<|tool_call>")
    return _CHANNEL_NAME.sub("", thought or "").lstrip("\n") or None, rest


GEMMA = GemmaDialect(
    "gemma", opening="<|tool_call>", closing="<tool_call|>", quote='<|"|>', split=split_channels
)
FUNCTION_GEMMA = GemmaDialect(
    "function_gemma", opening="<start_function_call>", closing="<end_function_call>", quote="<escape>"
)
