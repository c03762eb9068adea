"""Thinking at a reply's beginning: ``<think>…</think>``, as most reasoning models write it, and its likes."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"

_BLOCK = re.compile(
    r"<think>.*?</think>\s*"
    r"|</think>\s*"  # DeepSeek V3.1 writes a past reply without the opening tag
    r"|<\|channel>thought.*?<channel\|>\s*"  # Gemma 4
    r"|<\|channel\|>analysis<\|message\|>.*?<\|end\|>(?:<\|start\|>assistant)?"  # gpt-oss
    r"| to=self<\|message\|>.*?<\|eom\|>(?:<\|start\|>assistant)?",  # Muse
    re.DOTALL,
)


def opens_thinking(asked: str) -> bool:
    """Whether the text that asks for a reply ends inside of its thinking."""
    return asked.rstrip().endswith((OPEN, "<|channel>thought"))


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
