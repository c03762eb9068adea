"""What environments return, made into what policies are told: text or blocks, cut to a limit, always JSON.

Runs where the environment runs (its thread, its process), so that a 10 MB result never stops the event loop.
"""

from __future__ import annotations

import copy
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from turnwise import images
from turnwise.errors import EnvError, ImageError, ScoringError, TaskError
from turnwise.types import Content, ImageBlock, Message, Role, Step, TextBlock, ToolCall

Blocks = tuple[TextBlock | ImageBlock, ...]


class BadResultError(Exception):
    """A result that is no observation; the message ends the sentence "it returned …"."""


def observation(value: Any, limit: int | None) -> Content:
    """Text as it is, images and content blocks as blocks, other JSON values as compact JSON text.

    Args:
        value: What a method returned.
        limit: Characters to keep; None keeps all.

    Raises:
        BadResultError: ``value`` is none of these.
    """
    if isinstance(value, str):
        return cut(value, limit)
    found = blocks(value)
    if found is not None:
        return _cut_blocks(found, limit)
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise BadResultError(f"{not_json(value)}; return text, JSON values or a Step") from None
    return cut(text, limit)


def blocks(value: Any, *, text: bool = False) -> Blocks | None:
    """Content blocks in any of the forms in which they are written; None for anything else.

    Those are our own, PIL images, and mappings as TRL and OpenAI have them: ``{"type": "text", "text": …}``,
    ``{"type": "image", "image": a PIL image or the bytes of a file}``, ``{"type": "image_url", "image_url":
    {"url": "data:image/png;base64,…"}}``. Beside an image, text may also stand as it is.

    Args:
        value: One of these or a list of them.
        text: Mappings of text are blocks also where no image is among them; else they are JSON like any.

    Raises:
        BadResultError: One says that it is an image, and is none.
    """
    if isinstance(value, TextBlock | ImageBlock) or images.is_image(value):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        return None
    kinds = {_kind(part) for part in value}
    if None in kinds or not (kinds & {"own", "image"} or (text and kinds == {"text"})):
        return None
    return tuple(_block(part) for part in value)


def _kind(part: Any) -> Literal["own", "image", "text"] | None:
    """What a part of a list would be as a block."""
    if isinstance(part, TextBlock | ImageBlock):
        return "own"
    if images.is_image(part) or images.named(part) is not None:
        return "image"
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        return None
    if part.get("type") == "text" and part.keys() == {"type", "text"}:
        return "text"
    for kind in ("image", "image_url"):
        if part.get("type") == kind and part.keys() <= {"type", kind}:
            return "image"
    return None


def _block(part: Any) -> TextBlock | ImageBlock:
    if isinstance(part, TextBlock | ImageBlock):
        return part
    if isinstance(part, str):
        return TextBlock(text=part)
    if isinstance(part, Mapping) and part["type"] == "text":
        if not isinstance(part["text"], str):
            raise BadResultError(f"a text block whose text is {_a(part['text'])}")
        return TextBlock(text=part["text"])
    image = part
    if isinstance(part, Mapping) and images.named(part) is None:
        image = _file(part["image_url"]) if "image_url" in part else part.get("image")
    if (block := images.named(image)) is not None:
        return block
    if not (isinstance(image, bytes) or images.is_image(image)):
        raise BadResultError(f"an image block that holds {_a(image)}; it takes a PIL image or a file's bytes")
    try:
        return images.put(image)
    except ImageError as cause:
        raise BadResultError(f"an image that cannot be used: {cause}") from cause


def _file(url: Any) -> bytes:
    try:
        return images.read_url(url)[1]
    except ImageError as cause:
        raise BadResultError(str(cause)) from cause


def cut(text: str, limit: int | None) -> str:
    """At most ``limit`` characters of ``text`` and a note of how many are missing; always valid UTF-8."""
    if limit is not None and len(text) > limit:
        missing = len(text) - limit
        text = f"{text[:limit]}\n[{missing} more characters cut off: the limit is {limit}]"
    # A lone surrogate (a bad \ud800 escape) would break the tokenizer far from here.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """The messages that a `reset` returned: text or blocks are one user message.

    Raises:
        EnvError: Nothing that a policy could answer.
    """
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(one, Message) for one in value):
            if value[-1].role == "assistant":
                raise EnvError(f"{what} ended with an assistant message: the policy has nothing to answer")
            return tuple(replace(_sound(one, what), content=observation(one.content, None)) for one in value)
        if isinstance(value, str) or blocks(value) is not None:
            return (Message.user(observation(value, None)),)
    except BadResultError as cause:
        raise EnvError(f"{what} returned {cause}") from cause
    found = "an empty list" if value == [] else _a(value)
    raise EnvError(f"{what} returned {found}; return text, content blocks or a list of Message")


def step(value: Any, limit: int, what: str) -> Step:
    """A `Step` with its observation cut and its reward checked.

    Raises:
        BadResultError: The observation is none.
        ScoringError: The reward is not a finite number.
        EnvError: Both ends at once, or info that is no JSON object.
    """
    if not isinstance(value, Step):
        raise BadResultError(f"{_a(value)}, not a Step")
    if value.terminated and value.truncated:
        raise EnvError(f"{what} returned a Step that is both terminated and truncated; set one")
    info: dict[str, Any] = {} if type(value.info) is dict and not value.info else _info(value.info, what)
    seen = value.observation
    told: Content | list[Message]
    if isinstance(seen, list) and seen and isinstance(seen[0], Message):
        told = [replace(_sound(one, what), content=observation(one.content, limit)) for one in seen]
    else:
        told = observation(seen, limit)
    reward = None if value.reward is None else finite(value.reward, f"{what}: reward")
    # Ends may be numpy's.
    return Step(
        told, reward=reward, terminated=bool(value.terminated), truncated=bool(value.truncated), info=info
    )


def _info(value: Any, what: str) -> dict[str, Any]:
    """A step's info as it was said: what the environment goes on changing is not in it."""
    if not isinstance(value, Mapping):
        raise EnvError(f"{what} returned a Step whose info is {_a(value)}; it must be a JSON object")
    problem = json_problem(value)
    if problem:
        raise EnvError(f"{what} returned a Step whose info is not JSON: {problem}")
    return copy.deepcopy(dict(value))


def spoken(message: Message, what: str) -> Message:
    """A demonstrator's message as it was said: what the environment goes on changing is not in it.

    Raises:
        EnvError: It cannot be stored: a call's arguments are not JSON, a part is of the wrong type.
    """
    _sound(message, what)
    if not isinstance(message.content, str) and blocks(message.content) != message.content:
        raise EnvError(f"{what} returned a message whose content is {_a(message.content)}")
    calls = tuple(replace(call, arguments=copy.deepcopy(dict(call.arguments))) for call in message.tool_calls)
    return replace(message, tool_calls=calls) if calls else message


def _sound(message: Any, what: str) -> Message:
    """A message that can be read back when it was stored; its content is the caller's to look at.

    Raises:
        EnvError: It is none.
    """
    if not isinstance(message, Message):
        raise EnvError(f"{what} returned {_a(message)} among its messages; each must be a Message")
    if message.role not in get_args(Role):
        allowed = ", ".join(get_args(Role))
        raise EnvError(f"{what} returned a message of role {message.role!r:.40}; allowed are {allowed}")
    for part in ("reasoning", "tool_call_id", "name"):
        value = getattr(message, part)
        if not isinstance(value, str | None):
            raise EnvError(f"{what} returned a message whose {part} is {_a(value)}; it must be text or None")
    for call in message.tool_calls:
        if not isinstance(call, ToolCall) or not isinstance(call.name, str) or not isinstance(call.id, str):
            raise EnvError(f"{what} returned a message with a tool call that is no ToolCall of text and JSON")
        problem = json_problem(call.arguments)
        if problem:
            raise EnvError(f"{what}: the arguments of its call of {call.name} are not JSON: {problem}")
    return message


def rewards(value: Any, what: str) -> dict[str, float | None]:
    """Rewards by name; a lone number is called ``reward``, and a named None does not apply.

    Raises:
        ScoringError: Something other than finite numbers.
    """
    if isinstance(value, Mapping):
        return {
            str(name): None if part is None else finite(part, f"{what}: reward '{name}'")
            for name, part in value.items()
        }
    return {"reward": finite(value, f"{what}: reward")}


def finite(value: Any, what: str) -> float:
    """A reward as a float.

    Raises:
        ScoringError: It is not a finite number.
    """
    if type(value) is not float and not isinstance(value, numbers.Real | np.bool_):
        raise ScoringError(f"{what}: expected a number; found {_a(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise ScoringError(f"{what}: expected a finite number; found {number}")
    return number


def task_row(row: Any, what: str) -> dict[str, Any]:
    """A task as it will be read back from disk: a JSON object, tuples as lists.

    Raises:
        TaskError: It is not a JSON object.
    """
    if not isinstance(row, Mapping):
        raise TaskError(f"{what}: a task is a JSON object; found {_a(row)}")
    row = _with_images_named(row)
    problem = json_problem(row)
    if problem:
        raise TaskError(f"{what}: a task must be JSON, so that runs can store it: {problem}")
    copy: dict[str, Any] = json.loads(json.dumps(row, default=dict))
    return copy


def _with_images_named(value: Any) -> Any:
    """A row with its PIL images stored, and what stands for them in JSON."""
    if images.is_image(value):
        return images.as_json(value)
    if isinstance(value, Mapping):
        return {name: _with_images_named(one) for name, one in value.items()}
    return [_with_images_named(one) for one in value] if isinstance(value, list | tuple) else value


def json_problem(value: Any, path: str = "", depth: int = 0) -> str | None:
    """The first place where ``value`` is not JSON, in words; None for JSON. Tuples pass as lists."""
    if value is None or isinstance(value, str | bool | int):
        return None
    at = f" at {path}" if path else ""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value}{at}"
    if depth > 200:
        return f"more than 200 levels{at[:40]}"
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                return f"a key that is {_a(key)}{at}"
            problem = json_problem(part, f"{path}.{key}" if path else key, depth + 1)
            if problem:
                return problem
        return None
    if isinstance(value, list | tuple):
        for index, part in enumerate(value):
            problem = json_problem(part, f"{path}[{index}]", depth + 1)
            if problem:
                return problem
        return None
    return f"{_a(value)}{at}"


def not_json(value: Any) -> str:
    """Why ``value`` is not JSON: ``a set, which is not JSON``."""
    if isinstance(value, bytes | bytearray):
        return f'{_a(value)}, which is no result; an image is {{"type": "image", "image": …}} or a PIL image'
    problem = json_problem(value)
    return f"{problem or _a(value)}, which is not JSON"


def _a(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _cut_blocks(blocks: Blocks, limit: int | None) -> Blocks:
    left, out = limit, list[TextBlock | ImageBlock]()
    for block in blocks:
        if isinstance(block, TextBlock):
            text = cut(block.text, left)
            if left is not None:
                left = max(0, left - len(block.text))
            block = TextBlock(text=text)
        out.append(block)
    return tuple(out)
