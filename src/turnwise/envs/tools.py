"""`Tool`: a schema, and how to call what is behind it; `tools_of` reads those of an environment's class."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from turnwise.envs.base import TOOL_MARK, Env
from turnwise.envs.schema import Build, describe_function
from turnwise.envs.validate import ArgumentsError, Checked, call_form, check_arguments
from turnwise.errors import EnvSpecError
from turnwise.types import ToolCall, ToolSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool of an environment's class."""

    schema: ToolSchema
    bind: Callable[[Any], Callable[..., Any]]
    """From a live environment to what is called, by keyword."""
    is_async: bool = False
    """It is a coroutine function."""
    builders: Mapping[str, Build] = field(default_factory=dict)

    def check(self, arguments: Mapping[str, Any]) -> Checked:
        """Validated arguments, ready for the call.

        Raises:
            ArgumentsError: They do not fit, or a model or dataclass among the hints refuses them.
        """
        checked = check_arguments(arguments, self.schema)
        for name, build in self.builders.items():
            if name in checked.arguments:
                try:
                    checked.arguments[name] = build(checked.arguments[name])
                except Exception as cause:
                    # A hint's own code may raise anything. It was the policy's value, so the policy is told,
                    # and not let off by an episode that failed.
                    told = str(cause) or type(cause).__name__
                    raise ArgumentsError(f"{self.schema.name}: {name}: {told}") from cause
        return checked


def tools_of(cls: type[Env]) -> tuple[Tool, ...]:
    """The `@tool` methods of a class: base classes' first, each in the order they are written.

    A method that overrides a tool is one too, under the same name, with its own signature and docstring.

    Raises:
        EnvSpecError: A tool cannot be described, or two have the same name.
    """
    marked: dict[str, str] = {}
    for klass in reversed(cls.__mro__):
        for attribute, value in vars(klass).items():
            name = getattr(value, TOOL_MARK, None) or getattr(
                getattr(value, "__func__", None), TOOL_MARK, None
            )
            if name:
                marked[attribute] = name
    tools: dict[str, Tool] = {}
    for attribute, name in marked.items():
        function = inspect.getattr_static(cls, attribute)
        if function is None:
            continue
        if hasattr(Env, attribute):
            raise EnvSpecError(
                f"{cls.__name__}.{attribute} cannot be a tool: it is a method of every environment"
            )
        if name in tools:
            raise EnvSpecError(f"{cls.__name__} has two tools named '{name}': rename one with @tool(name=…)")
        described = describe_function(
            getattr(function, "__func__", function),
            name=name,
            owner=cls,
            method=not isinstance(function, staticmethod),
        )
        tools[name] = Tool(
            schema=described.schema,
            bind=attrgetter(attribute),
            builders=described.builders,
            is_async=inspect.iscoroutinefunction(getattr(function, "__func__", function)),
        )
    return tuple(tools.values())


def function_tool(function: Callable[..., Any]) -> Tool:
    """A function that belongs to no environment, as a tool; every episode calls the same one.

    Raises:
        EnvSpecError: It is no function, or cannot be described.
    """
    if not callable(function) or not hasattr(function, "__name__"):
        raise EnvSpecError(
            f"a tool is a function with type hints and a docstring; found {type(function).__name__}"
        )
    described = describe_function(function, method=False)

    def bind(_: Any) -> Callable[..., Any]:
        return function

    return Tool(
        schema=described.schema,
        bind=bind,
        builders=described.builders,
        is_async=inspect.iscoroutinefunction(function),
    )


def told_malformed(call: ToolCall, tools: Mapping[str, ToolSchema]) -> str:
    """What a model is told of a call that could not be read."""
    meant = [tools[call.name]] if call.name in tools else tools.values()
    forms = [call_form(schema) for schema in meant]
    hint = f" The form is {'; '.join(forms)}." if forms else " There are no tools here."
    return f"The tool call could not be read: {call.error}.{hint}"


def told_unknown(name: str, tools: Mapping[str, ToolSchema]) -> str:
    """What a model is told of a tool that there is not; the nearest are named first."""
    if not tools:
        return f"There is no tool '{name}': this task has none."
    near = difflib.get_close_matches(name, tools, n=len(tools))
    names = [*near, *(other for other in tools if other not in near)]
    return f"There is no tool '{name}'. Available: {', '.join(names)}."


async def then(awaitable: Awaitable[Any], finish: Callable[[Any], Any]) -> Any:
    """``finish`` of what is awaited: lets an adapter's sync method stand before an async one."""
    return finish(await awaitable)
