"""Replies of several messages, each with a header that says to whom it goes: gpt-oss and Muse.

    <|channel|>analysis<|message|>Look first.<|end|><|start|>assistant to=functions.look<|channel|>…
    └─── header ──┘             └── body ──┘       └─────── the next message ──────────────────────

The generation prompt is ``<|start|>assistant``, so a reply begins with a header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

START, MESSAGE = "<|start|>assistant", "<|message|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of a reply."""

    header: str
    """What stands before ``<|message|>``; all of it where there is none."""
    body: str | None
    """What stands after it; None where there is no ``<|message|>``."""
    raw: str
    """The message as it stands in the reply, the token that ends it included."""


def boundary_of(*ends: str) -> re.Pattern[str]:
    """What ends a message: one of a family's tokens where the next message or nothing follows.

    The same token within a message's text ends nothing. A next message is one that has a header.
    """
    end = "|".join(map(re.escape, ends))
    following = rf"(?={re.escape(START)}\s*(?:to=|<\|channel\|>|<\|message\|>|$))"
    return re.compile(rf"(?:{end})\s*(?:{following}|(?=<\|start\|>[a-z]*$)|$)|{following}")


def split_frames(
    text: str, boundary: re.Pattern[str], skip: Callable[[str, str, int], int]
) -> Iterator[Frame]:
    """The messages of a reply, in order.

    Args:
        text: The reply.
        boundary: Of the family.
        skip: From the reply, a header and the place where a body begins to the place before which it does not
            end: the end of a call's JSON, which may hold anything.
    """
    start = 0
    while start < len(text):
        inside = start + len(START) if text.startswith(START, start) else start
        message = text.find(MESSAGE, inside)
        stop = boundary.search(text, inside)
        if message >= 0 and (stop is None or message < stop.start()):
            header, begin = text[inside:message], message + len(MESSAGE)
            stop = boundary.search(text, skip(text, header, begin))
            body: str | None = text[begin : stop.start() if stop else len(text)]
        else:
            header, body = text[inside : stop.start() if stop else len(text)], None
        end = stop.end() if stop else len(text)
        yield Frame(header=header, body=body, raw=text[start:end])
        start = end
