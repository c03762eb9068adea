"""The ATEM dialect: Muse, whose reply is several messages, each to itself, to a tool or to the user.

     to=self<|message|>Look first.<|eom|>
    <|start|>assistant to=look<|message|><atem:function_calls>
    <atem:invoke name="look">
    <atem:parameter name="at">door</atem:parameter>
    </atem:invoke>
    </atem:function_calls><|eot|>

(without the line break after ``<|eom|>``). The generation prompt is ``<|start|>assistant``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from turnwise.chat.dialects.frames import MESSAGE, START, Frame, boundary_of, split_frames
from turnwise.chat.dialects.invoke import Invoke
from turnwise.chat.dialects.json_text import skip_space
from turnwise.chat.dialects.tagged import CallFault, Made, found, malformed, numbered
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<atem:function_calls>", "</atem:function_calls>"
_BOUNDARY = boundary_of("<|eom|>", "<|eot|>")
_INVOKE = Invoke("atem:")
_NAME = re.compile(r'(?:to=(?!user<)|<atem:invoke name=")([^\s<>"]+)')


class AtemDialect:
    """Messages with recipients; one to a tool holds ``<atem:function_calls>``."""

    name = "atem"
    tags = frozenset({START.removesuffix("assistant"), MESSAGE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. What is no message of the format is content; see `Dialect.parse`."""
        thoughts: list[str] = []
        contents: list[str] = []
        calls: list[ToolCall] = []
        for frame in split_frames(text, _BOUNDARY, lambda text, header, begin: begin):
            recipient = _recipient(frame)
            if recipient == "self":
                thoughts.append((frame.body or "").strip("\n"))
            elif recipient is None and frame.body is None:
                contents.append(frame.raw)
            elif recipient in (None, "user") and not (frame.body or "").lstrip().startswith(OPEN):
                contents.append(frame.body or "")
            else:
                try:
                    calls += numbered(_calls(frame, recipient, tools), len(calls))
                except CallFault as fault:
                    calls.append(malformed(frame.raw, str(fault), len(calls), _NAME))
        return Message.assistant(
            "\n".join(filter(None, contents)), *calls, reasoning="\n".join(filter(None, thoughts)) or None
        )

    def format(self, call: ToolCall) -> str:
        """One call as a whole message, which may follow others."""
        return f"{START} to={call.name}{MESSAGE}{OPEN}\n{_INVOKE.write(call)}\n{CLOSE}<|eom|>"


def _recipient(frame: Frame) -> str | None:
    """To whom a message goes; None where its header does not say."""
    words = frame.header.split()
    if len(words) != 1 or not words[0].startswith("to="):
        return None
    return words[0].removeprefix("to=") or None


def _calls(frame: Frame, recipient: str | None, tools: Sequence[ToolSchema]) -> list[Made]:
    """The calls in a message to a tool."""
    if recipient in (None, "user"):
        raise CallFault("a call goes to its tool: <|start|>assistant to=NAME", 0)
    if frame.body is None:
        raise CallFault(f"{MESSAGE} and the call are missing", 0)
    start = skip_space(frame.body, 0)
    if not frame.body.startswith(OPEN, start):
        raise CallFault(f"expected {OPEN}, found {found(frame.body, start)}", start)
    made, end = _INVOKE.read(frame.body, start + len(OPEN), tools)
    if not frame.body.startswith(CLOSE, end):
        raise CallFault(f"expected {CLOSE}, found {found(frame.body, end)}", end)
    if frame.body[end + len(CLOSE) :].strip():
        raise CallFault(f"there is text after {CLOSE}", end)
    for name, _ in made:
        if name != recipient:
            raise CallFault(f"the message goes to {recipient!r}, its call to {name!r}", end)
    return made
