"""`HostedEnv`: a `Session` over a live `Env`, run where its class says.

    inline = True            every method on the event loop         (a call costs a few microseconds)
    otherwise                sync methods on one thread, async methods in one task, for the environment's life
    isolation = "process"    all of it in a child process: `turnwise.envs.process`

Whatever a tool does is data: it may raise, hang, return nonsense or 10 MB, and the episode goes on or ends
with a reason. A hung coroutine is cancelled and the environment lives on; a hung thread cannot be stopped, so
it is abandoned, counted, and its environment closed should the call ever return.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Self, TypeVar

from turnwise import images
from turnwise.envs import contain, observe
from turnwise.envs.base import Env
from turnwise.envs.session import Limits
from turnwise.envs.task import EnvTask
from turnwise.envs.thread import EnvThread
from turnwise.envs.tools import Tool, told_malformed, told_unknown
from turnwise.envs.validate import ArgumentsError
from turnwise.errors import (
    EnvError,
    EnvHungError,
    EnvLostError,
    ScoringError,
    TurnwiseError,
    boundary,
    said,
)
from turnwise.types import Content, Message, Step, Task, ToolCall, ToolResult, ToolSchema

log = logging.getLogger(__name__)
T = TypeVar("T")

GRACE_SECONDS = 1.0
"""How long closing waits for a thread that is in a call which nobody waits for any more."""


class _RaisedError(TurnwiseError):
    """Something foreign was raised by the author's code; the cause is it."""


class _OverranError(EnvError):
    """A coroutine passed its deadline and was stopped: the environment can go on."""


class HostedEnv:
    """A live environment of ours; made by `open`. See `turnwise.envs.session.Session`."""

    def __init__(self, name: str, limits: Limits, *, threaded: bool) -> None:
        self.name = name
        self.tools: tuple[ToolSchema, ...] = ()
        self.system: str | None = None
        self.has_step = False
        self.raised: Callable[[str, BaseException], None] = _note
        """Hears what a tool or a step raised, after a line that says where; the policy alone is told."""
        self._limits = limits
        self._threaded = threaded
        self._env: Env | None = None
        self._tools: dict[str, tuple[Tool, Callable[..., Any]]] = {}
        self._thread: EnvThread | None = None
        self._lock = asyncio.Lock()
        self._task: EnvTask | None = None
        self._hung = False
        self._closed = False

    @classmethod
    async def open(cls, name: str, make: Callable[[], Env], limits: Limits, *, threaded: bool) -> Self:
        """Construct an environment where it will live.

        Args:
            name: For errors.
            make: The constructor.
            limits: Of these, ``call_seconds`` and ``max_observation`` are kept here.
            threaded: Sync methods, the constructor among them, run on a thread of their own.

        Raises:
            EnvError: The constructor raised.
            EnvHungError: It hung.
        """
        host = cls(name, limits, threaded=threaded)
        what = f"environment {name}: constructor"
        try:
            with boundary(EnvError, what):
                await host._run(what, partial(host._adopt, make))
        except BaseException:
            # Also when cancelled: the constructor may still finish on its thread, and is closed there then.
            await host.close()
            raise
        return host

    @property
    def alive(self) -> bool:
        """Whether another episode can be played."""
        return self._env is not None and not self._hung and not self._closed

    @property
    def instance(self) -> Any:
        """The environment, or what it speaks for where an adapter made it."""
        return getattr(self._env, "inner", self._env)

    # -- the session protocol ------------------------------------------------------------------------

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start an episode; ``env.rng`` is seeded before, and the task, images and all, is its own copy."""
        what = f"environment {self.name}: reset"
        env = self._live(what)

        def seeded_reset() -> Any:
            env.rng = random.Random(seed)
            return env.reset(images.revived(task))

        with boundary(EnvError, what):
            messages = await self._run(what, seeded_reset, partial(observe.messages, what=what))
        if self.system is not None and any(message.role == "system" for message in messages):
            raise EnvError(f"{what} returned a system message, and the class has `system` too; keep one")
        return messages

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one tool call; what went wrong with it is in the result."""
        started = perf_counter()
        entry = self._tools.get(call.name)
        if call.error is not None:
            return self._refused(call, "malformed", told_malformed(call, self._schemas))
        if entry is None:
            return self._refused(call, "unknown_tool", told_unknown(call.name, self._schemas))
        tool, method = entry
        try:
            checked = tool.check(call.arguments)
        except ArgumentsError as wrong:
            return self._refused(call, "bad_arguments", str(wrong))
        what = f"environment {self.name}: tool {call.name}"
        self._live(what)
        failed = partial(self._refused, call, coerced=checked.coerced, started=started)
        try:
            with boundary(_RaisedError, what):
                content, step = await self._run(
                    what, partial(method, **checked.arguments), partial(self._tool_answer, what=what)
                )
        except _OverranError:
            return failed("timeout", f"{call.name} did not finish within {self._limits.call_seconds:g} s.")
        except (EnvError, ScoringError):
            raise
        except TurnwiseError as error:
            cause = _cause(error)
            if isinstance(cause, observe.BadResultError):
                return failed("bad_result", f"{call.name} failed: it returned {cause}.")
            self.raised(str(error), cause)
            return failed("raised", f"{call.name} failed: {said(cause, None)}")
        return ToolResult(
            call=call, content=content, step=step, coerced=checked.coerced, seconds=perf_counter() - started
        )

    async def step(self, reply: Message) -> Step:
        """The environment's answer to a reply; an exception in it is the observation."""
        what = f"environment {self.name}: step"
        env = self._live(what)
        try:
            with boundary(_RaisedError, what):
                return await self._run(
                    what,
                    partial(env.step, reply.text),
                    partial(observe.step, limit=self._limits.max_observation, what=what),
                )
        except _OverranError:
            error, told = "timeout", f"it did not finish within {self._limits.call_seconds:g} s."
        except (EnvError, ScoringError):
            raise
        except TurnwiseError as raised:
            cause = _cause(raised)
            if isinstance(cause, observe.BadResultError):
                error, told = "bad_result", f"it returned {cause}."
            else:
                self.raised(str(raised), cause)
                error, told = "raised", said(cause, None)
        told = observe.cut(f"The environment failed: {told}", self._limits.max_observation)
        return Step(told, info={"error": error})

    async def reward(self) -> dict[str, float | None]:
        """The environment's own rewards, by name."""
        what = f"environment {self.name}: reward"
        env = self._live(what)
        if type(env).reward is Env.reward:
            return {}
        try:
            with boundary(ScoringError, what):
                return await self._run(what, env.reward, partial(observe.rewards, what=what))
        except (_OverranError, EnvHungError) as hung:
            raise ScoringError(str(hung)) from hung

    async def teacher(self, messages: Sequence[Message]) -> Message:
        """What the environment's demonstrator says."""
        what = f"environment {self.name}: teacher"
        env = self._live(what)
        if type(env).teacher is Env.teacher:
            raise EnvError(f"environment {self.name} has no teacher: define teacher(self, messages)")
        with boundary(EnvError, what):
            said: Any = await self._run(what, partial(env.teacher, messages))
        if isinstance(said, str):
            return Message.assistant(said)
        if not isinstance(said, Message) or said.role != "assistant":
            found = f"a {said.role} message" if isinstance(said, Message) else type(said).__name__
            raise EnvError(f"{what} returned {found}; return text or Message.assistant(…)")
        return observe.spoken(said, what)

    async def state_key(self) -> str | None:
        """The key of the present state, where the environment defines one."""
        what = f"environment {self.name}: state_key"
        env = self._live(what)
        if type(env).state_key is Env.state_key:
            return None
        with boundary(EnvError, what):
            key: Any = await self._run(what, env.state_key)
        if not isinstance(key, str):
            raise EnvError(
                f"{what} returned {type(key).__name__}; return text that is equal for equal states"
            )
        return key

    async def close(self) -> None:
        """Close the environment where it lives, once; a hung one is closed if its call ever returns."""
        if self._closed:
            return
        self._closed = True
        if self._hung or await self._given_up_on():
            return
        what = f"environment {self.name}: close"
        try:
            with boundary(EnvError, what):
                await self._run(what, self._close_env)
        except TurnwiseError as error:
            log.warning("%s", error)
        if self._task is not None and not self._hung:
            self._task.stop()
        if self._thread is not None and not self._hung:
            self._thread.stop()

    async def _given_up_on(self) -> bool:
        """Whether the thread is in a call that was cancelled, and stays in it: it is closed after that."""
        if self._thread is None or not self._thread.busy:
            return False
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await self._thread.run(lambda: None, GRACE_SECONDS)
        except (TimeoutError, EnvHungError):
            self._hang(f"environment {self.name}: a call that was cancelled", self._thread)
        return self._hung

    # -- where methods run ---------------------------------------------------------------------------

    async def _run(
        self, what: str, function: Callable[[], Any], finish: Callable[[Any], T] | None = None
    ) -> T:
        """``finish(function())``, on the thread or the loop, within the deadline; ``what`` is for errors.

        Raises:
            _OverranError: A coroutine was stopped at the deadline.
            EnvHungError: A thread or a coroutine could not be.
        """
        job = partial(contain.call, partial(_perform, function, finish))
        async with self._lock:
            if self._threaded and not inspect.iscoroutinefunction(function):
                self._thread = self._thread or EnvThread(self.name)
                try:
                    result = await self._thread.run(job, self._limits.call_seconds)
                except EnvHungError as hung:
                    self._hang(what, self._thread)
                    raise EnvHungError(f"{what}: {hung}") from None
            else:
                result = job()
            if isinstance(result, _Pending):
                done = await self._bounded(what, result.awaitable)
                result = contain.call(partial(finish, done)) if finish else done
        value: T = result
        return value

    async def _bounded(self, what: str, awaitable: Awaitable[Any]) -> Any:
        """Await the author's coroutine; cancel it at the deadline, and when the caller is cancelled."""
        seconds = self._limits.call_seconds
        try:
            self._task = self._task or EnvTask()
            return await self._task.run(awaitable, seconds)
        except contain.OverranError:
            raise _OverranError(f"{what}: it did not finish within {seconds:g} s") from None
        except contain.StuckError as stuck:
            self._hung = True
            stuck.task.add_done_callback(self._close_later)
            raise EnvHungError(
                f"{what}: it did not return within {seconds:g} s and ignores cancellation"
            ) from None

    def _hang(self, what: str, thread: EnvThread) -> None:
        """The thread is lost to a call; when that returns, the environment is closed there."""
        self._hung = True
        loop = asyncio.get_running_loop()
        log.warning("%s hangs; its thread is abandoned", what)

        def close_late() -> None:
            with boundary(EnvError, f"environment {self.name}: close"):
                closing = self._close_env()
                if inspect.isawaitable(closing):
                    loop.call_soon_threadsafe(asyncio.ensure_future, closing)

        thread.abandon(close_late)

    def _close_later(self, _: asyncio.Future[Any]) -> None:
        """A coroutine that ignored its cancellation has returned at last."""
        self._hung = self._closed = False
        self._closing = asyncio.ensure_future(self.close())

    def _live(self, what: str) -> Env:
        if not self.alive or self._env is None:
            state = "hangs in an earlier call" if self._hung else "is closed"
            raise (EnvHungError if self._hung else EnvLostError)(f"{what}: the environment {state}")
        return self._env

    def _adopt(self, make: Callable[[], Env]) -> None:
        self._env = env = make()
        self.system = env.system
        self.has_step = type(env).step is not Env.step
        self._tools = {tool.schema.name: (tool, tool.bind(env)) for tool in env.toolset()}
        self.tools = tuple(tool.schema for tool, _ in self._tools.values())

    def _close_env(self) -> Any:
        env, self._env = self._env, None
        return env.close() if env is not None else None

    # -- what the model is told ----------------------------------------------------------------------

    def _tool_answer(self, value: Any, *, what: str) -> tuple[Content, Step | None]:
        limit = self._limits.max_observation
        if not isinstance(value, Step):
            return observe.observation(value, limit), None
        step = observe.step(value, limit, what)
        if isinstance(step.observation, list):
            raise observe.BadResultError("a Step with messages: a tool's Step holds text or content blocks")
        return step.observation, step

    @property
    def _schemas(self) -> dict[str, ToolSchema]:
        return {tool.name: tool for tool in self.tools}

    def _refused(
        self, call: ToolCall, error: Any, told: str, *, coerced: int = 0, started: float | None = None
    ) -> ToolResult:
        return ToolResult(
            call=call,
            content=observe.cut(told, self._limits.max_observation),
            error=error,
            coerced=coerced,
            seconds=0.0 if started is None else perf_counter() - started,
        )


def _note(what: str, raised: BaseException) -> None:
    log.debug("%s", what, exc_info=raised)


class _Pending:
    """An awaitable that a method returned: awaited on the loop, wherever the method ran."""

    __slots__ = ("awaitable",)

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self.awaitable = awaitable


def _perform(function: Callable[[], Any], finish: Callable[[Any], Any] | None) -> Any:
    value = function()
    if inspect.isawaitable(value):
        return _Pending(value)
    return finish(value) if finish else value


def _cause(error: TurnwiseError) -> BaseException:
    return error.__cause__ if isinstance(error, _RaisedError) and error.__cause__ else error
