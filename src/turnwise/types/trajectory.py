"""The record of an episode: turns, segments, why it ended, what it was worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from turnwise.types.chat import Message, ToolSchema
from turnwise.types.environment import Task, ToolResult
from turnwise.types.tokens import Finish, Sampling

STEPS = "steps"
"""Name of the reward that sums up what an episode's steps paid, which its turns have one by one."""

FORFEIT = "forfeit"
"""Name of the reward that stands for an end which the policy made impossible to score."""


class StopReason(StrEnum):
    """Why an episode ended. Exactly one of `terminated`, `truncated`, `failed` holds for each."""

    TERMINATED = "terminated"
    """The environment said so."""
    ANSWERED = "answered"
    """A reply without tool calls, to an environment that has no ``step``."""
    ENV_TRUNCATED = "env_truncated"
    """The environment cut it short."""
    MAX_TURNS = "max_turns"
    MAX_TOOL_CALLS = "max_tool_calls"
    MAX_TOKENS = "max_tokens"
    """The episode's token budget or the engine's context was used up, after at least one reply."""
    CUT_REPLY = "cut_reply"
    """A single reply ran into its own limit."""
    TIME_LIMIT = "time_limit"
    """The episode's seconds were used up, or a tool hung and could not be stopped."""
    FORFEITED = "forfeited"
    """What the policy did crashed the environment or broke its scoring."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The task did not fit the budget before the policy said anything."""
    ENV_FAILED = "env_failed"
    POLICY_FAILED = "policy_failed"
    SCORING_FAILED = "scoring_failed"
    CANCELLED = "cancelled"

    @property
    def terminated(self) -> bool:
        """The task reached its own end."""
        return self in (StopReason.TERMINATED, StopReason.ANSWERED)

    @property
    def failed(self) -> bool:
        """Something outside the policy's control: left out of the baseline, never scored."""
        return self in (
            StopReason.PROMPT_TOO_LONG, StopReason.ENV_FAILED, StopReason.POLICY_FAILED,
            StopReason.SCORING_FAILED, StopReason.CANCELLED,
        )  # fmt: skip

    @property
    def faulty(self) -> bool:
        """Something broke, whoever caused it: too many of these stop a run."""
        return self.failed or self is StopReason.FORFEITED

    @property
    def truncated(self) -> bool:
        """A budget ran out, or the policy broke what it played in: scored and kept."""
        return not self.terminated and not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong in an episode, as data."""

    kind: str
    """The error's class name."""
    message: str
    where: str
    """The boundary at which it was caught, such as ``environment catch: reset``."""
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One named component of an episode's reward."""

    value: float | None
    """None: this reward did not apply to this episode."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One reply and what came of it.

    Two turns of one segment; P is the prompt, A the sampled replies, B the bridge to the second:

        turn 0: context_ids = P    ids = A0    feedback = (tool message,)
        turn 1: context_ids = B    ids = A1    feedback = ()
        the engine was given P, then P + A0 + B; the segment's tokens are P + A0 + B + A1
    """

    message: Message
    """The parsed reply."""
    context_ids: list[int] | None = None
    """Appended before this reply: a segment's whole prompt, or the bridge; None if demonstrated."""
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    versions: list[int] | None = None
    kept_mass: list[float] | None = None
    finish: Finish = Finish.STOP
    tool_results: tuple[ToolResult, ...] = ()
    feedback: tuple[Message, ...] = ()
    """What the policy was told in answer; the next turn's context renders it."""
    reward: float | None = None
    """Sum of what this turn's steps paid; None if nothing paid."""
    state_key: str | None = None
    """The environment's key of the state that this reply was made in, for credit by turn."""
    policy_seconds: float = 0.0
    env_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Turns over one growing row of tokens. A new one starts where the context was rewritten."""

    prompt: tuple[Message, ...]
    """The whole conversation before the first turn of this segment."""
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation at the segment's end."""
        out = list(self.prompt)
        for turn in self.turns:
            out += [turn.message, *turn.feedback]
        return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One finished episode, failed ones included."""

    id: str
    """Unique in the run and the same when the run is resumed: ``rl/12/catch/3/s5``."""
    group_id: str
    env: str
    """The environment's name in the recipe."""
    task: Task
    seed: int
    tools: tuple[ToolSchema, ...] = ()
    segments: tuple[Segment, ...]
    rewards: Mapping[str, Reward]
    stop_reason: StopReason
    error: Failure | None = None
    sampling: Sampling | None = None
    """None for demonstrations."""
    policy: str
    """Who played: ``engine``, ``teacher``, ``endpoint:…``, ``person``, ``script``."""
    harness: str = ""
    """Hash of what renders, parses, limits and scores: equal hashes may be compared."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts: ``malformed_calls``, ``tool_errors``, ``new_segments``, ``prefilled_tokens`` …"""
    started: float = 0.0
    """Unix seconds."""
    seconds: float = 0.0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, over all segments."""
        return tuple(turn for segment in self.segments for turn in segment.turns)

    @property
    def reward(self) -> float | None:
        """Weighted sum of the rewards that apply; None for a failed episode or where none applies."""
        if self.stop_reason.failed:
            return None
        values = [
            reward.weight * reward.value for reward in self.rewards.values() if reward.value is not None
        ]
        return sum(values) if values else None

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(turn.ids or ()) for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """Siblings: episodes of one task from one seed. Found by id, never by position."""

    id: str
    env: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    version: int = 0
    """The weights that were current when the group was dispatched."""

    @property
    def scored(self) -> tuple[Trajectory, ...]:
        """The siblings that have a reward: the group's baseline is over these alone."""
        return tuple(trajectory for trajectory in self.trajectories if trajectory.reward is not None)
