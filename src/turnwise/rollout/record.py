"""`Record`: an episode while it is played, and the `Trajectory` that it becomes, whenever it ends."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from turnwise.errors import describe, message_of
from turnwise.types import (
    Failure,
    Message,
    Reply,
    Reward,
    Sampling,
    Segment,
    Step,
    StopReason,
    Task,
    ToolResult,
    ToolSchema,
    Trajectory,
    Turn,
)

_ATTEMPT = re.compile(r"~(\d+)$")


def episode_of(trajectory_id: str) -> str:
    """The id of the first attempt, of an episode or a group: ``rl/catch/3/s0`` of ``rl/catch/3/s0~2``."""
    return _ATTEMPT.sub("", trajectory_id)


def attempt_of(trajectory_id: str) -> int:
    """Which attempt an id is of: 2 of ``rl/catch/3/s0~2``, 0 of the first."""
    found = _ATTEMPT.search(trajectory_id)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOrder:
    """One episode to play."""

    id: str
    """Unique in the run, and the same when the run is resumed: ``rl/12/catch/3/s5``."""
    group_id: str
    env: str
    task: Task
    seed: int
    """Of the environment; siblings share it."""
    sibling: int = 0
    """Sets the siblings' sampling apart."""

    def again(self) -> EpisodeOrder:
        """The next attempt at it."""
        return replace(self, id=f"{episode_of(self.id)}~{attempt_of(self.id) + 1}")


class Start:
    """Where the siblings of a group started: a difference is a fault of the environment, and counted."""

    def __init__(self, messages: Sequence[Message] | None = None) -> None:
        self.messages = None if messages is None else tuple(messages)

    def differs(self, messages: Sequence[Message]) -> bool:
        """Whether these are not the messages that came first."""
        if self.messages is None:
            self.messages = tuple(messages)
        return self.messages != tuple(messages)


@dataclass(slots=True, eq=False)
class OpenTurn:
    """A turn whose answer is still coming in."""

    reply: Reply
    state_key: str | None
    policy_seconds: float
    tool_results: list[ToolResult] = field(default_factory=list)
    feedback: list[Message] = field(default_factory=list)
    reward: float | None = None
    env_seconds: float = 0.0

    def close(self) -> Turn:
        """The turn as it stands."""
        reply = self.reply
        return Turn(
            message=reply.message,
            context_ids=reply.context_ids,
            ids=reply.ids,
            logprobs=reply.logprobs,
            versions=reply.versions,
            kept_mass=reply.kept_mass,
            finish=reply.finish,
            tool_results=tuple(self.tool_results),
            feedback=tuple(self.feedback),
            reward=self.reward,
            state_key=self.state_key,
            policy_seconds=self.policy_seconds,
            env_seconds=self.env_seconds,
        )


@dataclass(slots=True, eq=False)
class OpenSegment:
    """A segment that may still grow."""

    prompt: tuple[Message, ...]
    turns: list[OpenTurn] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def close(self) -> Segment:
        """The segment as it stands."""
        return Segment(
            prompt=self.prompt, turns=tuple(turn.close() for turn in self.turns), images=tuple(self.images)
        )


class Record:
    """Everything that has happened in an episode so far. Nothing that was added is ever lost.

    Args:
        order: The episode.
        sampling: What its replies are sampled with.
        policy: Who plays.
        harness: Hash of the harness.
    """

    def __init__(self, order: EpisodeOrder, sampling: Sampling, policy: str, harness: str) -> None:
        self.order, self.sampling, self.policy, self.harness = order, sampling, policy, harness
        self.tools: tuple[ToolSchema, ...] = ()
        self.messages: list[Message] = []
        """The conversation."""
        self.answered = 0
        """How many of the messages the policy had seen at its last reply, that reply included."""
        self.segments: list[OpenSegment] = []
        self.held_ids: list[int] | None = None
        """Tokens of the last segment; None where its replies have none."""
        self.turns = 0
        self.prompt_tokens = 0
        """What the first reply was given."""
        self.tool_calls = 0
        self.sampled_tokens = 0
        self.counts: dict[str, float] = {
            "tool_calls": 0, "malformed_calls": 0, "tool_errors": 0, "skipped_calls": 0,
            "coerced_arguments": 0, "new_segments": 0,
            "sampled_tokens": 0, "prefilled_tokens": 0, "cached_tokens": 0,
        }  # fmt: skip
        self.rewards: Mapping[str, Reward] = {}
        self.stop_reason: StopReason | None = None
        self.error: Failure | None = None
        self.policy_seconds = self.env_seconds = 0.0
        self._call_ids: set[str] = set()
        self._started, self._clock = time.time(), time.perf_counter()

    def count(self, name: str, by: float = 1) -> None:
        """Add to a metric."""
        self.counts[name] = self.counts.get(name, 0) + by

    def begin(self, tools: Sequence[ToolSchema], messages: Sequence[Message]) -> None:
        """The environment was reset."""
        self.tools = tuple(tools)
        self.messages.extend(messages)
        self.segments.append(OpenSegment(tuple(messages)))

    def add_reply(self, reply: Reply, state_key: str | None, seconds: float) -> OpenTurn:
        """The policy answered. Calls without an id of their own get one that is unique in the episode."""
        if reply.message.tool_calls:
            reply = replace(reply, message=self._identified(reply.message))
        segment = self.segments[-1]
        # Tokens cannot follow where none are held: what came before was demonstrated.
        rewritten = reply.new_segment or (reply.ids is not None and self.held_ids is None)
        if rewritten and segment.turns:
            segment = OpenSegment(tuple(self.messages))
            self.segments.append(segment)
            self.count("new_segments")
        if reply.ids is None:
            self.held_ids = None
        else:
            if rewritten or self.held_ids is None:
                self.held_ids = []
            self.held_ids += reply.context_ids or ()
            self.count("cached_tokens", reply.cached_tokens)
            self.count("prefilled_tokens", len(self.held_ids) - reply.cached_tokens)
            self.held_ids += reply.ids
            self.sampled_tokens += len(reply.ids)
            if not self.turns:
                self.prompt_tokens = len(reply.context_ids or ())
        segment.images.extend(reply.images)
        turn = OpenTurn(reply, state_key, seconds)
        segment.turns.append(turn)
        self.messages.append(reply.message)
        self.answered = len(self.messages)
        self.turns += 1
        return turn

    def tell(self, turn: OpenTurn, *messages: Message) -> None:
        """The environment answered a turn."""
        turn.feedback.extend(messages)
        self.messages.extend(messages)

    def add_result(self, turn: OpenTurn, result: ToolResult) -> None:
        """A tool answered, or refused to."""
        turn.tool_results.append(result)
        self.tell(turn, Message.tool(result.content, call=result.call))
        self.count("coerced_arguments", result.coerced)
        if result.error == "malformed":
            self.count("malformed_calls")
        elif result.error is not None:
            self.count("tool_errors")
            self.count(f"tool_errors/{result.error}")

    def pay(self, turn: OpenTurn, step: Step) -> None:
        """Take a step's reward, and those of its infos that are numbers, as metrics."""
        if step.reward is not None:
            turn.reward = (turn.reward or 0.0) + step.reward
        for name, value in step.info.items():
            # An integer may be too large for a float, and a policy may have written it.
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
                self.counts[f"info/{name}"] = float(value)

    @property
    def paid(self) -> float | None:
        """Sum of what the steps paid; None if nothing paid."""
        paid = [turn.reward for one in self.segments for turn in one.turns if turn.reward is not None]
        return sum(paid) if paid else None

    @property
    def end_paid(self) -> float:
        """What the last turn's steps paid."""
        turns = self.segments[-1].turns if self.segments else []
        return (turns[-1].reward or 0.0) if turns else 0.0

    def trajectory(self) -> Trajectory:
        """The episode as it ended."""
        assert self.stop_reason is not None, "the episode is still being played"
        segments = tuple(segment.close() for segment in self.segments)
        demonstrated = any(turn.ids is None for segment in segments for turn in segment.turns)
        self.counts["tool_calls"], self.counts["sampled_tokens"] = self.tool_calls, self.sampled_tokens
        return Trajectory(
            id=self.order.id,
            group_id=self.order.group_id,
            env=self.order.env,
            task=self.order.task,
            seed=self.order.seed,
            tools=self.tools,
            segments=segments,
            rewards=self.rewards,
            stop_reason=self.stop_reason,
            error=self.error,
            sampling=None if demonstrated else self.sampling,
            policy=self.policy,
            harness=self.harness,
            metrics={
                **self.counts,
                "policy_seconds": self.policy_seconds,
                "env_seconds": self.env_seconds,
            },
            started=self._started,
            seconds=time.perf_counter() - self._clock,
        )

    def _identified(self, message: Message) -> Message:
        calls = []
        for number, call in enumerate(message.tool_calls):
            wanted = call.id or f"t{self.turns}c{number}"
            name, again = wanted, 1
            while name in self._call_ids:
                again += 1
                name = f"{wanted}.{again}"
            self._call_ids.add(name)
            calls.append(call if call.id == name else replace(call, id=name))
        return replace(message, tool_calls=tuple(calls))


def failure_of(error: BaseException, where: str) -> Failure:
    """An error as data."""
    return Failure(
        kind=type(error).__name__, message=message_of(error), where=where, traceback=describe(error)
    )
