"""An event loop for a thread that stays where it is: calls come back to it, and so does Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from turnwise.compat.loop import Loop


def test_calls_are_made_where_run_waits() -> None:
    where: list[int] = []

    async def work(loop: Loop) -> str:
        await loop.here(lambda: where.append(threading.get_ident()))
        assert threading.get_ident() != where[0]
        await asyncio.to_thread(loop.call, lambda: where.append(threading.get_ident()))
        return await loop.here(str.upper, "done")

    with Loop() as loop:
        assert loop.run(work(loop)) == "DONE"
    assert where == [threading.get_ident()] * 2


def test_a_call_may_run_something_itself() -> None:
    async def inner(loop: Loop) -> int:
        return await loop.here(lambda: 2)

    async def outer(loop: Loop) -> int:
        return 1 + await loop.here(lambda: loop.run(inner(loop)))

    with Loop() as loop:
        assert loop.run(outer(loop)) == 3


def test_an_error_in_a_call_is_raised_where_it_was_asked_for() -> None:
    async def work(loop: Loop) -> str:
        with pytest.raises(ZeroDivisionError):
            await loop.here(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await loop.here(next, iter(()))
        raise LookupError("and out again")

    with Loop() as loop, pytest.raises(LookupError, match="and out again"):
        loop.run(work(loop))


@pytest.mark.parametrize("where", ["in a call", "while it waits"])
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_ctrl_c_cancels_what_runs_and_waits_for_its_end(
    where: str, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = Loop._drop_calls
    monkeypatch.setattr(Loop, "_drop_calls", lambda self: (drop(self), time.sleep(pause)))
    ended = threading.Event()
    stuck: list[BaseException] = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0.01)

    def ask_for_ever(loop: Loop) -> None:
        try:
            while True:
                loop.call(lambda: None)
        except BaseException as error:
            stuck.append(error)
            raise

    async def work(loop: Loop) -> None:
        asker = asyncio.ensure_future(asyncio.to_thread(ask_for_ever, loop))
        try:
            await (loop.here(interrupt) if where == "in a call" else asyncio.to_thread(interrupt))
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            asker.cancel()
            ended.set()

    with Loop() as loop:
        with pytest.raises(KeyboardInterrupt):
            loop.run(work(loop))
        assert ended.is_set()
    assert stuck, "a thread that asks for calls is not left waiting"


@pytest.mark.parametrize("handed", [True, False])
def test_ctrl_c_as_a_coroutine_is_handed_over_ends_it_too(handed: bool) -> None:
    began, ended = threading.Event(), threading.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.set()

    with Loop() as loop:
        hand_over = loop._loop.call_soon_threadsafe

        def struck(start: Callable[[], None]) -> None:
            loop._loop.call_soon_threadsafe = hand_over  # type: ignore[method-assign]
            if handed:
                hand_over(start)
                assert began.wait(20)
            raise KeyboardInterrupt

        loop._loop.call_soon_threadsafe = struck  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            loop.run(work())
        assert began.is_set() == ended.is_set() == handed
