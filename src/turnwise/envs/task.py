"""One task for one environment's coroutines, for its whole life: what a thread is to blocking methods.

Cancel scopes and task groups (those of anyio, on which MCP's sessions stand) must be left in the task that
entered them: what `reset` opens, `close` can close. And context variables that one call sets the next sees.

A call's first step is made at once, in the task's name and context, as eager tasks of Python 3.12 do: most
calls that are declared ``async`` wait for nothing and have no other, and need no turn of the event loop.
"""

from __future__ import annotations

import asyncio
from asyncio.tasks import _enter_task, _leave_task  # https://docs.python.org/3/library/asyncio-extending.html
from collections.abc import Awaitable, Coroutine, Generator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import CoroutineType, coroutine
from typing import Any

from turnwise.envs import contain
from turnwise.envs.alarm import Alarm
from turnwise.envs.contain import CANCEL_SECONDS, OverranError, StuckError, settle

Outcome = tuple[Any, BaseException | None]
_Call = tuple[Awaitable[Any], "asyncio.Future[Outcome | None]"]


class EnvTask:
    """Awaits one call at a time, each within its deadline; made on the loop that it is of."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm()
        self._begin()

    def _begin(self) -> None:
        self._call: _Call | None = None
        """What it is at, or is to begin."""
        self._asked: asyncio.Future[None] | None = None
        """While it waits to be asked."""
        self._stopping: asyncio.Future[None] | None = None
        """While a call is being cancelled."""
        self._last = False
        """Whether the call that it is at is its last."""
        self._context = copy_context()
        self._task = self._loop.create_task(self._work(), context=self._context)

    async def run(self, awaitable: Awaitable[Any], seconds: float) -> Any:
        """What ``awaitable`` comes to; it is cancelled past its deadline, and when the caller is.

        Raises:
            OverranError: It was stopped at the deadline.
            StuckError: It could not be; its ``task`` ends when it does.
            Exception: What it raised, tamed where it was none.
        """
        if self._task.done() or (self._call is None and self._task.cancelling()):
            self._begin()  # A call that cancelled its own task ended it.
        if self._call is not None:  # Its caller was cancelled, and it stays.
            self._last = True
            raise StuckError(self._task)
        if type(awaitable) is CoroutineType:
            begun = self._first_step(awaitable)
            if isinstance(begun, tuple):
                return _result(begun)
            awaitable = begun
        ended: asyncio.Future[Outcome | None] = self._loop.create_future()
        self._call = awaitable, ended
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)
        self._alarm.set(seconds, partial(settle, ended))
        try:
            outcome = await ended
        except asyncio.CancelledError:
            await self._let_go()
            raise
        finally:
            self._alarm.clear()
        if outcome is None:
            if await self._let_go():
                raise OverranError
            self._last = True
            raise StuckError(self._task)
        return _result(outcome)

    def stop(self) -> None:
        """End it, when nothing is under way."""
        self._alarm.stop()
        self._task.cancel()

    def _first_step(self, call: Coroutine[Any, Any, Any]) -> Outcome | Awaitable[Any]:
        """How the call ended, or what is left of it."""
        caller = asyncio.current_task()
        assert caller is not None
        _leave_task(self._loop, caller)
        _enter_task(self._loop, self._task)
        try:
            awaited = self._context.run(call.send, None)
        except StopIteration as end:
            return end.value, None
        except Exception as error:  # noqa: BLE001 - as in `_outcome`
            return None, error
        except BaseException as odd:  # noqa: BLE001 - as in `_outcome`
            return None, contain.tamed(odd)
        finally:
            _leave_task(self._loop, self._task)
            _enter_task(self._loop, caller)
        if self._task.cancelling():
            with suppress(Exception):
                contain.call(call.close)
            return None, contain.tamed(asyncio.CancelledError())
        return _rest(call, awaited)

    async def _let_go(self) -> bool:
        """Cancel the call; whether it is over."""
        if self._call is None:
            return True
        self._stopping = self._loop.create_future()
        self._task.cancel()
        await asyncio.wait(
            (self._stopping, self._task), timeout=CANCEL_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        self._stopping = None
        return self._call is None

    async def _work(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        while not self._last:
            if self._call is None:
                self._asked = self._loop.create_future()
                try:
                    await self._asked
                except asyncio.CancelledError:
                    if self._call is None:
                        raise
                    # A deadline of the call's own, passed before it was taken over here: it is for the call.
                    me.uncancel()
                    me.cancel()
                self._asked = None
                continue
            settle(self._call[1], await _outcome(self._call[0]))
            self._call = None
            if me.cancelling() > (self._stopping is not None):
                return  # By others than `_let_go`: the call itself, or a loop that ends.
            if self._stopping is not None:
                while me.cancelling():
                    me.uncancel()
                settle(self._stopping)


@coroutine
def _rest(call: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """A coroutine that waits for ``awaited`` already, which another could not await any more."""
    while True:
        try:
            sent = yield awaited
        except GeneratorExit:
            call.close()
            raise
        except BaseException as thrown:  # noqa: BLE001 - its to handle
            go_on = partial(call.throw, thrown)
        else:
            go_on = partial(call.send, sent)
        try:
            awaited = go_on()
        except StopIteration as end:
            return end.value


def _result(outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


async def _outcome(awaitable: Awaitable[Any]) -> Outcome:
    try:
        return await awaitable, None
    except asyncio.CancelledError as odd:
        return None, contain.tamed(odd)
    except Exception as error:  # noqa: BLE001 - handed to whoever asked, which raises it again
        return None, error
    except BaseException as odd:  # noqa: BLE001 - inside a task it would stop the whole event loop
        return None, contain.tamed(odd)
