"""What a class written for OpenEnv says of itself: its models, its methods, who makes it.

Nothing is imported of the package that it was written with: its own modules have what is needed.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, PydanticUserError

MCP_ACTIONS = ("CallToolAction", "ListToolsAction")


def written_for_openenv(cls: Any) -> bool:
    """Whether a class has the face of OpenEnv's environments: ``reset``, ``step``, a ``state`` property."""
    if not isinstance(cls, type) or not callable(getattr(cls, "reset", None)):
        return False
    return callable(getattr(cls, "step", None)) and isinstance(
        inspect.getattr_static(cls, "state", None), property
    )


def class_made_by(make: Callable[[], Any]) -> type[Any] | None:
    """The class of what a factory makes, where that is told without a call."""
    while isinstance(make, partial):
        make = make.func
    if isinstance(make, type):
        return make
    try:
        made = typing.get_type_hints(make).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    return made if written_for_openenv(made) and not inspect.isabstract(made) else None


def models_of(env: type[Any]) -> tuple[type[Any] | None, type[Any] | None, type[Any] | None]:
    """Classes of action, observation and state, as far as the class says them."""
    found: list[type[Any] | None] = [None, None, None]
    for klass in env.__mro__:
        for base in getattr(klass, "__orig_bases__", ()):
            if getattr(typing.get_origin(base), "__name__", "") == "Environment":
                # `Any` is a class too.
                arguments = [
                    arg if isinstance(arg, type) and arg is not Any else None for arg in typing.get_args(base)
                ]
                found = [mine or theirs for mine, theirs in zip(found, arguments, strict=False)]
    call, _ = mcp_actions(env, None)
    if call is not None and hasattr(env, "_async_handle_call_tool"):
        found[0] = found[0] or call
    step = list(_hints(env.step).items())
    state = inspect.getattr_static(env, "state", None)
    for place, hint in (
        (0, next((hint for name, hint in step if name not in ("return", "timeout_s")), None)),
        (1, dict(step).get("return")),
        (2, _hints(state.fget).get("return") if isinstance(state, property) else None),
    ):
        if found[place] is None and isinstance(hint, type) and issubclass(hint, BaseModel):
            found[place] = hint
    return found[0], found[1], found[2]


def _hints(function: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def mcp_actions(env: type[Any], action: type[Any] | None) -> tuple[type[Any] | None, type[Any] | None]:
    """``CallToolAction`` and ``ListToolsAction`` as the environment's own modules know them."""
    for klass in (*env.__mro__, *(() if action is None else (action,))):
        module = sys.modules.get(klass.__module__)
        call, listing = (getattr(module, name, None) for name in MCP_ACTIONS)
        if call is not None and listing is not None:
            return call, listing
    return None, None


def is_own(cls: type[Any], method: str) -> bool:
    """Whether an async method is the author's: bases whose sync one is abstract only pass the call on."""
    sync = method.removesuffix("_async")
    for klass in cls.__mro__:
        if method in vars(klass):
            return not getattr(vars(klass).get(sync), "__isabstractmethod__", False)
    return False


def parameters_of(method: Callable[..., Any]) -> frozenset[str] | None:
    """Names that a method takes by keyword; None is any."""
    parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)


def schema_of(model: type[Any]) -> Mapping[str, Any]:
    """The model's JSON schema."""
    try:
        return dict(model.model_json_schema())
    except (PydanticUserError, AttributeError):  # Arrays and tensors among the fields have no JSON schema.
        return {"title": model.__name__, "type": "object"}
