"""Thinking in ``<think>…</think>`` at a reply's beginning, as most reasoning models write it."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"

_BLOCK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def split_thinking(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    r"""Reasoning and the rest of a reply.

    >>> split_thinking("<think>\nTwo and two.\n</think>\n\nFour.")
    ('Two and two.', 'Four.')
    >>> split_thinking("Two and", opened=True)  # cut before it was done
    ('Two and', '')

    Args:
        text: The reply's text.
        opened: The generation prompt ended with ``<think>``: the reply begins inside of it.
    """
    if not opened:
        stripped = text.lstrip()
        if not stripped.startswith(OPEN):
            return None, text
        text = stripped[len(OPEN) :]
    elif text.lstrip().startswith(OPEN):
        text = text.lstrip()[len(OPEN) :]
    inside, _, rest = text.partition(CLOSE)
    return inside.strip("\n") or None, rest.lstrip("\n")


def without_thinking(text: str) -> str:
    """``text`` with every closed block of thinking left out, and the white space after it."""
    return _BLOCK.sub("", text)
