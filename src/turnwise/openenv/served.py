"""What the server hosts: sessions that answer OpenEnv's messages, whoever wrote the environment.

A Turnwise environment becomes one in `turnwise.openenv.hosted`, a class written for OpenEnv in
`turnwise.openenv.typed`. The server (`turnwise.openenv.server`) knows no other face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from turnwise.errors import EnvCrashedError, EnvHungError, EnvLostError

DEAD = (EnvCrashedError, EnvHungError, EnvLostError)
"""Of a session that raised one of these nothing more can be had: whoever owns it ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a reset or a step is answered with; `turnwise.openenv.wire` writes it as a frame.

    Answer(observation={"text": "The ball is at column 2."}, reward=None, done=False)
    """

    observation: Mapping[str, Any]
    """The environment's own fields: JSON values, numpy included."""
    reward: float | None = None
    """Paid for this step; on a step that ends, the rewards of the end are in it."""
    done: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Beside the observation, never shown to a policy: ``terminated``, ``truncated``, rewards by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAnswer:
    """What a tool call at ``/mcp`` is answered with."""

    content: Sequence[Mapping[str, Any]]
    """MCP content: ``{"type": "text", "text": …}``, ``{"type": "image", "data": …, "mimeType": …}``."""
    data: Any = None
    """The result itself, where it is JSON."""
    is_error: bool = False


class ServedSession(Protocol):
    """One live environment behind the server. Calls never overlap."""

    async def reset(self, data: Mapping[str, Any]) -> Answer:
        """Start an episode with what a client sent: ``seed``, ``episode_id`` and whatever else it takes.

        Raises:
            EnvError, ActionError: As for `step`.
        """
        ...

    async def step(self, action: Mapping[str, Any], *, seconds: float | None = None) -> Answer:
        """Act.

        Args:
            action: The action's fields as they came.
            seconds: The client's own deadline; None is the environment's.

        Raises:
            ActionError: No such action; the environment was not touched.
            EnvError: The environment raised, hung or is gone.
        """
        ...

    async def state(self) -> Mapping[str, Any]:
        """Every field of the state; ``episode_id`` and ``step_count`` always."""
        ...

    async def list_tools(self) -> Sequence[Mapping[str, Any]]:
        """``{"name", "description", "input_schema"}`` of each tool; needs no reset."""
        ...

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> CallAnswer:
        """One tool call as an agent makes it, at ``/mcp``. What went wrong with it is in the answer.

        Raises:
            EnvError: The environment is gone.
        """
        ...

    async def ask(self, method: str, data: Mapping[str, Any]) -> Any:
        """What only Turnwise asks: ``reward``, ``teacher``, ``state_key``; JSON in, JSON out.

        Raises:
            ActionError: No such method here.
            EnvError, ScoringError: As for `turnwise.envs.session.Session`.
        """
        ...

    async def metadata(self) -> Mapping[str, Any]:
        """As `Served.metadata`, of this environment itself where it has a say."""
        ...

    async def close(self) -> None:
        """Close the environment, hung or not. Never raises; may be called twice."""
        ...


class Served(Protocol):
    """An environment that a server makes sessions of."""

    @property
    def name(self) -> str:
        """What routes and pages call it."""
        ...

    @property
    def max_sessions(self) -> int | None:
        """How many the environment itself allows at once; None is any number."""
        ...

    async def schemas(self) -> Mapping[str, Any]:
        """JSON schemas: ``{"action": …, "observation": …, "state": …}``."""
        ...

    async def metadata(self) -> Mapping[str, Any]:
        """What ``/metadata`` says: ``name``, ``description`` and, of Turnwise's own, ``turnwise``."""
        ...

    def splits(self) -> Sequence[str]:
        """Names of the task splits; empty where it has no tasks."""
        ...

    def tasks(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a split.

        Raises:
            TaskError: There is no such split.
        """
        ...

    async def open(self) -> ServedSession:
        """A new live environment.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        ...
