"""`HostedSpec`: any environment that `turnwise.envs.registry.make` finds, as what the server hosts.

    {"type": "list_tools"}                                             the tools, with or without an episode
    {"type": "call_tool", "tool_name": "move", "arguments": {…}}       one call
    {"type": "reply", "text": "42"}, {"text": "42"}, {"message": "42"} a reply without a call

A reset takes ``seed``, ``episode_id`` and either ``split`` and ``index`` (rows as the Task API counts them)
or the row itself as ``task``; with neither it plays row ``seed % n`` of the first split. Who brings the row
counts turns and tool calls themselves, as Turnwise does; everybody else's episodes are truncated at the
environment's own limits.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from turnwise import images
from turnwise.envs.base import Env
from turnwise.envs.host import HostedEnv
from turnwise.envs.registry import make
from turnwise.envs.session import EnvSpec, Limits, Session
from turnwise.errors import ActionError, EnvError, TaskError
from turnwise.openenv import faults, wire
from turnwise.openenv.hosted_session import HostedSession
from turnwise.types import Task

SPLITS = ("train", "test")
"""Those that an environment is asked for."""
RESERVED = frozenset(("reset", "step", "state", "close"))
"""Names that OpenEnv keeps from tools, so that agents never reach the simulation's own controls."""


def hosted(spec: str | type | EnvSpec, *, args: Mapping[str, Any] | None = None) -> HostedSpec:
    """An environment as what the server hosts; ``spec`` and ``args`` are `make`'s.

    Raises:
        EnvSpecError: There is no such environment.
    """
    found = make(spec, args=args)
    return HostedSpec(spec=found, limits=found.limits)


@dataclass(kw_only=True)
class HostedSpec:
    """A `turnwise.openenv.served.Served` over an `EnvSpec`."""

    spec: EnvSpec
    limits: Limits
    """Of these, ``call_seconds`` and ``max_observation`` hold for everybody."""
    max_sessions: int | None = None
    _rows: dict[str, tuple[Task, ...]] = field(default_factory=dict)
    _metadata: dict[str, Any] | None = None
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """The spec's."""
        return self.spec.name

    def splits(self) -> Sequence[str]:
        """Those of train and test that the environment has; empty where it defines no tasks."""
        env_class = getattr(self.spec, "env_class", None)
        if env_class is not None and env_class.tasks is Env.tasks:
            return ()
        found = []
        for split in SPLITS:
            try:
                self.tasks(split)
            except TaskError:
                continue
            found.append(split)
        return tuple(found)

    def tasks(self, split: str) -> Sequence[Task]:
        """The rows of a split, read once.

        Raises:
            TaskError: There is no such split.
            EnvError: The environment's constructor raised.
        """
        if split not in self._rows:
            rows = tuple(self.spec.tasks(split))
            images.STORE.pin(images.named_in_json(rows))  # Any reset may ask for any of them.
            self._rows[split] = rows
        return self._rows[split]

    async def schemas(self) -> Mapping[str, Any]:
        """Of actions, observations and state; the same for every environment of ours but for its tools."""
        about = (await self.metadata())["turnwise"]
        names = [tool["name"] for tool in about["tools"]]
        return {"action": _action_schema(names), "observation": _OBSERVATION, "state": _STATE}

    async def metadata(self) -> Mapping[str, Any]:
        """What the environment says of itself, asked of an instance of its own once."""
        async with self._looking:
            if self._metadata is None:
                with faults.telling():
                    session = await self.spec.open(self.limits)
                try:
                    self._metadata = self._about(session, await asyncio.to_thread(self.splits))
                finally:
                    await session.close()
        return self._metadata

    async def open(self) -> HostedSession:
        """A new live environment.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        with faults.telling():
            session = await self.spec.open(self.limits)
        if isinstance(session, HostedEnv):
            session.raised = faults.tell
        return HostedSession(self, session)

    async def row(self, data: Mapping[str, Any], seed: int) -> tuple[Task, dict[str, Any]]:
        """The task that a reset asks for, and where it stands: ``{"split", "index"}``.

        Raises:
            ActionError: There is no such row.
        """
        split, index = data.get("split"), data.get("index")
        try:
            splits = (await self.metadata())["turnwise"]["splits"]
            if not splits:
                if split is None and index is None:
                    return {}, {}
                raise ActionError(f"environment {self.name} has no tasks: reset takes no split and no index")
            split = splits[0] if split is None else split
            rows = self._rows[split] if split in self._rows else await asyncio.to_thread(self.tasks, split)
        except TaskError as error:
            raise ActionError(f"reset(split={split!r}): {error}") from error
        index = seed % len(rows) if index is None else index
        if not 0 <= index < len(rows):
            raise ActionError(f"reset(split={split!r}, index={index}): it has rows 0 to {len(rows) - 1}")
        return rows[index], {"split": split, "index": index}

    def _about(self, session: Session, splits: Sequence[str]) -> dict[str, Any]:
        reserved = sorted(RESERVED & {tool.name for tool in session.tools})
        if reserved:
            raise EnvError(
                f"environment {self.name}: OpenEnv keeps the tool names {', '.join(sorted(RESERVED))}; "
                f'rename {", ".join(reserved)} with @tool(name="…") to serve it'
            )
        env_class = getattr(self.spec, "env_class", None)
        limits = self.spec.limits
        return {
            "name": self.name,
            "description": _summary(env_class) or f"The Turnwise environment {self.name}.",
            "readme_content": None,
            "version": _version(),
            "author": None,
            "documentation_url": None,
            "turnwise": {
                "protocol": wire.PROTOCOL,
                "tools": [
                    {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.parameters,
                        **({} if tool.shown is None else {"shown": tool.shown}),
                    }
                    for tool in session.tools
                ],
                "system": session.system,
                "has_step": session.has_step,
                "limits": {"max_turns": limits.max_turns, "max_tool_calls": limits.max_tool_calls},
                "forfeit": self.spec.forfeit,
                "fingerprint": self.spec.fingerprint,
                "splits": list(splits),
                "teacher": env_class is None or env_class.teacher is not Env.teacher,
            },
        }


def _summary(env_class: type | None) -> str:
    return (inspect.getdoc(env_class) or "").partition("\n\n")[0].replace("\n", " ") if env_class else ""


def _version() -> str | None:
    try:
        return version("turnwise")
    except PackageNotFoundError:
        return None


_OBSERVATION: dict[str, Any] = {
    "title": "Observation",
    "type": "object",
    "description": "text and messages after a reset or a reply, tool_name, result and error after a call.",
    "properties": {
        "text": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "tool_name": {"type": "string"},
        "result": {},
        "error": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "tools": {"type": "array", "items": {"type": "object"}},
    },
}
_STATE: dict[str, Any] = {
    "title": "State",
    "type": "object",
    "properties": {
        "episode_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "step_count": {"type": "integer", "minimum": 0},
        "seed": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "done": {"type": "boolean"},
        "split": {"type": "string"},
        "index": {"type": "integer"},
    },
    "required": ["episode_id", "step_count"],
}


def _action_schema(tools: Sequence[str]) -> dict[str, Any]:
    """``type`` chooses; flat as OpenEnv's actions are, so that forms can be made of it."""
    return {
        "title": "Action",
        "type": "object",
        "properties": {
            "type": {"enum": ["call_tool", "reply", "list_tools"] if tools else ["reply", "list_tools"]},
            "tool_name": {"enum": list(tools)} if tools else {"type": "string"},
            "arguments": {"type": "object"},
            "text": {"type": "string"},
        },
        "required": ["type"],
    }
