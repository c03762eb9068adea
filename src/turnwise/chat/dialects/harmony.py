"""The harmony dialect: gpt-oss, whose reply is several messages on channels.

    <|channel|>analysis<|message|>Look first.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": 1}<|call|>

(without the line break). ``analysis`` is thinking; ``commentary`` to a function is a call, to nobody a word
before one; ``final`` is the answer. The recipient may stand before the channel or after it. The format is
described in OpenAI's cookbook, "OpenAI harmony response format".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from turnwise.chat.dialects.frames import MESSAGE, START, Frame, boundary_of, split_frames
from turnwise.chat.dialects.json_text import write_arguments
from turnwise.chat.dialects.tagged import CallFault, malformed, numbered, read_json, sound
from turnwise.types import Message, ToolCall, ToolSchema

_BOUNDARY = boundary_of("<|end|>", "<|call|>", "<|return|>")
_SIGNS = re.compile(r"<\|(?:channel|constrain)\|>")
_NAME = re.compile(r"to=functions\.([^\s<]+)")
_CHANNELS = ("analysis", "commentary", "final")


class HarmonyDialect:
    """Messages on channels; a call is one to ``functions.NAME`` on the commentary channel."""

    name = "harmony"
    tags = frozenset({START.removesuffix("assistant"), "<|channel|>", "<|constrain|>", MESSAGE, "<|call|>"})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. What is no message of the format is content; see `Dialect.parse`."""
        thoughts: list[str] = []
        contents: list[str] = []
        calls: list[ToolCall] = []
        for frame in split_frames(text, _BOUNDARY, _skip):
            header = _read_header(frame.header)
            if _is_call(frame, header):
                calls.append(_call(frame, header, len(calls)))
            elif header is None or frame.body is None:
                contents.append(frame.raw)
            elif header.channel == "analysis":
                thoughts.append(frame.body.strip("\n"))
            else:
                contents.append(frame.body)
        return Message.assistant(
            "\n".join(filter(None, contents)), *calls, reasoning="\n".join(filter(None, thoughts)) or None
        )

    def format(self, call: ToolCall) -> str:
        """One call as a whole message, which may follow others."""
        to = f"{START}<|channel|>commentary to=functions.{call.name} <|constrain|>json"
        return f"{to}{MESSAGE}{write_arguments(call)}<|call|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    recipient: str | None
    channel: str | None


def _read_header(text: str) -> _Header | None:
    """Recipient and channel in any order, then a word for the content's type; None for something else."""
    recipient: str | None = None
    channel: str | None = None
    words = iter(_SIGNS.sub(r" \g<0> ", text).split())
    for word in words:
        if word == "<|channel|>" and channel is None:
            channel = next(words, None)
        elif word.startswith("to=") and recipient is None:
            recipient = word.removeprefix("to=")
        elif (word != "<|constrain|>" and not word.isalpha()) or len(list(words)) > (word == "<|constrain|>"):
            return None
    return _Header(recipient=recipient, channel=channel)


def _is_call(frame: Frame, header: _Header | None) -> bool:
    """Whether a message is a call, or was meant to be something that is not there."""
    if header is None:
        return "to=functions." in frame.header and (frame.body is not None or "<|channel|>" in frame.header)
    strange = header.channel not in (None, *_CHANNELS) and frame.body is not None
    return header.recipient is not None or strange


def _skip(text: str, header: str, begin: int) -> int:
    if "to=functions." not in header:
        return begin
    try:
        return read_json(text, begin)[1]
    except CallFault:
        return begin


def _call(frame: Frame, header: _Header | None, index: int) -> ToolCall:
    """The call that a message is."""
    try:
        name = _recipient(frame, header)
        assert frame.body is not None
        arguments, end = read_json(frame.body, 0)
        if frame.body[end:].strip():
            raise CallFault("there is text after the arguments", end)
        return numbered([sound(name, arguments, end)], index)[0]
    except CallFault as fault:
        return malformed(frame.raw, str(fault), index, _NAME)


def _recipient(frame: Frame, header: _Header | None) -> str:
    """The tool that a message goes to."""
    if header is None:
        raise CallFault(f"the header {frame.header[:80]!r} cannot be read", 0)
    to, channel = header.recipient or "", header.channel
    if channel is not None and channel not in _CHANNELS:
        raise CallFault(f"there is no channel {channel!r}; there are: {', '.join(_CHANNELS)}", 0)
    if channel != "commentary":
        where = f"this one is on {channel!r}" if channel else "this one names no channel"
        raise CallFault(f"calls go to the commentary channel; {where}", 0)
    name = to.removeprefix("functions.")
    if name == to or not name:
        raise CallFault(f"there is no recipient {to!r}; a tool is called with to=functions.NAME", 0)
    if frame.body is None:
        raise CallFault(f"{MESSAGE} and the arguments are missing", 0)
    return name
