"""JSON as models write it: read strictly where it matters, with every fault said in words.

Shared by the dialects whose calls are JSON objects, and by those that write single arguments as JSON.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from turnwise.types import ToolCall

DEEPEST = 64
"""Levels of a call's JSON. A policy can write a thousand brackets, and who stores the call recurses."""

NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
"""Finds the name (its group) in the JSON of a call, well written or not."""

_SPACE = re.compile(r"\s*")
_ARGUMENTS = ("arguments", "parameters")
"""Under which one family or another writes them: models mix them up."""


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


# Not strict: a raw line break inside a string cannot be misread, and models write it.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)


def read_value(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends.

    Raises:
        ValueError: There is none; `reason` says why in words.
        RecursionError: It is nested past what Python reads.
    """
    return _DECODER.raw_decode(text, start)


def skip_space(text: str, start: int) -> int:
    """The first place from ``start`` on that is no white space."""
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def write_call(call: ToolCall, arguments: str = "arguments") -> str:
    """The JSON object of a call, with its arguments under this key."""
    return json.dumps({"name": call.name, arguments: dict(call.arguments)}, ensure_ascii=False)


def write_arguments(call: ToolCall) -> str:
    """The JSON object of a call's arguments."""
    return json.dumps(dict(call.arguments), ensure_ascii=False)


def call_fault(body: Any, key: str = "arguments", *, name: str = "name") -> str | None:
    """What makes a JSON value unusable as a call; None for a good one.

    Args:
        body: What was read.
        key: Under which the family writes the arguments.
        name: Under which it writes the tool's name.
    """
    if not isinstance(body, dict):
        return f'the call must be an object {{"{name}": …, "{key}": {{…}}}}, not {kind(body)}'
    tool, arguments = body.get(name), body.get(key, {})
    if not isinstance(tool, str) or not tool:
        return f'the call has no "{name}"'
    misplaced = next((other for other in _ARGUMENTS if other in body and key not in body), None)
    if misplaced is not None:
        return f'the arguments must stand under "{key}", not under "{misplaced}"'
    if not isinstance(arguments, dict):
        return f'"{key}" must be an object, not {kind(arguments)}'
    return value_fault(body)


def value_fault(value: Any) -> str | None:
    """What keeps a JSON value from being stored or shown; None for a good one."""
    if too_deep(value, DEEPEST + 1):
        return f"it is nested too deeply: {DEEPEST} levels are allowed"
    # An escape such as \\ud800 decodes to half a character, which no file and no tokenizer can hold.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        return reason(cause)
    return None


def too_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether a JSON value has more than so many levels."""
    level = [value]
    for _ in range(levels):
        inner = [part for part in level if isinstance(part, (list, dict))]
        level = [item for part in inner for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return False
    return any(isinstance(part, (list, dict)) for part in level)


def kind(value: Any) -> str:
    """A JSON value's type, for people."""
    if value is None:
        return "null"
    return {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}.get(
        type(value), "a number"
    )


def reason(cause: Exception) -> str:
    """Why JSON could not be read, for the policy."""
    if isinstance(cause, json.JSONDecodeError):
        return f"{cause.msg.removesuffix(' at')} at character {cause.pos}"
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    if isinstance(cause, UnicodeEncodeError):
        return "it holds an unpaired surrogate"
    return str(cause)
