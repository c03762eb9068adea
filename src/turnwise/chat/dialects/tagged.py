"""Calls between an opening and a closing tag: the walk over a reply that several families share.

A family names its tags and reads what stands between them. Here the text around the calls becomes the
content, and what cannot be read becomes one malformed call that keeps its text. Calls that share one pair of
tags stand or fall together: half of a list is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.chat.dialects.json_text import call_fault, read_value, reason, skip_space
from turnwise.types import ToolCall

Made = tuple[str, dict[str, Any]]
"""A call that was read: its name and its arguments."""
Reading = Callable[[str, int], tuple[Sequence[Made], int]]
"""From a text and a place in it to the calls there and the place after them; raises `CallFault`."""


class CallFault(ValueError):
    """What keeps a text from being a call.

    Args:
        said: What is wrong, in words for the policy.
        at: Where reading stopped: tags before it are part of what was read.
    """

    def __init__(self, said: str, at: int) -> None:
        super().__init__(said)
        self.at = at


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """Between what the calls of a family stand."""

    opening: str
    closing: str
    name: re.Pattern[str]
    """Finds the name (its group) in a call that could not be read."""
    gap: str = ""
    """White space that the family's templates write between content and call."""


def read_tagged(text: str, tags: Tags, read: Reading) -> tuple[str, list[ToolCall]]:
    """A reply's content and calls.

    Args:
        text: The reply, its thinking left out.
        tags: Of the family.
        read: Reads what stands after an opening tag.
    """
    start = text.find(tags.opening)
    if start < 0:
        return text, []
    contents = [text[:start].removesuffix(tags.gap)]
    calls: list[ToolCall] = []
    while start >= 0:
        try:
            made, end = read(text, start + len(tags.opening))
            end = skip_space(text, end)
            if not text.startswith(tags.closing, end):
                following = text.find(tags.opening, end)
                closed = text.find(tags.closing, end, following if following >= 0 else len(text)) >= 0
                raise CallFault(f"there is text between the call and {tags.closing}" if closed else "", end)
            end += len(tags.closing)
            calls += numbered(made, len(calls))
        except CallFault as fault:
            error, end = _extent(text, tags, fault)
            calls.append(malformed(text[start:end].rstrip(), error, len(calls), tags.name))
        start = text.find(tags.opening, end)
        between = text[end : start if start >= 0 else len(text)].strip()
        if between:
            contents.append(between)
    return "\n".join(contents if contents[0] else contents[1:]), calls


def read_whole(text: str, start: int, read: Reading, name: re.Pattern[str]) -> list[ToolCall]:
    """The calls of a reply that is nothing but calls, without tags.

    Args:
        text: The reply, its thinking left out.
        start: Where the calls begin.
        read: As for `read_tagged`.
        name: As in `Tags`.
    """
    try:
        made, end = read(text, start)
        if text[end:].strip():
            raise CallFault("there is text after the calls", end)
    except CallFault as fault:
        return [malformed(text.strip(), str(fault), 0, name)]
    return numbered(made, 0)


def numbered(made: Sequence[Made], first: int) -> list[ToolCall]:
    """Calls with their ids, the first of which is ``call_<first>``."""
    return [
        ToolCall(name=name, arguments=arguments, id=f"call_{index}")
        for index, (name, arguments) in enumerate(made, start=first)
    ]


def malformed(raw: str, error: str, index: int, name: re.Pattern[str]) -> ToolCall:
    """A call that cannot be made, under the name that it seems to have."""
    named = name.search(raw)
    return ToolCall(
        name=named.group(1) if named else "", arguments={}, id=f"call_{index}", error=error, raw=raw
    )


def _extent(text: str, tags: Tags, fault: CallFault) -> tuple[str, int]:
    """What is wrong, and where the malformed call ends.

    It reaches to its closing tag, or to where another call opens, or to the end.
    """
    said, opening = str(fault), text.find(tags.opening, fault.at)
    stop = opening if opening >= 0 else len(text)
    close = text.find(tags.closing, fault.at, stop)
    if close >= 0:
        return said, close + len(tags.closing)
    return f"{said}, and {tags.closing} is missing" if said else f"{tags.closing} is missing", stop


def split_between(
    text: str, opening: str, closing: str, *, opened: bool, call: str
) -> tuple[str | None, str]:
    """Thinking between a family's own tokens at a reply's beginning, and the rest of the reply.

    A generation prompt may have opened the thinking after some messages only. So a reply whose first token of
    these is the closing one began inside.

    Args:
        text: The reply's text.
        opening: The token before the thinking.
        closing: The token after it.
        opened: The generation prompt opened the thinking for certain.
        call: The tag that opens a call: whatever follows it is not thinking.
    """
    end, stripped = text.find(closing), text.lstrip()
    inside = opened or (end >= 0 and opening not in text[:end] and call not in text[:end])
    if not inside and not stripped.startswith(opening):
        return None, text
    thought, _, rest = stripped.removeprefix(opening).partition(closing)
    return thought.strip("\n") or None, rest.lstrip("\n")


def found(text: str, position: int) -> str:
    """What stands at a place, for faults."""
    position = skip_space(text, position)
    return repr(text[position : position + 20]) if position < len(text) else "the end"


def sound(name: str, arguments: Any, end: int) -> Made:
    """A call whose name and arguments were read.

    Raises:
        CallFault: They are none of a call, or cannot be stored.
    """
    error = call_fault({"name": name, "arguments": arguments})
    if error is not None:
        raise CallFault(error, end)
    return name, arguments


def read_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, white space before it left out, and where it ends.

    Raises:
        CallFault: There is none.
    """
    start = skip_space(text, start)
    try:
        return read_value(text, start)
    except (ValueError, RecursionError) as cause:
        raise CallFault(f"the call is not valid JSON: {reason(cause)}", start) from cause


def read_json_calls(
    text: str, start: int, *, name: str = "name", arguments: str = "arguments"
) -> tuple[list[Made], int]:
    """Calls written as a JSON object, or as a list of such.

    Args:
        text: Where they stand.
        start: Where they begin.
        name: The key of a call's name.
        arguments: The key of its arguments.

    Raises:
        CallFault: Any of them is no call.
    """
    body, end = read_json(text, start)
    bodies = body if isinstance(body, list) else [body]
    if not bodies:
        raise CallFault("the list of calls is empty", end)
    for number, each in enumerate(bodies, start=1):
        error = call_fault(each, arguments, name=name)
        if error is not None:
            raise CallFault(error if len(bodies) == 1 else f"call {number} of {len(bodies)}: {error}", end)
    return [(each[name], each.get(arguments, {})) for each in bodies], end
