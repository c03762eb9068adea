"""One episode, reply by reply, against a live session: no policy, no tokens. What `check` and a person need.

play = Play(await spec.open(spec.limits), spec.limits)
await play.start(task, seed=0)
while play.stop is None:
    told = await play.say(await play.session.teacher(play.messages))
reward = await play.reward()
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable
from typing import TypeVar

from turnwise.envs.session import Limits, Session
from turnwise.types import Message, StopReason, Task

T = TypeVar("T")


class Play:
    """The state of one episode.

    Args:
        session: A live environment; it stays open when the episode is over.
        limits: Turns and tool calls end the episode as they would in a run. Tokens and the episode's seconds
            do not: there are no tokens, and a person may think for as long as they like.
    """

    def __init__(self, session: Session, limits: Limits) -> None:
        self.session, self.limits = session, limits
        self.messages: list[Message] = []
        self.stop: StopReason | None = None
        self.paid: float | None = None
        """Sum of what the steps paid so far; None if nothing paid."""
        self.turns = 0
        self.tool_calls = 0
        self.tool_errors: list[str] = []
        """The kind of each tool error, in order: ``bad_arguments``."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """How long each call into the environment took, by kind: ``reset``, ``call``, ``step``,
        ``reward``.
        """

    async def start(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Reset the session; the messages that the policy sees first, the system message among them."""
        first = await self._timed("reset", self.session.reset(task, seed))
        system = (Message.system(self.session.system),) if self.session.system else ()
        self.messages = [*system, *first]
        self.stop, self.paid, self.turns, self.tool_calls, self.tool_errors = None, None, 0, 0, []
        return tuple(self.messages)

    async def say(self, reply: Message) -> tuple[Message, ...]:
        """Give a reply to the environment; what it answers. After the end of the episode no tool runs."""
        assert self.stop is None, "the episode is over: start another one"
        self.turns += 1
        self.messages.append(reply)
        if reply.tool_calls:
            told = await self._call(reply)
        elif self.session.has_step:
            told = await self._step(reply)
        else:
            told, self.stop = [], StopReason.ANSWERED
        self.messages += told
        if self.stop is None and self.limits.max_turns is not None and self.turns >= self.limits.max_turns:
            self.stop = StopReason.MAX_TURNS
        return tuple(told)

    async def reward(self) -> float | None:
        """The episode's reward: what the steps paid and the environment's own rewards; None if there is
        neither.
        """
        own = await self._timed("reward", self.session.reward())
        parts = [part for part in (*own.values(), self.paid) if part is not None]
        return sum(parts) if parts else None

    async def _call(self, reply: Message) -> list[Message]:
        told: list[Message] = []
        for call in reply.tool_calls:
            if self.limits.max_tool_calls is not None and self.tool_calls >= self.limits.max_tool_calls:
                self.stop = StopReason.MAX_TOOL_CALLS
                break
            self.tool_calls += 1
            result = await self._timed("call", self.session.call(call))
            told.append(Message.tool(result.content, call=call))
            if result.error is not None:
                self.tool_errors.append(result.error)
            if result.step is not None:
                self._take(result.step.reward, result.step.terminated, result.step.truncated)
            if self.stop is not None:
                break
        return told

    async def _step(self, reply: Message) -> list[Message]:
        step = await self._timed("step", self.session.step(reply))
        self._take(step.reward, step.terminated, step.truncated)
        if isinstance(step.observation, list):
            return step.observation
        return [Message.user(step.observation)] if step.observation else []

    def _take(self, reward: float | None, terminated: bool, truncated: bool) -> None:
        if reward is not None:
            self.paid = (self.paid or 0.0) + reward
        if terminated:
            self.stop = StopReason.TERMINATED
        elif truncated:
            self.stop = StopReason.ENV_TRUNCATED

    async def _timed(self, kind: str, awaited: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            return await awaited
        finally:
            self.seconds[kind].append(time.perf_counter() - started)
