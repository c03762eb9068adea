"""One thread for one environment, for its whole life.

Libraries that hold a connection, a browser or a GL context often insist on the thread that made them, and a
pool would let one slow tool starve the others. A call is one hop there and one back: tens of microseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

from turnwise.envs.alarm import Alarm
from turnwise.envs.contain import settle
from turnwise.errors import EnvHungError

Outcome = tuple[Any, BaseException | None]
_Call = tuple["asyncio.Future[Outcome] | None", float]
"""Who waits for a call, and until when it may take, by `time.monotonic`."""
_IDLE: _Call = (None, math.inf)
_names = itertools.count()
_abandoned: list[EnvThread] = []


def abandoned_threads() -> int:
    """How many threads of hung environments are still busy in a call that nobody waits for."""
    _abandoned[:] = [thread for thread in _abandoned if thread.busy]
    return len(_abandoned)


class EnvThread:
    """Runs functions one at a time, in order. Daemonic: a hung call cannot keep the interpreter alive."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Outcome] | None, float] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._work, name=f"env-{name}-{next(_names)}", daemon=True)
        self._call = _IDLE
        self._waiting: dict[asyncio.Future[Outcome], float] = {}
        """Those that are not answered yet, and how long each may take."""
        self._alarm = Alarm()
        self._stopped = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether it is in a call, which whoever asked for it may have given up."""
        return self._call is not _IDLE

    async def run(self, function: Callable[[], Any], seconds: float) -> Any:
        """What ``function`` returns or raises, on this thread.

        Its clock starts when it does: waiting for a call that keeps its own deadline is no fault of this one.

        Raises:
            EnvHungError: It took longer than ``seconds``, or one before it longer than it may; the thread is
                still in that. Or it was stopped.
        """
        if self._stopped:
            raise EnvHungError(
                "its thread was stopped: it hangs in an earlier call, or what lived there is closed"
            )
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if not self._waiting or seconds < min(self._waiting.values()):
            self._alarm.set(seconds, self._look)
        self._waiting[future] = seconds
        self._jobs.put((function, future, seconds))
        try:
            value, error = await future
        finally:
            del self._waiting[future]
            if not self._waiting:
                self._alarm.clear()
        if error is not None:
            raise error
        return value

    def _look(self) -> None:
        """A call may have passed its deadline; then nobody who waits is answered any more."""
        current, end = self._call
        left = end - time.monotonic()
        if left > 0:  # Should the next only begin now, it is not over before the next look.
            self._alarm.set(min(left, *self._waiting.values()), self._look)
            return
        for future, seconds in self._waiting.items():
            if not future.done():
                future.set_exception(_hung(seconds if current is future else None))

    def stop(self, last: Callable[[], Any] | None = None) -> None:
        """End the thread when it has finished what it is at, after ``last``."""
        self._stopped = True
        if last is not None:
            self._jobs.put((last, None, math.inf))
        self._jobs.put(None)

    def abandon(self, last: Callable[[], Any], *, shared: bool = False) -> None:
        """Give up on a call that hangs: count it, run nothing more but ``last``, should it ever return.

        Args:
            last: Closes what lived here.
            shared: Others lived here too, and each has a ``last``: the thread waits for them.
        """
        abandoned_threads()  # Those that have come to an end are held on to no longer.
        if self not in _abandoned:
            _abandoned.append(self)
        self._stopped = True
        if shared:
            self._jobs.put((last, None, math.inf))
        else:
            self.stop(last)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future, seconds = job
            self._call = (future, time.monotonic() + seconds)
            outcome = _run(function)
            self._call = _IDLE
            if future is not None:
                try:  # noqa: SIM105 - `suppress` costs more, and every call of a sync environment comes by here
                    future.get_loop().call_soon_threadsafe(settle, future, outcome)
                except RuntimeError:
                    pass  # The loop is closed and nobody is left to be told; a last job may still wait.
            del function, future, outcome, job  # Keep nothing of the environment alive while waiting.


def _run(function: Callable[[], Any]) -> Outcome:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001 - handed to the coroutine that waits, which raises it again
        return None, error


def _hung(seconds: float | None) -> EnvHungError:
    if seconds is None:
        return EnvHungError("its thread hangs in an earlier call")
    return EnvHungError(f"it did not return within {seconds:g} s and cannot be stopped")
