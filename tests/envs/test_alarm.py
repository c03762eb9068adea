"""`Alarm`: deadlines that move, with one timer."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from turnwise.envs.alarm import Alarm


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


class Rung:
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(asyncio.get_running_loop().time())


@on_a_loop
async def test_a_deadline_that_passes_calls_once() -> None:
    alarm, rung, start = Alarm(), Rung(), asyncio.get_running_loop().time()
    alarm.set(0.03, rung)
    await asyncio.sleep(0.1)
    assert len(rung.at) == 1
    assert rung.at[0] - start >= 0.03


@on_a_loop
async def test_one_that_was_cleared_or_stopped_calls_nobody() -> None:
    for end in (Alarm.clear, Alarm.stop):
        alarm, rung = Alarm(), Rung()
        alarm.set(0.02, rung)
        end(alarm)
        await asyncio.sleep(0.05)
        assert not rung.at


@on_a_loop
async def test_a_later_deadline_moves_the_call_and_its_caller() -> None:
    alarm, first, second = Alarm(), Rung(), Rung()
    start = asyncio.get_running_loop().time()
    alarm.set(0.02, first)
    alarm.set(0.08, second)
    while not second.at and asyncio.get_running_loop().time() - start < 10:
        await asyncio.sleep(0.01)
    assert not first.at
    assert [at - start >= 0.08 for at in second.at] == [True]


@on_a_loop
async def test_an_earlier_deadline_is_not_missed() -> None:
    alarm, rung, start = Alarm(), Rung(), asyncio.get_running_loop().time()
    alarm.set(60.0, rung)
    alarm.clear()
    alarm.set(0.02, rung)
    await asyncio.sleep(0.1)
    assert [at - start < 30.0 for at in rung.at] == [True]


@on_a_loop
async def test_calls_one_after_another_set_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at
    monkeypatch.setattr(loop, "call_at", lambda *args: timers.append(args) or call_at(*args))
    alarm, rung = Alarm(), Rung()
    for _ in range(1000):
        alarm.set(60.0, rung)
        alarm.clear()
    assert len(timers) == 1
    alarm.stop()


def test_it_serves_one_loop_after_another() -> None:
    alarm, rung = Alarm(), Rung()

    async def once() -> None:
        alarm.set(0.01, rung)
        await asyncio.sleep(0.05)
        alarm.set(60.0, rung)
        alarm.clear()  # Its timer stays with a loop that is closed now.

    asyncio.run(once())
    asyncio.run(once())
    assert len(rung.at) == 2
