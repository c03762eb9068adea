"""`run`: a coroutine from code that is not async, on one loop that runs on a thread of its own.

So it may be called where a loop runs already, as in a notebook, and what it opened stays open between calls.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By process: a fork has the loop of its parent, and no thread that runs it."""
_lock = threading.Lock()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What ``coroutine`` returns; it is cancelled when this is interrupted.

    Raises:
        RuntimeError: It is called on the loop's own thread, which would wait for itself.
    """
    loop = _loop()
    if asyncio._get_running_loop() is loop:
        coroutine.close()
        raise RuntimeError(
            "a call without `await` from code that runs on its loop; await the async form here"
        )
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="turnwise-openenv", daemon=True).start()
        return loop
