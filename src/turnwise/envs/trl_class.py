"""TRL ``environment_factory`` classes, as they are.

    class Counter:                                  # no base class, no decorator
        def reset(self, **row) -> str | None: ...   # gets the row's columns; returns what to append
        def add(self, n: int) -> str: ...           # public methods are tools
        def get_reward(self) -> float: ...          # or an attribute `reward`; `done = True` ends the episode

The contract is that of ``trl.GRPOTrainer``, with what it leaves out: ``close`` is never a tool and is called,
``done`` ends the episode, and ``reset`` is given only the columns that it names. Reward functions that TRL
classes rely on otherwise stand in the recipe under ``rewards``.

`conversation` is what TRL plays where there is no environment: a row's prompt, and perhaps tools.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, get_args

from turnwise.envs.base import Env
from turnwise.envs.observe import BadResultError, blocks
from turnwise.envs.schema import describe_function
from turnwise.envs.tools import Tool, then
from turnwise.errors import EnvError, EnvSpecError, boundary
from turnwise.images import is_image
from turnwise.types import Content, Message, Role, Step, Task, TextBlock, ToolCall

NOT_TOOLS = ("reset", "get_reward", "close")


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
        "given_tools": tuple(tools),
        "shown": None if shown is None else staticmethod(shown),
        "reward_name": inner.__name__ if named_reward else None,
        "system": None,
        "__signature__": inspect.signature(factory),
        "__module__": inner.__module__,
        "__doc__": inner.__doc__,
    }
    for knob in ("max_turns", "max_tool_calls", "forfeit", "inline", "isolation"):
        if knob in vars(inner):
            namespace[knob] = vars(inner)[knob]
    return type(inner.__name__, (TrlEnv,), namespace)


def conversation(tools: Sequence[Tool] = ()) -> type[Env]:
    """An `Env` class that shows a row's ``prompt`` and has these tools; a reply that calls none ends it.

    Raises:
        EnvSpecError: Two tools have the same name.
    """
    # Nothing of it blocks but a tool that is no coroutine function.
    inline = all(tool.is_async for tool in tools)
    return type("Conversation", (Conversation,), {"given_tools": tuple(tools), "inline": inline})


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
        return opening(task["prompt"], None, _images(task))


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
            return then(returned, partial(opening, task.get("prompt"), shown=_images(task)))
        return opening(task.get("prompt"), returned, _images(task))

    def reward(self) -> Any:
        """``get_reward()``, or the attribute ``reward``; none where there is neither."""
        named = partial(_named_reward, name=self.reward_name or "reward")
        if hasattr(self.inner, "get_reward"):
            value = self.inner.get_reward()
            return then(value, named) if inspect.isawaitable(value) else named(value)
        attribute = self.reward_name is None and hasattr(self.inner, "reward")
        return named(self.inner.reward) if attribute else {}

    def close(self) -> Any:
        """Close the instance, where it can be closed."""
        close = getattr(self.inner, "close", None)
        return close() if callable(close) else None


def _bind(env: TrlEnv, name: str) -> Callable[..., Any]:
    """The instance's method; ``done`` is looked at after it."""
    method = getattr(env.inner, name)

    def finish(value: Any) -> Any:
        value = _blocks(value)
        done = bool(getattr(env.inner, "done", False))
        return Step(value, terminated=True) if done and not isinstance(value, Step) else value

    if inspect.iscoroutinefunction(method):

        async def call_async(**arguments: Any) -> Any:
            return finish(await method(**arguments))

        return call_async

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


def opening(prompt: Any, returned: Any, shown: Sequence[Any] = ()) -> Content | list[Message]:
    """The first messages: the prompt, with what ``reset`` returned appended to its last one.

    Images of the row's own columns fill the prompt's empty ``{"type": "image"}``; where it is text alone,
    they stand before the first user's.
    """
    said: Any = _blocks(returned)
    if prompt is None:
        if said is None:
            raise EnvError("reset returned None and the row has no 'prompt': the policy is told nothing")
        return said  # type: ignore[no-any-return]  # checked by the host, as every reset's result is
    entries = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [_message(entry) for entry in _illustrated(entries, shown)]
    if not messages:
        raise EnvError("the row's 'prompt' is an empty list")
    if said is not None:
        last = messages[-1]
        messages[-1] = Message(role=last.role, content=_joined(last.content, said), name=last.name)
    return messages


def _joined(content: Content, said: Any) -> Content:
    if isinstance(content, str) and isinstance(said, str):
        return content + said
    return (*_as_blocks(content), *_as_blocks(said))


def _as_blocks(content: Any) -> tuple[Any, ...]:
    return (TextBlock(text=content),) if isinstance(content, str) else tuple(content)


def _blocks(value: Any) -> Any:
    """TRL's ``[{"type": "text", "text": …}, {"type": "image", "image": …}]`` as ours; else as it is."""
    found = blocks(value, text=True)
    return value if found is None else found


def _images(task: Task) -> list[Any]:
    """The images of a row's columns ``images`` or ``image``."""
    one, several = task.get("image"), task.get("images")
    shown = several if several is not None else [] if one is None else [one]
    return list(shown) if isinstance(shown, list | tuple) and all(map(is_image, shown)) else []


def _illustrated(entries: list[Any], shown: Sequence[Any]) -> list[Any]:
    """A prompt's messages with images where their places are."""
    plain = all(isinstance(entry, Mapping) and isinstance(entry.get("content"), str) for entry in entries)
    if shown and plain:
        first = next((i for i, entry in enumerate(entries) if entry.get("role") == "user"), None)
        if first is None:
            raise EnvError("the row has images, and its 'prompt' has no user's message to show them in")
        parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": entries[first]["content"]}]
        entries = [*entries[:first], {**entries[first], "content": parts}, *entries[first + 1 :]]
    left = list(shown)
    out, places = [], 0
    for entry in entries:
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), list):
            content = list(entry["content"])
            for index, part in enumerate(content):
                if isinstance(part, Mapping) and part.keys() == {"type"} and part["type"] == "image":
                    places += 1
                    content[index] = left.pop(0) if left else part
            entry = {**entry, "content": content}
        out.append(entry)
    if places != len(shown):
        raise EnvError(f"the row has {len(shown)} images, and its 'prompt' has {places} places for them")
    return out


def _message(entry: Any) -> Message:
    """A chat message written as a mapping, as datasets hold them."""
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping) or entry.get("role") not in get_args(Role):
        raise EnvError(
            f"the row's 'prompt' holds {entry!r}; expected {{'role': …, 'content': …}} "
            f"with a role among {', '.join(get_args(Role))}"
        )
    calls = []
    for index, call in enumerate(entry.get("tool_calls") or ()):
        function = call.get("function", call)
        calls.append(
            ToolCall(
                name=function["name"], arguments=function.get("arguments", {}), id=call.get("id", f"p{index}")
            )
        )
    try:
        content = _blocks(entry.get("content") or "")
    except BadResultError as cause:
        raise EnvError(f"the row's 'prompt' holds {cause}") from cause
    if not isinstance(content, str | tuple):
        raise EnvError(f"the row's 'prompt' holds content that is neither text nor text blocks: {content!r}")
    return Message(
        role=entry["role"],
        content=content,
        tool_calls=tuple(calls),
        tool_call_id=entry.get("tool_call_id"),
        name=entry.get("name"),
        reasoning=entry.get("reasoning_content"),
    )


def _named_reward(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value
    # None: such an episode cannot be scored; as in TRL it is left out of the advantages, not paid 0.
    return {name: value}


def _close(instance: Any) -> None:
    """Close an instance that no episode was played in."""
    close = getattr(instance, "close", None)
    if not callable(close):
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
