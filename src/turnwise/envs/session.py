"""`Session`: the one async face that rollouts see of a live environment, wherever it runs.

A class of ours, a TRL-style class, a dataset, a server behind a URL: each becomes an `EnvSpec` that opens
sessions. `turnwise.envs.registry.make` finds them by name; `turnwise.envs.host` runs Python classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from turnwise.types import Message, Step, Task, ToolCall, ToolResult, ToolSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What ends an episode from outside. None sets no limit.

    Turns and tool calls are counted by the episode, tokens by the policy's ids, seconds by the clock.
    """

    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_tool_turns: int | None = None
    """Turns whose calls are run. A later reply may answer; what it calls is not run and ends the episode."""
    max_tokens: int | None = None
    """Sampled tokens over the whole episode."""
    max_context: int | None = None
    """Tokens of context and reply together; None is the engine's own limit."""
    max_completion: int | None = None
    """Tokens after the first context: all replies, and what was answered between them."""
    seconds: float | None = 600.0
    """The whole episode."""
    call_seconds: float = 60.0
    """One call into the environment: reset, a tool, step, reward."""
    max_observation: int = 65_536
    """Characters of one tool's or step's answer; the rest is cut off and the policy is told so."""
    cut_reply: Literal["end", "continue"] = "end"
    """What a reply does that ran into its own limit: end the episode, or count as it stands."""


class Session(Protocol):
    """One live environment. Calls must not overlap; every one is bounded by ``call_seconds``.

    A session may be reset again for another episode after `reward`.
    """

    tools: tuple[ToolSchema, ...]
    system: str | None
    has_step: bool
    """Whether a reply without tool calls is answered by `step`; it ends the episode otherwise."""

    @property
    def alive(self) -> bool:
        """Whether another episode can be played; one that nobody uses may have died meanwhile."""
        ...

    @property
    def instance(self) -> Any:
        """The author's own object, for reward functions to look at; None where it lives elsewhere."""
        ...

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start an episode: the messages the policy sees first, after ``system`` where that is set.

        A system message is among them only where the environment's ``system`` is None.

        Raises:
            EnvError: The environment's reset raised, hung, or returned something that is no observation.
        """
        ...

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one tool call. What the policy or the tool did wrong is in the result, not raised.

        Raises:
            EnvLostError: The environment is gone (not the policy's doing).
            EnvCrashedError: Its process died while the call ran.
            EnvHungError: The tool passed its deadline and could not be stopped; no further call is possible.
            EnvError: The tool returned a `Step` that ends twice, or whose info is not JSON.
            ScoringError: The tool returned a `Step` whose reward is not a finite number.
        """
        ...

    async def step(self, reply: Message) -> Step:
        """Answer a reply without tool calls. An exception in the author's ``step`` is an observation too.

        Raises:
            EnvError, ScoringError: As for `call`.
        """
        ...

    async def reward(self) -> dict[str, float | None]:
        """The environment's own rewards at the episode's end; empty where it has none but the steps'.

        A reward that is None does not apply to this episode.

        Raises:
            ScoringError: It raised, hung, or was not a finite number (or mapping of them).
            EnvLostError: As for `call`.
        """
        ...

    async def teacher(self, messages: Sequence[Message]) -> Message:
        """What the environment's demonstrator says.

        Raises:
            EnvError: It has none, or its teacher raised.
        """
        ...

    async def state_key(self) -> str | None:
        """The key of the present state; None where the environment defines none.

        Raises:
            EnvError: It raised, hung, or was no text.
        """
        ...

    async def close(self) -> None:
        """Close the environment, hung or not. Never raises; may be called twice."""
        ...


class EnvSpec(Protocol):
    """An environment by name: opens sessions and lists tasks."""

    @property
    def name(self) -> str:
        """What the run calls it."""
        ...

    @property
    def limits(self) -> Limits:
        """The environment's own, before the recipe's are laid over them."""
        ...

    @property
    def forfeit(self) -> float:
        """What an end is worth that the policy made impossible to score; see `turnwise.envs.base.Env`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of what makes rewards comparable: name, arguments, tools, system message, source."""
        ...

    def tasks(self, split: str) -> Iterable[Task]:
        """The tasks of a split.

        Raises:
            TaskError: A row is no JSON object, or the split is unknown or empty.
        """
        ...

    async def open(self, limits: Limits) -> Session:
        """A new live environment.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        ...
