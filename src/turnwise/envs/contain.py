"""What foreign code may raise and overrun, contained: it ends its own call, and no task, loop or run.

An author's function may call ``sys.exit()``, raise `KeyboardInterrupt` or cancel itself. None of these is an
`Exception`, so each would pass every boundary: a lone `asyncio.CancelledError` looks like the cancellation of
the episode, and would take its siblings along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from turnwise.errors import said

CANCEL_SECONDS = 1.0
"""How long a cancelled coroutine may take to clean up before it counts as stuck."""


class OverranError(Exception):
    """An awaitable passed its deadline and was stopped."""


class StuckError(Exception):
    """An awaitable passed its deadline and ignores its cancellation; ``task`` still runs."""

    def __init__(self, task: asyncio.Future[Any]) -> None:
        super().__init__()
        self.task = task


def call(function: Callable[[], Any]) -> Any:
    """What ``function`` returns, or an `Exception`, whatever it raised."""
    try:
        return function()
    except Exception:  # Ordinary errors are for the caller's boundary.
        raise
    except BaseException as odd:
        raise tamed(odd) from odd


async def bounded(awaitable: Awaitable[Any], seconds: float) -> Any:
    """What ``awaitable`` comes to within its deadline; it is cancelled past it, and when the caller is.

    Raises:
        OverranError: It was stopped at the deadline.
        StuckError: It could not be.
        Exception: What it raised, tamed where it was none.
    """
    # `asyncio.wait` would do, at three times the cost.
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    task = loop.create_task(_awaited(awaitable, ended))
    timer = loop.call_later(seconds, settle, ended)
    try:
        await ended
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait((task,), timeout=CANCEL_SECONDS)
        raise
    finally:
        timer.cancel()
    if task.done():
        return _result(task)
    task.cancel()
    done, _ = await asyncio.wait((task,), timeout=CANCEL_SECONDS)
    if not done:
        raise StuckError(task)
    if not task.cancelled():
        task.exception()  # Marks it as seen: whatever it raised on its way out came too late.
    raise OverranError


async def _awaited(awaitable: Awaitable[Any], ended: asyncio.Future[None]) -> Any:
    # Inside a task these two would stop the whole event loop.
    try:
        return await awaitable
    except (KeyboardInterrupt, SystemExit) as odd:
        raise tamed(odd) from odd
    finally:
        settle(ended)  # Whoever waits runs after this task's last step.


def settle(future: asyncio.Future[Any], result: Any = None) -> None:
    """Give a future its result, unless whoever waited for it has gone or has one."""
    if not future.done():
        future.set_result(result)


def _result(task: asyncio.Future[Any]) -> Any:
    if task.cancelled():
        raise RuntimeError("it cancelled itself")
    odd = task.exception()
    if odd is not None and not isinstance(odd, Exception):
        raise tamed(odd) from odd
    return task.result()


def tamed(odd: BaseException) -> RuntimeError:
    """What is no `Exception` as one."""
    if isinstance(odd, SystemExit):
        return RuntimeError(f"it called sys.exit({odd.code!r})")
    if isinstance(odd, asyncio.CancelledError):
        return RuntimeError("it cancelled itself")
    return RuntimeError(f"it raised {said(odd)}")
