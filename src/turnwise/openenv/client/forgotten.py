"""`when_forgotten`: a connection whose owner is collected without `close` is closed then, as files are.

A notebook's cell that is run again would else keep the place of the environment that it made before, on a
server that may have few.
"""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import Callable

from turnwise.openenv.client.socket import EnvSocket

_closing: set[asyncio.Task[None]] = set()


def when_forgotten(
    owner: object, socket: EnvSocket, close: Callable[[EnvSocket], object] | None = None
) -> Callable[[], object]:
    """Close ``socket`` on its event loop, which is the running one, once nobody holds ``owner`` any more.

    Args:
        owner: Who is to close it; nothing that the socket itself holds.
        socket: The connection.
        close: Called with it on that loop; None is its own `EnvSocket.close`.

    Returns:
        To be called when it is closed, or somebody else's.
    """
    # The collector may run on any thread.
    finalizer = weakref.finalize(owner, _forgotten, asyncio.get_running_loop(), close or _close, socket)
    finalizer.atexit = False  # The system closes what is open then.
    return finalizer.detach


def _forgotten(
    loop: asyncio.AbstractEventLoop, close: Callable[[EnvSocket], object], socket: EnvSocket
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(close, socket)
    warnings.warn(
        f"unclosed connection to {socket.url}: it is closed now, and its session ends; `with` or `close` "
        "does so in time",
        ResourceWarning,
        stacklevel=2,
    )


def _close(socket: EnvSocket) -> None:
    task = asyncio.get_running_loop().create_task(socket.close())
    _closing.add(task)
    task.add_done_callback(_closing.discard)
