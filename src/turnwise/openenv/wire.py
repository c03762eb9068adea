"""OpenEnv's frames, read and written: text frames of JSON, one reply for each request, no request ids.

    {"type": "reset", "data": {"seed": 1}}          -> {"type": "observation", "data": {"observation": …}}
    {"type": "step", "data": {<action's fields>}}   -> {"type": "observation", …}
    {"type": "state"}                               -> {"type": "state", "data": {…}}
    {"type": "mcp", "data": {<JSON-RPC>}}           -> {"type": "mcp", "data": {<JSON-RPC>}}
    {"type": "turnwise", "data": {"method": …}}     -> {"type": "turnwise", "data": …}, between Turnwise peers
    {"type": "close"}                               -> no reply

What went wrong is ``{"type": "error", "data": {"message", "code", …}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from turnwise.errors import ActionError, EnvError, TurnwiseError, said
from turnwise.openenv.served import Answer

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
_DIGIT, _DIGIT_BYTES = re.compile(r"[0-9]"), re.compile(rb"[0-9]")


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
    # What opens at most so often is nested at most so deeply, which nearly every frame is told by.
    opened = (
        text.count("{") + text.count("[") if isinstance(text, str) else text.count(b"{") + text.count(b"[")
    )
    return value if opened <= DEPTH else shallow(value)


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
        if not _long_number(text):
            return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError("INVALID_JSON", f"Invalid JSON: {said(error, 200)}") from error


def _long_number(text: str | bytes) -> bool:
    """Whether there is a run of 19 digits: past 64 bits orjson rounds whole numbers to floats."""
    # Such a run covers one of every 19th characters, which costs an eighth of looking at all.
    if isinstance(text, str):
        return _DIGIT.search(text[18::19]) is not None and _LONG.search(text) is not None
    return _DIGIT_BYTES.search(text[18::19]) is not None and _LONG_BYTES.search(text) is not None


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
    """JSON as pydantic writes it: NaN as null, dates by ISO 8601, any plain key as text; numpy as lists.

    Raises:
        EnvError: Something in it is no JSON.
    """
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z)
    except (orjson.JSONEncodeError, RecursionError):
        pass
    try:
        # Keys that are no text, whole numbers beyond 64 bits, lone surrogates: Python's writer takes them.
        return json.dumps(_jsonable(value), separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as cause:
        raise EnvError(f"the environment answered with what is no JSON: {said(cause, 200)}") from cause


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return _jsonable(value)


def _jsonable(value: Any) -> Any:
    """As pydantic writes what models hold, subclasses whole."""
    return to_jsonable_python(
        value, by_alias=False, inf_nan_mode="null", serialize_as_any=True, fallback=_foreign
    )


def _foreign(value: Any) -> Any:
    """What pydantic does not know."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{_kind(value)} at {str(value)[:80]!r}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def shown(value: Any) -> Any:
    """What a client sent, as it is told back: whole where it is short."""
    try:
        return value if len(orjson.dumps(value)) <= 1000 else f"{str(value)[:200]}…"
    except (TypeError, ValueError):
        return str(value)[:200]
