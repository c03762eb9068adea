"""OpenEnv's frames, read and written: text frames of JSON, one reply for each request, no request ids.

    {"type": "reset", "data": {"seed": 1}}          -> {"type": "observation", "data": {"observation": …}}
    {"type": "step", "data": {<action's fields>}}   -> {"type": "observation", …}
    {"type": "state"}                               -> {"type": "state", "data": {…}}
    {"type": "mcp", "data": {<JSON-RPC>}}           -> {"type": "mcp", "data": {<JSON-RPC>}}
    {"type": "turnwise", "data": {"method": …}}     -> {"type": "turnwise", "data": …}, between Turnwise peers
    {"type": "close"}                               -> no reply

What went wrong is ``{"type": "error", "data": {"message", "code", …}}``. Messages with their images, and rows
of tasks with theirs, cross as JSON too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Literal, get_args

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from turnwise import images
from turnwise.errors import ActionError, EnvError, TurnwiseError, said
from turnwise.openenv.served import Answer
from turnwise.types import Content, ImageBlock, Message, Role, TextBlock, ToolCall

PROTOCOL = 1
"""Of what Turnwise peers say to each other beyond OpenEnv's messages; in ``/metadata``."""

Code = Literal[
    "INVALID_JSON",
    "UNKNOWN_TYPE",
    "VALIDATION_ERROR",
    "EXECUTION_ERROR",
    "CAPACITY_REACHED",
    "FACTORY_ERROR",
    "SESSION_ERROR",
]
"""Of an error frame. After the last three the server closes the socket."""

DEPTH = 128
"""Objects and lists within each other in one request: Python's writers and validators recurse over them."""

_WITH_DATA = ("reset", "step", "mcp", "turnwise")
_BARE = ("state", "close")
_LONG, _LONG_BYTES = re.compile(r"[0-9]{19}"), re.compile(rb"[0-9]{19}")


class FrameError(TurnwiseError, ValueError):
    """A frame that is no request; ``code`` is what it is answered with."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


# -- requests ------------------------------------------------------------------------------------------


def request(text: str | bytes) -> tuple[str, dict[str, Any]]:
    """A frame's type and data.

    Raises:
        FrameError: It is no JSON, or no request.
    """
    frame = asked(text)
    if type(frame) is not dict:
        raise FrameError("VALIDATION_ERROR", f"a frame is a JSON object; found {_kind(frame)}")
    kind = frame.get("type")
    if kind in _WITH_DATA:
        data = frame.get("data")
        if data is None and kind == "reset":
            data = {}
        if type(data) is dict and len(frame) == 1 + ("data" in frame):
            return kind, data
        if type(data) is not dict:
            raise FrameError(
                "VALIDATION_ERROR", f"a '{kind}' frame needs data, a JSON object; found {_kind(data)}"
            )
    elif kind in _BARE:
        if len(frame) == 1:
            return kind, {}
    else:
        allowed = ", ".join((*_WITH_DATA, *_BARE))
        raise FrameError("UNKNOWN_TYPE", f"Unknown message type: {str(kind)[:80]}; allowed: {allowed}")
    extra = ", ".join(key[:40] for key in frame if key != "type" and (key != "data" or kind in _BARE))
    raise FrameError("VALIDATION_ERROR", f"a '{kind}' frame has no such keys: {extra}")


def asked(text: str | bytes) -> Any:
    """What a client sends: `load` and `shallow`.

    Raises:
        FrameError: It is no JSON, or nested too deeply.
    """
    value = load(text)
    return value if len(text) <= DEPTH else shallow(value)


def shallow(value: Any) -> Any:
    """The value itself.

    Raises:
        FrameError: It is nested more than `DEPTH` deep.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [one for part in nested for one in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return value
    raise FrameError("VALIDATION_ERROR", f"JSON is nested at most {DEPTH} deep; flatten it")


def load(text: str | bytes) -> Any:
    """JSON as Python's own reader has it: NaN and whole numbers of any size among it.

    Raises:
        FrameError: It is no JSON.
    """
    try:
        # Past 64 bits orjson rounds whole numbers to floats; such have a run of 19 digits.
        long = _LONG.search(text) if isinstance(text, str) else _LONG_BYTES.search(text)
        if long is None:
            return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError("INVALID_JSON", f"Invalid JSON: {said(error, 200)}") from error


# -- replies -------------------------------------------------------------------------------------------


def observation(answer: Answer) -> str:
    """The reply to a reset or a step.

    Raises:
        EnvError: The environment's fields are no JSON.
    """
    return frame("observation", body(answer))


def body(answer: Answer) -> dict[str, Any]:
    """An answer as frames and HTTP bodies carry it."""
    return {
        "observation": answer.observation,
        "reward": answer.reward,
        "done": answer.done,
        "metadata": answer.metadata,
    }


def frame(kind: str, data: Any) -> str:
    """Any other reply.

    Raises:
        EnvError: The data are no JSON.
    """
    return dump({"type": kind, "data": data}).decode()


def error(code: Code, message: str, **more: Any) -> str:
    """An error frame."""
    return frame("error", {"message": message, "code": code, **more})


def failure(error_: TurnwiseError) -> str:
    """The error frame for what a `turnwise.openenv.served.ServedSession` raised; the session goes on."""
    if isinstance(error_, ActionError):
        return error("VALIDATION_ERROR", str(error_), errors=details(error_))
    return error("EXECUTION_ERROR", str(error_), kind=type(error_).__name__)


def details(error_: ActionError) -> Sequence[Mapping[str, Any]]:
    """Where an action is wrong, as pydantic lists it: of the model's own errors where one refused it."""
    if isinstance(error_.__cause__, ValidationError):
        found = error_.__cause__.errors(include_url=False, include_context=False)
        return [{**one, "input": shown(one.get("input"))} for one in found]
    return [{"type": "value_error", "loc": ["data"], "msg": str(error_)}]


def dump(value: Any) -> bytes:
    """JSON: NaN as null, numpy as numbers and lists, pydantic models as objects.

    Raises:
        EnvError: Something in it is no JSON.
    """
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    except (orjson.JSONEncodeError, RecursionError):
        pass
    try:
        # Keys that are no text, whole numbers beyond 64 bits, lone surrogates: Python's writer takes them.
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as cause:
        raise EnvError(f"the environment answered with what is no JSON: {said(cause, 200)}") from cause


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset | bytes | Decimal | PurePath):
        return to_jsonable_python(value)  # As pydantic writes what models hold.
    raise TypeError(f"{_kind(value)} at {str(value)[:80]!r}")


def _finite(value: Any) -> Any:
    """For `json`, which knows neither numpy nor models, and would write NaN as itself."""
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _key(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if value is None or isinstance(value, str | int):
        return value
    return _finite(_plain(value))


def _key(key: Any) -> str:
    if isinstance(key, bool | int | float | None):
        return str(json.dumps(key))
    raise TypeError(f"a key that is {_kind(key)}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def shown(value: Any) -> Any:
    """What a client sent, as it is told back: whole where it is short."""
    try:
        return value if len(orjson.dumps(value)) <= 1000 else f"{str(value)[:200]}…"
    except (TypeError, ValueError):
        return str(value)[:200]


# -- messages and tasks --------------------------------------------------------------------------------


def message(one: Message) -> dict[str, Any]:
    """A message as JSON, in the form of OpenAI's chat API; `read_message` is its inverse."""
    out: dict[str, Any] = {"role": one.role, "content": content(one.content)}
    if one.tool_calls:
        out["tool_calls"] = [_call(call) for call in one.tool_calls]
    for name in ("reasoning", "tool_call_id", "name"):
        value = getattr(one, name)
        if value is not None:
            out[name] = value
    return out


def content(value: Content) -> str | list[dict[str, Any]]:
    """Text as it is; blocks as a list, images as data URLs."""
    if isinstance(value, str):
        return value
    return [
        {"type": "text", "text": block.text}
        if isinstance(block, TextBlock)
        else {"type": "image_url", "image_url": {"url": data_url(block)}}
        for block in value
    ]


def data_url(block: ImageBlock) -> str:
    """An image's file, whole."""
    return f"data:{block.media_type};base64,{base64.b64encode(images.STORE.read(block.sha256)).decode()}"


def read_message(data: Mapping[str, Any]) -> Message:
    """The message that `message` wrote.

    Raises:
        ActionError: It is none.
        ImageError: An image in it is none.
    """
    if not isinstance(data, Mapping) or data.get("role") not in get_args(Role):
        raise ActionError(f"a message is a JSON object with a role of {', '.join(get_args(Role))}")
    calls = data.get("tool_calls") or []
    try:
        return Message(
            role=data["role"],
            content=read_content(data.get("content")),
            reasoning=data.get("reasoning"),
            tool_calls=tuple(
                ToolCall(
                    name=call["function"]["name"],
                    arguments=call["function"]["arguments"],
                    id=call.get("id") or "",
                    error=call.get("error"),
                    raw=call.get("raw") or "",
                )
                for call in calls
            ),
            tool_call_id=data.get("tool_call_id"),
            name=data.get("name"),
        )
    except (KeyError, TypeError, AttributeError) as cause:
        raise ActionError(
            'a tool call is {"function": {"name": …, "arguments": {…}}}; ' + said(cause, 100)
        ) from cause


def read_content(value: Any) -> Content:
    """Content that `content` wrote; images are stored.

    Raises:
        ActionError, ImageError: As for `read_message`.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ActionError(f"a message's content is text or a list of blocks; found {_kind(value)}")
    return tuple(_read_block(block) for block in value)


def task(row: Any) -> Any:
    """A task's row as JSON, the files of the images that it names with it; `read_task` is its inverse."""

    def with_file(block: ImageBlock) -> dict[str, Any]:
        file = base64.b64encode(images.STORE.read(block.sha256)).decode()
        return {"type": "image", "sha256": block.sha256, "media_type": block.media_type, "file": file}

    return _mapped(row, with_file)


def read_task(row: Any) -> Any:
    """The row that `task` wrote; images are stored.

    Raises:
        ImageError: An image in it is none.
    """

    def without_file(block: ImageBlock) -> dict[str, Any]:
        return {"type": "image", "sha256": block.sha256, "media_type": block.media_type}

    return _mapped(row, without_file)


def _mapped(value: Any, image: Callable[[ImageBlock], Any]) -> Any:
    if isinstance(value, Mapping):
        block = images.named(value)
        if block is not None:
            if isinstance(value.get("file"), str):
                images.receive(_decoded(value["file"]))
            return image(block)
        return {name: _mapped(part, image) for name, part in value.items()}
    return [_mapped(part, image) for part in value] if isinstance(value, list | tuple) else value


def _read_block(block: Any) -> TextBlock | ImageBlock:
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return TextBlock(text=block["text"])
    if isinstance(block, Mapping) and block.get("type") == "image_url":
        url = block.get("image_url")
        head, found, file = str(url.get("url") if isinstance(url, Mapping) else url).partition(";base64,")
        if found and head.startswith("data:image/"):
            return _stored(_decoded(file), as_it_is=head == "data:image/png")
    raise ActionError(
        'a block is {"type": "text", "text": …} or {"type": "image_url", "image_url": '
        f'{{"url": "data:image/png;base64,…"}}}}; found {str(block)[:80]}'
    )


def _stored(file: bytes, *, as_it_is: bool) -> ImageBlock:
    if not as_it_is:
        return images.put(file)
    images.receive(file)  # Under the hash that its maker knows it by.
    return ImageBlock(sha256=hashlib.sha256(file).hexdigest())


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ActionError("an image whose base64 is broken") from None


def _call(call: ToolCall) -> dict[str, Any]:
    out: dict[str, Any] = {"function": {"name": call.name, "arguments": dict(call.arguments)}}
    out["type"] = "function"
    for name in ("id", "error", "raw"):
        if value := getattr(call, name):
            out[name] = value
    return out
