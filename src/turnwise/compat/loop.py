"""`Loop`: an event loop on a thread of its own, for which the thread that waits does what belongs there.

    with Loop() as loop:
        loop.run(play())                 # this thread waits, and calls what `play` hands back:

    async def play():
        await loop.here(callback, 1)     # runs on the thread that waits in `run`

A notebook's thread has a running loop already; callbacks draw progress bars and call ``evaluate()``, and
expect to be where ``train()`` was called; Ctrl-C arrives there too. So all of it stays on that thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Loop:
    """Runs coroutines for one thread, which makes it, waits in `run` and closes it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._broken = False
        self._asked: set[Future[Any]] = set()
        """Calls that somebody waits for. Ctrl-C may strike when one is off the queue and not yet made."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="turnwise-trainer")
        self._thread.start()
        self._loop, self._closing = self._ready.result()

    def __enter__(self) -> Self:
        """As it is."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the loop; whatever still runs on it is cancelled and awaited."""
        self._broken = True
        self._drop_calls()
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. It may be called by what the coroutine has called here.

        Raises:
            KeyboardInterrupt: Ctrl-C; the coroutine was cancelled and has ended.
            Exception: What it raised.
        """
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def settle(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                result.set_exception(CancelledError())
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())
            self._calls.put(None)

        def start() -> None:
            if not tasks:
                tasks.append(self._loop.create_task(work))
                tasks[0].add_done_callback(settle)

        def end() -> None:
            start()  # Ctrl-C may strike before it was handed over.
            tasks[0].cancel()

        try:
            self._loop.call_soon_threadsafe(start)
            while not result.done():
                if (call := self._calls.get()) is not None:
                    call()
        except BaseException:
            self._broken = True
            # Before its calls are dropped: of these too it may hear by a cancellation, and a second one would
            # strike what it does at its end.
            self._loop.call_soon_threadsafe(end)
            self._drop_calls()
            while not result.done():
                if (call := self._calls.get()) is not None:
                    call()
            raise
        return result.result()

    async def here(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on the thread that waits in `run`; for coroutines."""
        return await asyncio.wrap_future(self._post(function, arguments))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same, for other threads.

        Raises:
            CancelledError: Nobody waits any more.
        """
        return self._post(function, arguments).result()

    def _post(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> Future[T]:
        future: Future[T] = Future()

        def call() -> None:
            if self._broken or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            # Whoever asked may have been told already that nobody waits: Ctrl-C struck in what this call ran.
            try:
                value = function(*arguments)
            except StopIteration as odd:  # Which no future takes: whoever waits would wait for ever.
                if not future.done():
                    problem = RuntimeError("it raised StopIteration")
                    problem.__cause__ = odd
                    future.set_exception(problem)
            except Exception as error:  # noqa: BLE001 - raised again where it was asked for
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(value)

        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        if self._broken:
            future.cancel()
        self._calls.put(call)
        return future

    def _drop_calls(self) -> None:
        """Cancel what was asked for and will not be done any more."""
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call()
        for future in list(self._asked):
            if not future.cancel():  # It was begun, and Ctrl-C ended it.
                future.set_exception(CancelledError())

    async def _live(self) -> None:
        closing = asyncio.Event()
        self._ready.set_result((asyncio.get_running_loop(), closing))
        await closing.wait()
