"""One thread for one environment, for its whole life.

Libraries that hold a connection, a browser or a GL context often insist on the thread that made them, and a
pool would let one slow tool starve the others. A call is one hop there and one back: tens of microseconds.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

from turnwise.errors import EnvHungError

Outcome = tuple[Any, BaseException | None]
_names = itertools.count()
_abandoned: list[EnvThread] = []


def abandoned_threads() -> int:
    """How many threads of hung environments are still busy in a call that nobody waits for."""
    _abandoned[:] = [thread for thread in _abandoned if thread.alive]
    return len(_abandoned)


class EnvThread:
    """Runs functions one at a time, in order. Daemonic: a hung call cannot keep the interpreter alive."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Outcome] | None] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._work, name=f"env-{name}-{next(_names)}", daemon=True)
        self.busy = False
        """It is in a call, which whoever asked for it may have given up."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    async def run(self, function: Callable[[], Any], seconds: float) -> Any:
        """What ``function`` returns or raises, on this thread.

        Raises:
            EnvHungError: It took longer than ``seconds``; the thread is still in it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        timer = loop.call_later(seconds, _expire, future, seconds)
        self._jobs.put((function, future))
        try:
            value, error = await future
        finally:
            timer.cancel()
        if error is not None:
            raise error
        return value

    def stop(self, last: Callable[[], Any] | None = None) -> None:
        """End the thread when it has finished what it is at, after ``last``."""
        if last is not None:
            self._jobs.put((last, None))
        self._jobs.put(None)

    def abandon(self, last: Callable[[], Any]) -> None:
        """Give up on a call that hangs: count it, and run ``last`` should it ever return."""
        abandoned_threads()  # Those that have come to an end are held on to no longer.
        _abandoned.append(self)
        self.stop(last)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            self.busy = True
            outcome = _run(function)
            self.busy = False
            if future is not None:
                # RuntimeError: the loop is closed and nobody is left to be told; a last job may still wait.
                with suppress(RuntimeError):
                    future.get_loop().call_soon_threadsafe(_deliver, future, outcome)
            del function, future, outcome, job  # Keep nothing of the environment alive while waiting.


def _run(function: Callable[[], Any]) -> Outcome:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001 - handed to the coroutine that waits, which raises it again
        return None, error


def _deliver(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _expire(future: asyncio.Future[Outcome], seconds: float) -> None:
    if not future.done():
        future.set_exception(EnvHungError(f"it did not return within {seconds:g} s and cannot be stopped"))
