"""`reserved`: a port for a server that is started later, elsewhere, or anew."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given meanwhile, for a server that names it.

    The kernel gives away no port that a socket is bound to. It lets whoever names it bind to it too, where
    both allow that and this one does not listen.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
