"""`EnvTask`: an environment's coroutines in one task, bounded, whatever they do to it."""

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from turnwise.envs import contain
from turnwise.envs.base import Env
from turnwise.envs.contain import OverranError, StuckError
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.envs.task import EnvTask
from turnwise.errors import EnvHungError
from turnwise.types import Message, Step


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 20))

    return run


async def value(one: Any) -> Any:
    await asyncio.sleep(0)
    return one


async def raising(odd: BaseException) -> None:
    await asyncio.sleep(0)
    raise odd


@on_a_loop
async def test_calls_answer_and_raise_one_after_another() -> None:
    task = EnvTask()
    assert [await task.run(value(i), 5) for i in range(100)] == list(range(100))
    with pytest.raises(KeyError):
        await task.run(raising(KeyError("x")), 5)
    assert await task.run(value(1), 5) == 1
    task.stop()


@on_a_loop
async def test_what_is_no_exception_becomes_one_and_ends_only_its_call() -> None:
    task = EnvTask()
    for odd in (SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()):
        with pytest.raises(RuntimeError):
            await task.run(raising(odd), 5)
    assert await task.run(value(1), 5) == 1
    task.stop()


@on_a_loop
async def test_one_that_cancels_its_own_task_ends_only_its_call() -> None:
    async def suicide(then: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        me = asyncio.current_task()
        assert me is not None
        me.cancel()
        return await then()

    async def nothing() -> int:
        return 2

    task = EnvTask()
    with pytest.raises(RuntimeError, match="cancelled itself"):
        await task.run(suicide(lambda: asyncio.sleep(1)), 5)
    assert await task.run(value(1), 5) == 1
    assert await task.run(suicide(nothing), 5) == 2
    assert await task.run(value(1), 5) == 1
    task.stop()


@on_a_loop
async def test_past_its_deadline_it_is_cancelled_and_the_next_is_answered() -> None:
    left = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            left.append("cleaned up")

    async def deaf() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "too late"
        return "never"

    async def where() -> Any:
        return asyncio.current_task()

    task = EnvTask()
    home = await task.run(where(), 5)
    for one in (slow, deaf, slow):
        with pytest.raises(OverranError):
            await task.run(one(), 0.02)
        assert await task.run(value(1), 5) == 1
        assert await task.run(where(), 5) is home
    assert left == ["cleaned up"] * 2
    task.stop()


async def timed(seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            await asyncio.sleep(60)
    except TimeoutError:
        return "its own deadline"
    return "never"


async def scoped(seconds: float) -> str:
    with anyio.move_on_after(seconds) as scope:
        await anyio.sleep(60)
    return "its own deadline" if scope.cancelled_caught else "never"


@on_a_loop
async def test_deadlines_of_a_call_itself_are_for_it_however_early_they_pass() -> None:
    for own in (timed, scoped):
        for seconds in (0, 0.001, 0.02):
            task = EnvTask()
            for _ in range(3):
                assert await task.run(own(seconds), 10) == "its own deadline"
                assert await task.run(value(1), 10) == 1
            task.stop()


@on_a_loop
async def test_a_call_that_waits_for_nothing_needs_no_turn_of_the_loop() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def quick(number: int) -> tuple[int, Any]:
        return number, asyncio.current_task()

    task = EnvTask()
    me, home = asyncio.current_task(), (await task.run(quick(0), 5))[1]
    counter = asyncio.ensure_future(count())
    await asyncio.sleep(0)
    before = turns
    assert [await task.run(quick(i), 5) for i in range(100)] == [(i, home) for i in range(100)]
    assert turns == before and home is not me and asyncio.current_task() is me
    counter.cancel()
    task.stop()


@on_a_loop
async def test_a_task_of_its_own_within_anothers_call() -> None:
    """An environment that plays on another."""
    inner, outer = EnvTask(), EnvTask()

    async def where() -> Any:
        return asyncio.current_task()

    async def both() -> tuple[Any, Any, Any]:
        return asyncio.current_task(), await inner.run(where(), 5), asyncio.current_task()

    before, within, after = await outer.run(both(), 5)
    assert before is after and before is not within
    assert within is await inner.run(where(), 5)
    inner.stop()
    outer.stop()


@on_a_loop
async def test_a_caller_that_is_cancelled_takes_its_call_along() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = EnvTask()
    caller = asyncio.ensure_future(task.run(slow(), 60))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
    assert await task.run(value(1), 5) == 1
    task.stop()


@on_a_loop
async def test_one_that_cannot_be_stopped_is_stuck_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnwise.envs.task.CANCEL_SECONDS", 0.05)
    free = asyncio.Event()

    async def stubborn() -> None:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue

    task = EnvTask()
    with pytest.raises(StuckError) as stuck:
        await task.run(stubborn(), 0.02)
    never = value(1)
    with pytest.raises(StuckError):
        try:
            await asyncio.wait_for(task.run(never, 60), 5)
        finally:
            asyncio.get_running_loop().call_later(0.1, free.set)  # Whatever is said: the loop waits for it.
    never.close()
    assert not stuck.value.task.done()
    free.set()
    await asyncio.wait((stuck.value.task,), timeout=5)
    assert stuck.value.task.done()
    assert await task.run(value(1), 5) == 1  # In a new one, as when its environment is closed.
    task.stop()


def test_a_loop_that_ends_in_the_middle_of_a_call_ends() -> None:
    async def main() -> None:
        task = EnvTask()
        left = asyncio.ensure_future(task.run(asyncio.sleep(60), 60))
        idle = EnvTask()
        assert await idle.run(value(1), 5) == 1 and not left.done()

    asyncio.run(asyncio.wait_for(main(), 20))


SEEN: contextvars.ContextVar[str] = contextvars.ContextVar("SEEN", default="")


class Scoped(Env):
    """Holds a task group from reset to close, as an MCP session does."""

    async def reset(self, task: dict[str, Any]) -> str:
        self.group = anyio.create_task_group()
        await self.group.__aenter__()
        SEEN.set("set in reset")
        return "go"

    async def step(self, reply: str) -> Step:
        quick = reply == "quick"
        with anyio.fail_after(10 if quick else 0.01):
            await asyncio.sleep(0.05 if quick else 60)
        return Step(SEEN.get())

    async def close(self) -> None:
        self.group.cancel_scope.cancel()
        await self.group.__aexit__(None, None, None)
        CLOSED.append(SEEN.get())


CLOSED: list[str] = []


@on_a_loop
async def test_scopes_are_left_in_the_task_that_entered_them(caplog: pytest.LogCaptureFixture) -> None:
    CLOSED.clear()
    session = await make(Scoped).open(Limits(call_seconds=20))
    await session.reset({}, 0)
    assert (await session.step(Message.assistant("quick"))).observation == "set in reset"
    assert (await session.step(Message.assistant("slow"))).info == {"error": "raised"}
    assert (await session.step(Message.assistant("quick"))).observation == "set in reset"
    await session.close()
    assert CLOSED == ["set in reset"]
    assert not [one for one in caplog.records if one.levelname != "DEBUG"]


@asynccontextmanager
async def stubborn_env(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Any, asyncio.Event]]:
    monkeypatch.setattr("turnwise.envs.task.CANCEL_SECONDS", 0.05)
    free = asyncio.Event()

    class Stubborn(Env):
        async def reset(self, task: dict[str, Any]) -> str:
            return "go"

        async def step(self, reply: str) -> Step:
            while not free.is_set():
                try:
                    await free.wait()
                except asyncio.CancelledError:
                    continue
            return Step("")

        async def close(self) -> None:
            CLOSED.append("late")

    session = await make(Stubborn).open(Limits(call_seconds=0.5))
    await session.reset({}, 0)
    yield session, free


@on_a_loop
async def test_a_stuck_environment_is_closed_when_its_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stubborn_env(monkeypatch) as (session, free):
        CLOSED.clear()
        with pytest.raises(EnvHungError):
            await session.step(Message.assistant("x"))
        assert not session.alive
        await session.close()
        assert not CLOSED
        free.set()
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if CLOSED:
                break
        assert CLOSED == ["late"]


def test_tamed_says_what_it_was() -> None:
    assert "sys.exit(3)" in str(contain.tamed(SystemExit(3)))
