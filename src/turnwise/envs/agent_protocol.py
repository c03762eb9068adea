"""``AgentProtocol``-like benchmark adapters: one ``step`` for all tools, schemas written beside it.

    class Shop:
        tools = "tools.yaml"                    # beside this file; or the list itself

        def reset(self, task): ...              # returns the first message
        def step(self, tool_call):              # tool_call.name, tool_call.arguments
            return result, reward, done         # reward may be None

``tools.yaml`` is a list of ``{name, description, parameters}``, bare or in OpenAI's ``{"function": {…}}``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import yaml

from turnwise.envs.base import Env
from turnwise.envs.observe import BadResultError
from turnwise.envs.schema import explicit_schema
from turnwise.envs.tools import Tool, then
from turnwise.errors import EnvSpecError, boundary
from turnwise.types import Step, Task, ToolCall


def adapt(inner: type) -> type[Env]:
    """An `Env` class over such a class.

    Raises:
        EnvSpecError: The tools cannot be read.
    """
    namespace = {
        "inner_class": inner,
        "declared": _declared(inner),
        "system": getattr(inner, "system", None),
        "max_turns": getattr(inner, "max_turns", None),
        "forfeit": getattr(inner, "forfeit", 0.0),
        "__signature__": inspect.signature(inner),
        "__module__": inner.__module__,
        "__doc__": inner.__doc__,
    }
    if hasattr(inner, "tasks"):
        namespace["tasks"] = _tasks
    return type(inner.__name__, (AgentProtocolEnv,), namespace)


class AgentProtocolEnv(Env):
    """Speaks `Env` for an instance of ``inner_class``; subclassed by `adapt`."""

    inner_class: ClassVar[type] = object
    declared: ClassVar[Sequence[Any]] = ()

    def __init__(self, **args: Any) -> None:
        self.inner: Any = self.inner_class(**args)

    @classmethod
    def toolset(cls) -> Sequence[Tool]:
        """The declared tools; each call goes to ``step``."""
        is_async = inspect.iscoroutinefunction(getattr(cls.inner_class, "step", None))
        tools = {}
        for entry in cls.declared:
            schema = explicit_schema(entry, cls.__name__)
            if schema.name in tools:
                raise EnvSpecError(f"{cls.__name__} declares two tools named '{schema.name}'")
            tools[schema.name] = Tool(schema=schema, bind=partial(_bind, name=schema.name), is_async=is_async)
        return tuple(tools.values())

    def reset(self, task: Task) -> Any:
        """Whatever the class's ``reset`` returns."""
        return self.inner.reset(task)

    def close(self) -> Any:
        """Close the instance, where it can be closed."""
        close = getattr(self.inner, "close", None)
        return close() if callable(close) else None


def _tasks(env: AgentProtocolEnv, split: str) -> Any:
    return env.inner.tasks(split)


def _bind(env: AgentProtocolEnv, name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        answer = env.inner.step(ToolCall(name=name, arguments=arguments))
        return then(answer, _as_step) if inspect.isawaitable(answer) else _as_step(answer)

    async def call_async(**arguments: Any) -> Any:
        return _as_step(await env.inner.step(ToolCall(name=name, arguments=arguments)))

    return call_async if inspect.iscoroutinefunction(env.inner.step) else call


def _as_step(answer: Any) -> Step:
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise BadResultError(f"{type(answer).__name__} from step; expected (result, reward, done)")
    result, reward, done = answer
    return Step(result, reward=reward, terminated=bool(done))


def _declared(inner: type) -> Sequence[Any]:
    tools: Any = inner.tools  # type: ignore[attr-defined]  # what the registry knew the shape by
    if isinstance(tools, str | Path):
        path = Path(inspect.getfile(inner)).parent / tools
        with boundary(EnvSpecError, f"{inner.__name__}: tools from {path}"):
            tools = yaml.safe_load(path.read_text())
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise EnvSpecError(
            f"{inner.__name__}.tools: expected a list of tools or the path of a YAML file with one; "
            f"found {type(tools).__name__}"
        )
    return tools
