"""`TypedEnv`: a class written for OpenEnv, theirs or ours, as what the server hosts.

    TypedEnv.of(Connect4Environment)
    TypedEnv(make=partial(Maze, size=8), action=MazeAction, observation=MazeObservation)

Nothing asks whose base class it has. ``reset_async`` and ``step_async`` are awaited on the loop where the
author wrote them; everything else, the constructor and ``close`` among it, runs on one thread for the
environment's life, or on one for all where the class asks for it (``REQUIRES_SINGLE_THREAD_EXECUTOR``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from turnwise.envs import contain
from turnwise.envs.thread import EnvThread
from turnwise.errors import EnvError, EnvSpecError, TaskError, boundary
from turnwise.openenv import models
from turnwise.openenv.typed_class import class_made_by, models_of, schema_of
from turnwise.openenv.typed_session import TypedSession, close_env, plain

log = logging.getLogger(__name__)

CALL_SECONDS = 600.0
"""One call into an environment. Its own clients give up after 60 s, unless told to wait longer."""


class TypedEnv:
    """A factory of such environments.

    Args:
        make: The class, or a function that makes one.
        action: The class of its actions; None where all are tool calls.
        observation: The class of its observations, for the schema; None describes none.
        name: What routes and pages call it; the class's own name if not given.
        mode: Which tools an MCP environment shows, those of simulation or of production.
        call_seconds: The deadline of one call.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        action: type[Any] | None = None,
        observation: type[Any] | None = None,
        *,
        name: str | None = None,
        mode: Literal["simulation", "production"] = "simulation",
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        if not callable(make):
            raise EnvSpecError(
                "an environment is served as its class or a function that makes one; found "
                f"{type(make).__name__}"
            )
        self.make, self.action, self.observation = make, action, observation
        self.mode, self.call_seconds = mode, call_seconds
        self.cls = class_made_by(make)
        self._name = name
        self._metadata: Mapping[str, Any] | None = None
        self._rows: dict[str, tuple[Mapping[str, Any], ...]] = {}
        self._common: EnvThread | None = None

    @classmethod
    def of(cls, env: type[Any], args: Mapping[str, Any] | None = None, **more: Any) -> TypedEnv:
        """A class alone: its actions are read from ``Environment[Action, Observation, State]`` or ``step``.

        Args:
            env: The class.
            args: Keyword arguments of its constructor.
            more: As for `TypedEnv`.

        Raises:
            EnvSpecError: They stand in neither.
        """
        action, observation, _ = models_of(env)
        if action is None:
            raise EnvSpecError(
                f"{env.__name__}: cannot tell its actions; write class {env.__name__}(Environment[Action, "
                "Observation, State]), annotate step(self, action: …), or call create_app with the classes"
            )
        make: Callable[..., Any] = env
        return cls(partial(make, **(args or {})), action, observation, **more)

    @property
    def name(self) -> str:
        """What routes and pages call it."""
        return self._name or str(getattr(self.cls or self.make, "__name__", "environment"))

    @property
    def max_sessions(self) -> int | None:
        """Any number where the class says that it supports several at once; else one."""
        try:
            cls = self.known_class()
        except EnvError as error:  # It may work where a session is opened, later and elsewhere.
            log.warning("%s: it is taken to support one session at a time", error)
            return 1
        return None if getattr(cls, "SUPPORTS_CONCURRENT_SESSIONS", False) else 1

    def known_class(self) -> type[Any]:
        """The class, for which one is made where a function does not say what it returns.

        Raises:
            EnvError: It raised.
        """
        if self.cls is None:
            self.cls = self._asked(type)
        return self.cls

    async def schemas(self) -> Mapping[str, Any]:
        """Of the three models; the state's is the class's own, not its base's."""
        state = models_of(self.cls)[2] if self.cls is not None else None
        return {
            "action": schema_of(self.action or models.CallToolAction),
            "observation": schema_of(self.observation or models.Observation),
            "state": schema_of(state or models.State),
        }

    async def metadata(self) -> Mapping[str, Any]:
        """What an instance's ``get_metadata`` says, asked once."""
        if self._metadata is None:
            session = await self.open()
            try:
                self._metadata = await session.metadata()
            finally:
                await session.close()
        return self._metadata

    def splits(self) -> Sequence[str]:
        """What an instance's ``list_splits`` says, where it has tasks."""
        if self.cls is not None and not hasattr(self.cls, "list_splits"):
            return ()
        found = self._asked(lambda env: env.list_splits() if hasattr(env, "list_splits") else ())
        return [split if isinstance(split, str) else _field(split, "name") for split in found]

    def tasks(self, split: str) -> Sequence[Mapping[str, Any]]:
        """What its ``list_tasks`` says, read once.

        Raises:
            TaskError: There is no such split.
            EnvError: It raised.
        """
        if split not in self._rows:
            known = self.splits()
            if split not in known:
                raise TaskError(
                    f"environment {self.name} has no split '{split}': {', '.join(known) or 'no'} tasks"
                )
            rows = self._asked(lambda env: env.list_tasks(split))
            self._rows[split] = tuple(plain(row) for row in rows)
        return self._rows[split]

    async def open(self) -> TypedSession:
        """A new live environment.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        return await TypedSession.open(self)

    def thread(self) -> tuple[EnvThread, bool]:
        """The thread for a new session, and whether others share it."""
        if not getattr(self.cls, "REQUIRES_SINGLE_THREAD_EXECUTOR", False):
            return EnvThread(self.name), False
        self._common = self._common or EnvThread(self.name)
        return self._common, True

    def abandon(self, thread: EnvThread) -> None:
        """A call hangs on the thread that all share: those that come get another."""
        if self._common is thread:
            self._common = None

    def _asked(self, question: Callable[[Any], Any]) -> Any:
        with boundary(EnvError, f"environment {self.name}"):
            env = contain.call(self.make)
            try:
                return contain.call(partial(question, env))
            finally:
                close_env(env)


def _field(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, Mapping) else getattr(value, name)
