"""`Alarm`: one timer for the deadlines of calls that come one after another and hardly ever pass them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls back when the deadline that was set last has passed, unless it was cleared.

    A timer for each call would cost more than many calls do. This one is left where it is while it comes
    before the deadline, and looks when it goes off whether there still is one.
    """

    __slots__ = ("_call", "_due", "_loop", "_timer", "_when")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._when = 0.0
        """When the timer goes off, in the loop's time."""
        self._due: float | None = None
        self._call: Callable[[], object]

    @property
    def is_set(self) -> bool:
        """Whether there is a deadline."""
        return self._due is not None

    def set(self, seconds: float, call: Callable[[], object]) -> None:
        """Call back in ``seconds``, on the running loop, in place of what was set before."""
        loop = asyncio.get_running_loop()
        self._due, self._call = loop.time() + seconds, call
        if self._timer is None or self._loop is not loop or self._when > self._due:
            self._disarm()
            self._arm(loop, self._due)

    def clear(self) -> None:
        """There is no deadline."""
        self._due = None
        self._call = _nothing  # What it would have called lives no longer than the call.

    def stop(self) -> None:
        """Take the timer away too; on the loop."""
        self.clear()
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._loop, self._when = loop, due
        self._timer = loop.call_at(due, self._went_off, loop)

    def _went_off(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._due is None:
            return
        if loop.time() < self._due:
            self._arm(loop, self._due)
        else:
            call, self._due = self._call, None
            call()


def _nothing() -> None:
    """What an alarm without a deadline calls."""
