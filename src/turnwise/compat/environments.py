"""`environments`: what TRL takes as ``environment_factory`` and ``tools``, as environments of Turnwise.

    environments(Counter)                           {"Counter": …}    one callable: every row is played in it
    environments({"sql": Sql, "game": Game})        {"sql": …, …}     rows name theirs in a column
    environments(tools=[search])                    {"tools": …}      functions, and no environment
    environments()                                  {"prompts": …}    one reply to each prompt
    environments("http://127.0.0.1:8000")           {"guess": …}      an OpenEnv server, or a list of them

Tools that are given beside environments are offered in each, before its own. Instances are made once and
reset for each episode, and, unlike in TRL, closed at the end; ``done = True`` ends an episode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from turnwise.envs import trl_class
from turnwise.envs.base import Env
from turnwise.envs.session import EnvSpec
from turnwise.envs.spec import ClassSpec, class_spec
from turnwise.envs.tools import Tool, function_tool
from turnwise.errors import EnvSpecError, RecipeError, TaskError
from turnwise.openenv.client.connect import Connection
from turnwise.openenv.client.remote import make_spec
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Kept, Task

PROMPTS = "prompts"
TOOLS = "tools"
PLACEHOLDER: Mapping[str, Any] = {"prompt": [{"role": "user", "content": ""}]}
"""The row of a run without a data set, as TRL has it: ``reset`` returns the prompt."""


Factory = Callable[[], Any] | str | Sequence[str] | Connection
"""A callable that makes an instance; the address of an OpenEnv server, or of several alike; or one of these
with what its reset takes and how it is shown: ``turnwise.connect(url, show="board")``, unconnected."""


def environments(
    environment_factory: Factory | Mapping[str, Factory] | None = None,
    tools: Sequence[Callable[..., Any]] | None = None,
    *,
    rollout_func: Callable[..., Any] | None = None,
) -> dict[str, EnvSpec]:
    """The environments of a run by name.

    Args:
        environment_factory: A class or a callable that takes nothing and returns an instance with ``reset``;
            an OpenEnv server, by address; or several by name.
        tools: Sync or async functions with type hints and docstrings.
        rollout_func: Plays in place of Turnwise, and may not stand beside the others.

    Raises:
        RecipeError: Arguments that exclude each other.
        EnvSpecError: One is no environment, or a tool cannot be described, or two have the same name.
    """
    if rollout_func is not None and (environment_factory is not None or tools):
        raise RecipeError(
            "rollout_func plays the episodes itself: environment_factory and tools do nothing beside it; "
            "call them from the function, or leave it out"
        )
    offered = tuple(_offered(one) for one in tools or ())
    if environment_factory is None:
        name = TOOLS if offered else PROMPTS
        return {name: class_spec(trl_class.conversation(offered), name=name)}
    if not isinstance(environment_factory, Mapping):
        spec = _spec(environment_factory, None, offered)
        return {spec.name: spec}
    if not environment_factory:
        raise RecipeError("environment_factory is an empty mapping; name at least one environment")
    return {name: _spec(factory, name, offered) for name, factory in environment_factory.items()}


def rows_by_environment(
    rows: Iterable[Task], known: Mapping[str, EnvSpec], *, routed: bool
) -> dict[str, list[Task]]:
    """A data set's rows by the environment that plays them; see `placed`."""
    out: dict[str, list[Task]] = {name: [] for name in known}
    for number, row in enumerate(rows):
        name, task = placed(row, number, known, routed=routed)
        out[name].append(task)
    return out


def placed(row: Task, number: int, known: Mapping[str, EnvSpec], *, routed: bool) -> tuple[str, Task]:
    """The environment that plays a row, and the task that it is.

    Args:
        row: Of the data set.
        number: The row's.
        known: As `environments` made them.
        routed: ``environment_factory`` is a mapping: each row names its environment in a column, which
            ``reset`` does not see. Otherwise a column of this name is one like any other.

    Raises:
        TaskError: It names none, or an unknown one; or it keeps in memory what would have to be sent.
    """
    if not routed:
        [name], task = known, dict(row)
    else:
        named = row.get("environment")
        if not isinstance(named, str) or named not in known:
            raise TaskError(
                f"row {number} has environment={named!r}; environment_factory has: {', '.join(known)}"
            )
        name, task = named, {key: value for key, value in row.items() if key != "environment"}
    spec = known[name]
    if not isinstance(spec, ClassSpec) or spec.env_class.isolation == "process":
        for column, value in task.items():
            if isinstance(value, Kept):
                raise TaskError(
                    f"row {number}, column '{column}': holds a {value['class']}, and environment {name}, on "
                    "a server or in a process of its own, is sent JSON: convert the column, or remove it"
                )
    return name, task


def scored_by(known: Mapping[str, EnvSpec]) -> dict[str, str]:
    """The environments that score themselves by ``get_reward``, with the names of these rewards."""
    return {
        name: spec.env_class.reward_name
        for name, spec in known.items()
        if isinstance(spec, ClassSpec)
        and issubclass(spec.env_class, trl_class.TrlEnv)
        and spec.env_class.reward_name is not None
        and callable(getattr(spec.env_class.inner_class, "get_reward", None))
    }


def need_a_reward(known: Mapping[str, EnvSpec], functions: Sequence[RewardFunction]) -> None:
    """Refuse a run in which nothing is worth anything.

    Raises:
        RecipeError: There is no reward function, and no environment has ``get_reward``.
    """
    ours = [one for one in known.values() if not isinstance(one, ClassSpec) or _is_ours(one.env_class)]
    if not functions and not ours and not scored_by(known):
        raise RecipeError(
            "nothing says what a completion is worth: pass reward_funcs, or an environment_factory whose "
            "class has get_reward()"
        )


def _is_ours(env_class: type[Env]) -> bool:
    return not issubclass(env_class, trl_class.TrlEnv | trl_class.Conversation)


def _spec(factory: Any, name: str | None, tools: tuple[Tool, ...]) -> EnvSpec:
    if isinstance(factory, str | list | tuple | Connection):
        if tools:
            raise EnvSpecError("an environment on a server has its tools there: leave out tools=")
        urls, args = (factory.url, factory.args) if isinstance(factory, Connection) else (factory, {})
        return make_spec(urls, name=name, args=args, prompts=True)
    if not callable(factory):
        raise EnvSpecError(
            f"environment_factory: expected a class or a callable; found {type(factory).__name__}, which "
            "looks like an instance: pass what makes it"
        )
    if isinstance(factory, type) and issubclass(factory, Env):
        if tools:
            raise EnvSpecError(
                f"{factory.__name__} is a turnwise.Env, which has its tools itself: leave out tools="
            )
        return class_spec(factory, name=name or factory.__name__)
    needed = [
        part.name
        for part in _parameters(factory)
        if part.default is part.empty and part.kind not in (part.VAR_POSITIONAL, part.VAR_KEYWORD)
    ]
    if needed:
        raise EnvSpecError(
            f"environment_factory: {getattr(factory, '__name__', 'the factory')} is called without arguments "
            f"and needs {', '.join(needed)}; wrap it: lambda: {getattr(factory, '__name__', 'Env')}(…)"
        )
    adapted = trl_class.adapt(factory, tools=tools, named_reward=True, shown=_as_trl_shows)
    return class_spec(adapted, name=name or adapted.__name__)


def _offered(function: Callable[..., Any]) -> Tool:
    tool = function_tool(function)
    return replace(tool, schema=replace(tool.schema, shown=_as_trl_shows(function)))


def _as_trl_shows(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """A tool as TRL's prompts have it, what it returns included: a model that learned there reads the same.

    None where transformers cannot describe it, and TRL stops: an argument without a line in ``Args:``.
    """
    from transformers.utils import DocstringParsingException, TypeHintParsingException, get_json_schema

    try:
        schema: Mapping[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException):
        return None
    return schema


def _parameters(factory: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except ValueError:  # Some builtin classes have no signature, and no reset either.
        return []
