"""TRL ``environment_factory`` classes, as they are.

    class Counter:                                  # no base class, no decorator
        turnwise = {"max_turns": 8}                 # optional: the knobs of `Env`, `KNOBS`
        def reset(self, **row) -> str | None: ...   # gets the row's columns; returns what to append
        def add(self, n: int) -> str: ...           # public methods are tools
        def get_reward(self) -> float: ...          # or an attribute `reward`; `done = True` ends the episode

The contract is that of ``trl.GRPOTrainer``, with what it leaves out: ``close()`` is no tool and is called,
``done`` ends the episode where it is True, and ``reset`` is given only the columns that it names. Of a tool's
result that is neither text nor content blocks the model is told ``str``. Reward functions that TRL classes
rely on otherwise stand in the recipe under ``rewards``.

`conversation` is what TRL plays where there is no environment: a row's prompt, and perhaps tools.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ClassVar

import numpy as np

from turnwise.envs.base import Env
from turnwise.envs.observe import blocks, finite
from turnwise.envs.opening import images_of, opening
from turnwise.envs.schema import describe_function
from turnwise.envs.tools import Tool, then
from turnwise.errors import EnvError, EnvSpecError, ScoringError, UnscoredError, boundary
from turnwise.types import Step, Task

log = logging.getLogger(__name__)

NOT_TOOLS = ("reset", "get_reward")
KNOBS = ("max_turns", "max_tool_calls", "forfeit", "inline", "isolation")
"""What a class may set of `Env`'s attributes, in a mapping named ``turnwise``: attributes of these names are
its author's own, who did not know of them."""
CLOSE_SECONDS = 10.0
"""How long the instance that is only looked at may take to close."""


def adapt(
    factory: Callable[..., Any],
    *,
    tools: Sequence[Tool] = (),
    named_reward: bool = False,
    shown: Callable[[Callable[..., Any]], Mapping[str, Any] | None] | None = None,
) -> type[Env]:
    """An `Env` class over a TRL-style class, or over a function that returns an instance of one.

    Args:
        factory: The class, or the function.
        tools: Offered before the class's own.
        named_reward: As ``GRPOTrainer`` does, take what ``get_reward`` returns under the class's name, and
            leave an attribute ``reward`` to the reward functions.
        shown: How the model is shown a method; None, given or returned, leaves it to us.

    Raises:
        EnvSpecError: Its instances have no ``reset``, or a tool cannot be described.
    """
    if isinstance(factory, type):
        inner = factory
    else:
        with boundary(EnvSpecError, f"{getattr(factory, '__name__', 'factory')}() makes no environment"):
            probe = factory()
        inner = type(probe)
        _close(probe)
    if not callable(getattr(inner, "reset", None)):
        raise EnvSpecError(f"{inner.__name__} is no environment: it has no reset(**row)")
    namespace = {
        "inner_class": inner,
        "factory": staticmethod(factory),
        "given_tools": tuple(map(_as_told, tools)),
        "shown": None if shown is None else staticmethod(shown),
        "reward_name": inner.__name__ if named_reward else None,
        "system": None,
        "__signature__": inspect.signature(factory),
        "__module__": inner.__module__,
        "__doc__": inner.__doc__,
        **_knobs(inner),
    }
    _warn_of_class_methods(inner)
    return type(inner.__name__, (TrlEnv,), namespace)


def conversation(tools: Sequence[Tool] = ()) -> type[Env]:
    """An `Env` class that shows a row's ``prompt`` and has these tools; a reply that calls none ends it.

    Raises:
        EnvSpecError: Two tools have the same name.
    """
    # Nothing of it blocks but a tool that is no coroutine function.
    inline = all(tool.is_async for tool in tools)
    return type(
        "Conversation", (Conversation,), {"given_tools": tuple(map(_as_told, tools)), "inline": inline}
    )


def as_trl_tells(value: Any) -> Any:
    """A tool's result as TRL shows it to the model: text and blocks, and of all else its ``str``."""
    shown = blocks(value, text=True)
    if shown is not None:
        return shown
    return value if isinstance(value, str | Step) else str(value)


def _knobs(inner: type) -> dict[str, Any]:
    given = getattr(inner, "turnwise", {})
    if not isinstance(given, Mapping):
        raise EnvSpecError(
            f"{inner.__name__}.turnwise is a {type(given).__name__}; it is a mapping of {', '.join(KNOBS)}"
        )
    for name in given:
        if name not in KNOBS:
            near = difflib.get_close_matches(str(name), KNOBS, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise EnvSpecError(
                f"{inner.__name__}.turnwise: unknown key {name!r}; {hint}allowed: {', '.join(KNOBS)}"
            )
    return dict(given)


def _warn_of_class_methods(inner: type) -> None:
    found = [
        name
        for name in dir(inner)
        if not name.startswith("_") and isinstance(inspect.getattr_static(inner, name), classmethod)
    ]
    if found:
        log.warning(
            "%s: class methods are no tools, as in TRL: %s; make them methods if a model shall call them",
            inner.__name__, ", ".join(found),
        )  # fmt: skip


def _distinct(tools: Sequence[Tool], owner: str) -> Sequence[Tool]:
    names = [tool.schema.name for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EnvSpecError(f"{owner} has two tools named {', '.join(twice)}: rename one")
    return tools


class Conversation(Env):
    """A row's prompt; subclassed by `conversation`."""

    given_tools: ClassVar[tuple[Tool, ...]] = ()
    inner: ClassVar[None] = None
    """There is no instance for reward functions to look at."""

    @classmethod
    def toolset(cls) -> Sequence[Tool]:
        """The functions that were given."""
        return _distinct(cls.given_tools, cls.__name__)

    def reset(self, task: Task) -> Any:
        """The row's prompt."""
        if task.get("prompt") is None:
            raise EnvError("the row has no 'prompt', and there is no environment whose reset returns one")
        return opening(task["prompt"], None, images_of(task))


class TrlEnv(Env):
    """Speaks `Env` for an instance of ``inner_class``; subclassed by `adapt`."""

    inner_class: ClassVar[type] = object
    factory: ClassVar[Callable[..., Any]]
    given_tools: ClassVar[tuple[Tool, ...]] = ()
    shown: ClassVar[Callable[[Callable[..., Any]], Mapping[str, Any] | None] | None] = None
    reward_name: ClassVar[str | None] = None
    """Of what ``get_reward`` returns; None names it ``reward``, as is the attribute then."""

    def __init__(self, **args: Any) -> None:
        self.inner: Any = type(self).factory(**args)

    @classmethod
    def toolset(cls) -> Sequence[Tool]:
        """The tools that were given, and the public methods in the order that TRL lists them."""
        tools = list(cls.given_tools)
        for name, function in inspect.getmembers(cls.inner_class, inspect.isfunction):
            if name.startswith("_") or name in NOT_TOOLS:
                continue
            static = isinstance(inspect.getattr_static(cls.inner_class, name), staticmethod)
            if name == "close" and _closes(function, bound=static):
                continue
            described = describe_function(function, owner=cls.inner_class, method=not static)
            shown = None if cls.shown is None else cls.shown(function)
            tools.append(
                Tool(
                    schema=replace(described.schema, shown=shown),
                    builders=described.builders,
                    bind=partial(_bind, name=name),
                    is_async=inspect.iscoroutinefunction(function),
                )
            )
        return _distinct(tools, cls.__name__)

    def reset(self, task: Task) -> Any:
        """Reset with the columns that the class names; its observation joins the row's prompt."""
        returned = self.inner.reset(**_named_columns(self.inner.reset, task))
        if inspect.isawaitable(returned):
            return then(returned, partial(_opened, task))
        return _opened(task, returned)

    def reward(self) -> Any:
        """``get_reward()``, or the attribute ``reward``; none where there is neither."""
        named = partial(_named_reward, name=self.reward_name or "reward")
        if hasattr(self.inner, "get_reward"):
            if self.reward_name is not None:
                return _excused(self.inner.get_reward, named)
            value = self.inner.get_reward()
            return then(value, named) if inspect.isawaitable(value) else named(value)
        attribute = self.reward_name is None and hasattr(self.inner, "reward")
        return named(self.inner.reward) if attribute else {}

    def close(self) -> Any:
        """Close the instance, where it can be closed."""
        close = getattr(self.inner, "close", None)
        return close() if callable(close) and _closes(close) else None


def _bind(env: TrlEnv, name: str) -> Callable[..., Any]:
    """The instance's method; ``done`` is looked at after it."""
    method = getattr(env.inner, name)

    def finish(value: Any) -> Any:
        value = as_trl_tells(value)
        done = getattr(env.inner, "done", False)  # Or a tool, or a list of what is: then it says nothing.
        ended = isinstance(done, bool | np.bool_) and bool(done)
        return Step(value, terminated=True) if ended and not isinstance(value, Step) else value

    return _finished(method, finish)


def _as_told(tool: Tool) -> Tool:
    """A function's tool, with its results as TRL shows them."""
    return replace(tool, bind=lambda env: _finished(tool.bind(env), as_trl_tells))


def _finished(method: Callable[..., Any], finish: Callable[[Any], Any]) -> Callable[..., Any]:
    """The method, with ``finish`` over what it returns."""
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def call_async(**arguments: Any) -> Any:
            return finish(await method(**arguments))

        return call_async

    @wraps(method)
    def call(**arguments: Any) -> Any:
        value = method(**arguments)
        return then(value, finish) if inspect.isawaitable(value) else finish(value)

    return call


def _named_columns(reset: Callable[..., Any], task: Task) -> dict[str, Any]:
    parameters = inspect.signature(reset).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(task)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in task.items() if key in names}


def _opened(task: Task, returned: Any) -> Any:
    """The first messages, of which one has to say something."""
    prompt = task.get("prompt")
    silent = returned is None and prompt in ("", [{"role": "user", "content": ""}])
    if silent and not images_of(task):
        raise EnvError("reset returned None and the row's 'prompt' is empty: the policy is told nothing")
    return opening(prompt, returned, images_of(task))


def _excused(get_reward: Callable[[], Any], named: Callable[[Any], Any]) -> Any:
    """What ``get_reward`` says. TRL stops where it raises: such an episode is left out, and never paid 0."""

    def read(value: Any) -> Any:
        told = {}
        for name, found in named(value).items():
            one = found.item() if callable(getattr(found, "item", None)) else found
            absent = one is None or (isinstance(one, float) and math.isnan(one))  # To TRL these are the same.
            told[name] = None if absent else finite(one, f"get_reward: '{name}'")
        return told

    async def awaited(value: Awaitable[Any]) -> Any:
        with _lost():
            return read(await value)

    with _lost():
        value = get_reward()
        return awaited(value) if inspect.isawaitable(value) else read(value)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        with boundary(UnscoredError, "get_reward"):
            yield
    except ScoringError as error:
        raise UnscoredError(str(error)) from error


def _named_reward(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value
    # None: such an episode cannot be scored; as in TRL it is left out of the advantages, not paid 0.
    return {name: value}


def _closes(close: Callable[..., Any], *, bound: bool = True) -> bool:
    """Whether ``close`` needs nothing: one that does is a tool, such as ``close(path)``."""
    try:
        parameters = list(inspect.signature(close).parameters.values())
    except ValueError:  # Of a builtin, which has no signature.
        return True
    return all(
        part.default is not part.empty or part.kind in (part.VAR_POSITIONAL, part.VAR_KEYWORD)
        for part in parameters[0 if bound else 1 :]
    )


def _close(instance: Any) -> None:
    """Close an instance that no episode was played in."""
    close = getattr(instance, "close", None)
    if not callable(close) or not _closes(close):
        return
    closing = close()
    if not inspect.isawaitable(closing):
        return

    async def awaited() -> None:
        await asyncio.wait_for(closing, CLOSE_SECONDS)

    # On a thread of its own: this may be called where a loop runs, as in a notebook.
    thread = threading.Thread(target=asyncio.run, args=(awaited(),), name="env-close", daemon=True)
    thread.start()
    thread.join(2 * CLOSE_SECONDS)
