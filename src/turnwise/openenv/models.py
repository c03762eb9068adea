"""OpenEnv's models: what environments written for it take and return, and what its clients parse.

    class Move(Action):
        column: int = Field(ge=0, le=6)

    class Board(Observation):
        cells: list[list[int]]

Names, fields and defaults are those of ``openenv.core`` (read from 0.3.0), so that a class ports by a changed
import. Reward and done stand in the observation; on the wire they stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

ObsT = TypeVar("ObsT")

RESERVED_TOOL_NAMES = frozenset({"reset", "step", "state", "close"})
"""No tool has such a name: agents call tools, and the episode is not theirs to control."""


class Action(BaseModel):
    """Base of every action; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    metadata: dict[str, Any] = Field(default_factory=dict)
    """What a client says beside the action."""


class Observation(BaseModel):
    """Base of every observation; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    done: bool = False
    """The episode is over."""
    reward: bool | int | float | None = None
    """Paid for the action that this observation answers."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Beside the observation, never shown to a policy."""


class State(BaseModel):
    """Base of an environment's state; a subclass adds fields, and so may an instance."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, arbitrary_types_allowed=True)

    episode_id: str | None = None
    """The present episode's."""
    step_count: int = Field(default=0, ge=0)
    """Steps taken in it."""


def serialize_observation(observation: Observation) -> dict[str, Any]:
    """An observation as it is sent: ``{"observation": …, "reward": …, "done": …}``, without metadata."""
    return {
        "observation": observation.model_dump(exclude={"reward", "done", "metadata"}),
        "reward": observation.reward,
        "done": observation.done,
    }


class CodeExecResult(BaseModel):
    """What a program that was run has left."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stdout: str
    """What it printed."""
    stderr: str
    """What it complained of."""
    exit_code: int
    """0 where all went well."""


class EnvironmentMetadata(BaseModel):
    """What ``GET /metadata`` answers."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    name: str
    """The environment's."""
    description: str
    """What it is about."""
    readme_content: str | None = None
    """Its README, whole."""
    version: str | None = None
    """Its own, not the protocol's."""
    author: str | None = None
    """Who wrote it."""
    documentation_url: str | None = None
    """Where more stands."""


class ConcurrencyConfig(BaseModel):
    """How many sessions a server holds, and for how long."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    max_concurrent_envs: int | None = Field(default=None, ge=1)
    """Sessions at once; None is as many as the server and the environment allow."""
    session_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which an idle session is closed, and its socket with it; None is the server's own."""


@dataclass
class StepResult(Generic[ObsT]):
    """What a client's ``reset`` and ``step`` return."""

    observation: ObsT
    """As the client's ``_parse_result`` made it."""
    reward: float | None = None
    """Paid for this step."""
    done: bool = False
    """The episode is over."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Beside the observation: ``terminated`` and ``truncated`` from a Turnwise server."""


class Message(TypedDict):
    """One message of a chat, as some environments written for OpenEnv keep them."""

    role: str
    """``system``, ``user``, ``assistant``."""
    content: str
    """Its text."""


class Tool(BaseModel):
    """A tool as OpenEnv's clients list it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """None of `RESERVED_TOOL_NAMES`."""
    description: str
    """What it does."""
    input_schema: dict[str, Any]
    """JSON schema of its arguments, an object."""


class ToolErrorType(StrEnum):
    """Why a call has no result."""

    EXECUTION_ERROR = "execution_error"
    INVALID_ARGS = "invalid_args"
    TRANSPORT_ERROR = "transport_error"
    TOOL_NOT_FOUND = "tool_not_found"
    TIMEOUT = "timeout"


class ToolError(BaseModel):
    """What went wrong with a call."""

    model_config = ConfigDict(extra="forbid")

    error_type: ToolErrorType
    """The kind."""
    message: str
    """For the one who called."""


class ListToolsAction(Action):
    """Asks for the tools; needs no reset."""

    type: Literal["list_tools"] = "list_tools"
    """What tells this action from others on the wire."""


class CallToolAction(Action):
    """Calls one tool."""

    type: Literal["call_tool"] = "call_tool"
    """What tells this action from others on the wire."""
    tool_name: str
    """One of the listed."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """By name."""


class ListToolsObservation(Observation):
    """The tools."""

    tools: list[Tool]
    """In the order they were declared."""


class CallToolObservation(Observation):
    """A tool's answer."""

    tool_name: str
    """The one that was called."""
    result: Any = None
    """What it returned; with ``data`` in it, the clients' ``call_tool`` returns that."""
    error: ToolError | None = None
    """Why there is no result."""
