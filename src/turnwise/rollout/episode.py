"""`play_episode`: reset, then act, tools or step, again, until something ends it; one asyncio task each.

    reset ──> act ──> tool calls, in order ──┐
               ^  └─> step ──────────────────┤──> end: terminated, truncated, or failed ──> score ──> sink
               └────── what it is told <─────┘

What ends an episode is decided here and nowhere else:

    the environment says so                     TERMINATED, ENV_TRUNCATED
    a reply without calls, and no ``step``      ANSWERED
    a limit of the episode                      MAX_TURNS, MAX_TOOL_CALLS, MAX_TOKENS, TIME_LIMIT; CUT_REPLY
    a call of the policy's hangs for good       TIME_LIMIT: the policy can cause it, so it is scored and kept
    any other fault once the policy has spoken  FORFEITED: likewise; no fault may pay better than losing
    a fault outside of the policy's control     …_FAILED, PROMPT_TOO_LONG, CANCELLED: excluded, never scored

Outside of its control is what breaks before its first reply, a policy that cannot answer, and what raises
`EnvLostError`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from turnwise.envs.observe import finite
from turnwise.envs.session import Session
from turnwise.errors import (
    ContextOverflowError,
    EnvError,
    EnvHungError,
    EnvLostError,
    ImageError,
    PolicyError,
    ScoringError,
    TemplateError,
    TurnwiseError,
    boundary,
)
from turnwise.rollout.arena import Arena
from turnwise.rollout.policies import TeacherPolicy
from turnwise.rollout.policy import Context, Policy
from turnwise.rollout.record import EpisodeOrder, OpenTurn, Record, Start, failure_of
from turnwise.rollout.sessions import HeldSessions
from turnwise.types import FORFEIT, STEPS, Finish, Message, Reward, Sampling, Step, StopReason, Trajectory

log = logging.getLogger(__name__)
T = TypeVar("T")

Sink = Callable[[Trajectory], None]
"""Takes every dispatched episode exactly once, failed ones included; what it raises stops the run."""

TURNS_UNBROKEN = 8
"""After so many turns an episode lets go of the event loop, whether or not anything made it wait."""

POLICY_CAUSED = ("tool", "step")
"""Calls into the environment that a policy can make hang."""


async def play_episode(
    order: EpisodeOrder,
    *,
    arena: Arena,
    policy: Policy,
    sampling: Sampling,
    sink: Sink,
    start: Start | None = None,
    sessions: HeldSessions | None = None,
) -> Trajectory:
    """Play one episode to its end.

    Args:
        order: What to play.
        arena: Where; reward functions are not its business but the group's.
        policy: Who answers.
        sampling: How; each turn's seed is derived from this seed, the episode's, the sibling and the turn.
        sink: Called once with the trajectory, before this returns or is cancelled.
        start: Shared by siblings, to find out whether they start alike.
        sessions: Takes the environment as it is at the end; it goes back to the arena's pool if None.

    Raises:
        CancelledError: After the sink took what had been played, with `StopReason.CANCELLED`.
    """
    return await _Episode(order, arena, policy, sampling, start or Start(), sessions).play(sink)


class _Episode:
    def __init__(
        self,
        order: EpisodeOrder,
        arena: Arena,
        policy: Policy,
        sampling: Sampling,
        start: Start,
        sessions: HeldSessions | None,
    ) -> None:
        self.order, self.arena, self.policy, self.sampling, self.start = order, arena, policy, sampling, start
        self.sessions = sessions
        self.limits = arena.limits
        self.record = Record(order, sampling, policy.name, arena.harness)
        self.session: Session | None = None
        self.phase = "open"
        """What is being awaited, for errors."""
        self.broken = False
        """A call into the environment has not returned in good order: nothing more may be asked of it."""

    async def play(self, sink: Sink) -> Trajectory:
        record = self.record
        try:
            record.stop_reason = await self._played()
            if not record.stop_reason.failed:
                await self._score()
        except BaseException as error:
            # Cancelled, or a defect of ours: either way the sink gets what there is, and the error goes on.
            record.stop_reason = StopReason.CANCELLED
            if not isinstance(error, asyncio.CancelledError):
                record.error = failure_of(error, self._where())
            raise
        finally:
            try:
                trajectory = record.trajectory()
                sink(trajectory)
            finally:
                await self._release()
        return trajectory

    # -- from reset to the end ---------------------------------------------------------------------------

    async def _played(self) -> StopReason:
        """Play until something ends it; every error that is data becomes a stop reason."""
        try:
            # A full server is waited for, at nobody's expense: opening has deadlines of its own.
            self.session = await self._env("open", self.arena.sessions.acquire())
            async with asyncio.timeout(self.limits.seconds):
                await self._reset(self.session)
                while True:
                    stop = await self._turn()
                    if stop is not None:
                        return stop
                    # A script in an inline environment never waits; siblings, this deadline and Ctrl-C do.
                    # (Not at every turn: short scripted episodes end in the order in which they began.)
                    if self.record.turns % TURNS_UNBROKEN == 0:
                        await asyncio.sleep(0)
        except TimeoutError:
            if self.record.turns:
                return StopReason.TIME_LIMIT
            spent = f"the episode's {self.limits.seconds} s ran out before the policy said anything"
            if self.phase != "reply":
                return self._failed(StopReason.ENV_FAILED, EnvError(f"{self._where()}: {spent}"))
            advice = "raise limits.seconds, or lower the concurrency or sampling.max_tokens"
            return self._failed(StopReason.POLICY_FAILED, PolicyError(f"{spent}; {advice}"))
        except EnvHungError as error:
            if self.phase.startswith(POLICY_CAUSED):
                self.record.count("tool_timeouts")
                return self._failed(StopReason.TIME_LIMIT, error)
            return self._blamed(StopReason.ENV_FAILED, error)
        except EnvError as error:
            return self._blamed(StopReason.ENV_FAILED, error)
        except ScoringError as error:
            return self._blamed(StopReason.SCORING_FAILED, error)
        except ContextOverflowError as error:
            if self.record.turns:
                return StopReason.MAX_TOKENS
            stop = self._failed(StopReason.PROMPT_TOO_LONG, error)
            assert self.record.error is not None
            advice = f"{error}; raise max_context (of the limits or of the engine), or leave this task out"
            self.record.error = replace(self.record.error, message=advice)
            return stop
        except (ImageError, TemplateError) as error:
            # What the template or the processor refuses: the policy's own replies, and what it had drawn.
            return self._blamed(StopReason.POLICY_FAILED, error)
        except TurnwiseError as error:
            return self._failed(StopReason.POLICY_FAILED, error)

    async def _reset(self, session: Session) -> None:
        first = await self._env("reset", session.reset(self.order.task, self.order.seed))
        if session.system is not None:
            first = (Message.system(session.system), *first)
        self.record.begin(session.tools, first)
        if self.start.differs(first):
            self.record.count("start_differs")

    async def _turn(self) -> StopReason | None:
        """One reply and the answer to it; why the episode ends, if it does."""
        assert self.session is not None
        limits, record = self.limits, self.record
        sampling = self.sampling
        if limits.max_tokens is not None:
            left = limits.max_tokens - record.sampled_tokens
            if left <= 0:
                return StopReason.MAX_TOKENS
            if left < sampling.max_tokens:
                sampling = replace(sampling, max_tokens=left)
        if limits.max_completion is not None and not record.turns:
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, limits.max_completion))
        state_key = await self._env("state_key", self.session.state_key())
        reply_started = time.perf_counter()
        self.phase = "reply"
        try:
            with boundary(PolicyError, f"policy {self.policy.name}"):
                reply = await self.policy.act(self._context(sampling))
        finally:
            seconds = time.perf_counter() - reply_started
            record.policy_seconds += seconds
        turn = record.add_reply(reply, state_key, seconds)

        cut = None
        if reply.finish is Finish.LENGTH:
            record.count("cut_replies")
            cut = self._cut(reply.ids)
            if cut is not StopReason.CUT_REPLY or limits.cut_reply == "end":
                return cut
        env_seconds = record.env_seconds
        try:
            if turn.reply.message.tool_calls:
                stop = await self._call_tools(turn)
            elif self.session.has_step:
                stop = await self._step(turn)
            else:
                return cut or StopReason.ANSWERED
        finally:
            turn.env_seconds = record.env_seconds - env_seconds
        if stop is None and limits.max_turns is not None and record.turns >= limits.max_turns:
            return StopReason.MAX_TURNS
        return stop

    def _context(self, sampling: Sampling) -> Context:
        record = self.record
        text = f"{sampling.seed}/{self.order.seed}/{self.order.sibling}/{record.turns}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
        return Context(
            turn=record.turns,
            session=self.order.id,
            messages=tuple(record.messages),
            new_messages=tuple(record.messages[record.answered :]),
            tools=record.tools,
            sampling=replace(sampling, seed=seed),
            held_ids=record.held_ids,
            held_images=record.segments[-1].images,
            max_context=self._max_context(),
            teacher=self._teach,
        )

    def _max_context(self) -> int | None:
        """What context and reply may reach: the limit for both, or the prompt and all that may follow it."""
        most, completion = self.limits.max_context, self.limits.max_completion
        if completion is None or not self.record.turns:
            return most
        whole = self.record.prompt_tokens + completion
        return whole if most is None else min(most, whole)

    def _cut(self, ids: Sequence[int] | None) -> StopReason:
        """Which limit a reply ran into: the episode's budget, its own, or the context."""
        budget = self.limits.max_tokens
        if budget is not None and self.record.sampled_tokens >= budget:
            return StopReason.MAX_TOKENS
        if ids is None or len(ids) >= self.sampling.max_tokens:
            return StopReason.CUT_REPLY
        return StopReason.MAX_TOKENS

    async def _call_tools(self, turn: OpenTurn) -> StopReason | None:
        """Run a reply's calls one after another. Once the episode is over no further one runs: counted."""
        assert self.session is not None
        calls = turn.reply.message.tool_calls
        limit, turns = self.limits.max_tool_calls, self.limits.max_tool_turns
        late = turns is not None and self.record.turns > turns
        for number, call in enumerate(calls):
            if late or (limit is not None and self.record.tool_calls >= limit):
                self.record.count("skipped_calls", len(calls) - number)
                return StopReason.MAX_TOOL_CALLS
            self.record.tool_calls += 1
            result = await self._env(f"tool {call.name}", self.session.call(call))
            self.record.add_result(turn, result)
            stop = self._take(turn, result.step)
            if stop is not None:
                self.record.count("skipped_calls", len(calls) - number - 1)
                return stop
        return None

    async def _step(self, turn: OpenTurn) -> StopReason | None:
        assert self.session is not None
        step = await self._env("step", self.session.step(turn.reply.message))
        if isinstance(step.observation, list):
            self.record.tell(turn, *step.observation)
        elif step.observation or not (step.terminated or step.truncated):
            self.record.tell(turn, Message.user(step.observation))
        return self._take(turn, step)

    def _take(self, turn: OpenTurn, step: Step | None) -> StopReason | None:
        if step is None:
            return None
        if step.reward is not None:
            finite(step.reward, f"{self._where()}: reward")
        self.record.pay(turn, step)
        if step.terminated:
            return StopReason.TERMINATED
        return StopReason.ENV_TRUNCATED if step.truncated else None

    # -- the end -----------------------------------------------------------------------------------------

    async def _score(self) -> None:
        """Ask for the environment's rewards; an end without them is worth its steps and the forfeit."""
        record, arena = self.record, self.arena
        own: dict[str, float | None] = {}
        if not self.broken and record.stop_reason is not StopReason.FORFEITED:
            try:
                own = await self._own_rewards()
            except (ScoringError, EnvError) as error:
                scoring = isinstance(error, ScoringError)
                excused = StopReason.SCORING_FAILED if scoring else StopReason.ENV_FAILED
                record.stop_reason = self._blamed(excused, error)
        stop, paid = record.stop_reason, record.paid
        assert stop is not None
        if stop.failed:
            return
        lost = self.broken or stop is StopReason.FORFEITED
        if paid is None and (lost or (not own and not arena.functions)):
            # Steps are all that could have paid, and they paid nothing: that is a score, not a gap.
            paid = 0.0
        values = own if paid is None else {STEPS: paid, **own}
        # Left before the environment ended it, and nobody is there to say what that was worth.
        left = stop not in (StopReason.TERMINATED, StopReason.ENV_TRUNCATED)
        unscored = left and not own and not arena.functions
        if not (lost or unscored):
            arena.compare_with_forfeit(record.end_paid + sum(value or 0.0 for value in own.values()))
        elif arena.spec.forfeit:
            values[FORFEIT] = arena.spec.forfeit
        record.rewards = {
            name: Reward(value=value, weight=arena.reward_weight) for name, value in values.items()
        }

    async def _own_rewards(self) -> dict[str, float | None]:
        assert self.session is not None
        own = await self._env("reward", self.session.reward())
        for name, value in own.items():
            if value is not None:
                finite(value, f"{self._where()} '{name}'")
        for name, meant in ((STEPS, "what steps pay"), (FORFEIT, "what a forfeit pays")):
            if name in own:
                raise ScoringError(f"{self._where()}: '{name}' is {meant}; use another name")
        return own

    def _blamed(self, excused: StopReason, error: BaseException) -> StopReason:
        """Whose doing a fault is. A policy that has spoken can cause any that is not declared a loss.

        A teacher speaks for the environment, and there is nothing that it could gain.
        """
        nobody = isinstance(error, EnvLostError) or not self.record.turns
        if nobody or self.policy.name == TeacherPolicy.name:
            return self._failed(excused, error)
        return self._failed(StopReason.FORFEITED, error)

    def _failed(self, reason: StopReason, error: BaseException) -> StopReason:
        self.record.error = failure_of(error, self._where())
        return reason

    async def _release(self) -> None:
        if self.session is not None:
            reason = self.record.stop_reason
            # A session may be reset again only after `reward`, which is not asked of a faulty episode.
            healthy = not self.broken and reason is not None and not reason.faulty
            if self.sessions is None:
                self.arena.sessions.release(self.session, healthy=healthy)
            else:
                self.sessions.keep(self.order.id, self.session, healthy=healthy)
        try:
            with boundary(PolicyError, f"policy {self.policy.name}: release of {self.order.id}"):
                await self.policy.release(self.order.id)
        except TurnwiseError as error:
            log.warning("%s", error)

    # -- calls into the environment ----------------------------------------------------------------------

    async def _env(self, phase: str, call: Awaitable[T]) -> T:
        """Await a call into the environment; one that does not return in good order breaks the session."""
        self.phase, self.broken = phase, True
        started = time.perf_counter()
        try:
            with boundary(EnvError, self._where()):
                value = await call
        finally:
            self.record.env_seconds += time.perf_counter() - started
        self.broken = False
        return value

    async def _teach(self, messages: Sequence[Message]) -> Message:
        assert self.session is not None
        said = await self._env("teacher", self.session.teacher(messages))
        self.phase = "reply"
        return said

    def _where(self) -> str:
        if self.phase == "reply":
            return f"policy {self.policy.name}"
        return f"environment {self.order.env}: {self.phase}"
