"""`ClassSpec`: an environment's class with its arguments, by name; it lists tasks and opens sessions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turnwise.envs import observe
from turnwise.envs.base import Env
from turnwise.envs.fingerprint import fingerprint
from turnwise.envs.host import HostedEnv
from turnwise.envs.session import Limits, Session
from turnwise.errors import EnvError, EnvSpecError, TaskError, boundary
from turnwise.types import Task

METHODS = ("__init__", "reset", "step", "reward", "teacher", "state_key", "close")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSpec:
    """An `EnvSpec` over an `Env` class; made by `class_spec`."""

    name: str
    env_class: type[Env]
    args: Mapping[str, Any]
    """Keyword arguments of the constructor."""
    reference: str | None
    """How another process finds the class: ``catch``, ``pkg.module:Class``, ``/path/file.py:Class``."""
    limits: Limits
    fingerprint: str

    @property
    def forfeit(self) -> float:
        """The class's own."""
        return self.env_class.forfeit

    def tasks(self, split: str) -> Iterator[Task]:
        """The tasks of a split, as they will be read back from disk.

        They come from an instance of their own, made here and closed after the last task.

        Raises:
            TaskError: A row is no JSON object, there is none, or ``tasks`` raised.
            EnvError: The constructor raised.
        """
        what = f"environment {self.name}: tasks('{split}')"
        if self.env_class.tasks is Env.tasks:
            yield {}
            return
        with boundary(EnvError, f"environment {self.name}: constructor"):
            env = self.env_class(**self.args)
        found = False
        try:
            rows = _rows(env, split, what)
            for number, row in enumerate(rows):
                found = True
                yield observe.task_row(row, f"{what}: row {number}")
        finally:
            with boundary(EnvError, f"environment {self.name}: close"):
                closing = env.close()
            if inspect.iscoroutine(closing):
                closing.close()  # Never started: nothing that only a loop could have opened is open.
        if not found:
            raise TaskError(f"{what}: no tasks; yield at least one row for a split that is asked for")

    async def open(self, limits: Limits) -> Session:
        """A new live environment: in a child process where the class asks for one."""
        if self.env_class.isolation == "process":
            from turnwise.envs.process import ProcessEnv

            return await ProcessEnv.open(self, limits)
        return await self.open_here(limits)

    async def open_here(self, limits: Limits) -> HostedEnv:
        """A new live environment in this process, whatever the class's ``isolation``."""
        # In a child process nothing else waits for the loop, so sync methods may block it there.
        threaded = not self.env_class.inline and self.env_class.isolation == "thread"
        return await HostedEnv.open(
            self.name,
            lambda: self.env_class(**self.args),
            limits,
            threaded=threaded and _has_sync_methods(self.env_class),
        )


def class_spec(
    env_class: type[Env], *, name: str, args: Mapping[str, Any] | None = None, reference: str | None = None
) -> ClassSpec:
    """The spec of a class.

    Raises:
        EnvSpecError: An argument that the constructor does not take, or one that it needs; no ``reset``; a
            process asked for a class that only this process can see.
    """
    args = dict(args or {})
    _check_args(env_class, name, args)
    if env_class.reset is Env.reset:
        raise EnvSpecError(f"environment {name}: {env_class.__name__} must define reset(self, task)")
    if env_class.isolation not in ("thread", "process"):
        raise EnvSpecError(
            f"environment {name}: isolation is 'thread' or 'process'; found {env_class.isolation!r}"
        )
    if env_class.isolation == "process":
        if reference is None:
            raise EnvSpecError(
                f"environment {name}: isolation = 'process' needs a class that a child process can import; "
                f"{env_class.__qualname__} is defined inside a function: move it to the top of a module"
            )
        problem = observe.json_problem(args)
        if problem:
            raise EnvSpecError(f"environment {name}: arguments of a process must be JSON: {problem}")
    return ClassSpec(
        name=name,
        env_class=env_class,
        args=args,
        reference=reference,
        limits=Limits(max_turns=env_class.max_turns, max_tool_calls=env_class.max_tool_calls),
        fingerprint=fingerprint(env_class, name, args),
    )


def _check_args(env_class: type[Env], name: str, args: Mapping[str, Any]) -> None:
    parameters = inspect.signature(env_class).parameters
    named = [key for key, part in parameters.items() if part.kind is not part.VAR_KEYWORD]
    if len(named) == len(parameters):
        for key in args:
            if key not in parameters:
                near = difflib.get_close_matches(key, named, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                allowed = ", ".join(named) or "none"
                raise EnvSpecError(f"environment {name}: unknown argument '{key}'; {hint}allowed: {allowed}")
    for key, part in parameters.items():
        if key not in args and part.default is part.empty and part.kind in (
            part.KEYWORD_ONLY, part.POSITIONAL_OR_KEYWORD,
        ):  # fmt: skip
            raise EnvSpecError(f"environment {name}: argument '{key}' is required")


def _rows(env: Env, split: str, what: str) -> Iterator[Any]:
    with boundary(TaskError, what):
        rows = env.tasks(split)
        if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
            raise TaskError(f"{what}: expected rows; found {type(rows).__name__}")
        yield from rows


def _has_sync_methods(env_class: type[Env]) -> bool:
    """Whether anything of the author's may block the loop."""
    own = [getattr(env_class, name) for name in METHODS]
    base = [getattr(Env, name) for name in METHODS]
    methods = [method for method, inherited in zip(own, base, strict=True) if method is not inherited]
    return not all(inspect.iscoroutinefunction(method) for method in methods) or not all(
        tool.is_async for tool in env_class.toolset()
    )
