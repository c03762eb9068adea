"""When a server that was just started answers, and why it does not."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Callable

import httpx

from turnwise.errors import EnvLostError, said

POLL_SECONDS = 0.2
PORTS = range(20000, 32768)
"""Below what Linux, macOS and Windows give to connections and to who binds to port 0."""


class StartError(EnvLostError, RuntimeError):
    """A server could not be started; nothing of it is left running."""


class StartTimeoutError(StartError, TimeoutError):
    """A server was started and did not get ready in time."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and that nobody gets by chance before a server listens on it.

    Of those that systems give to whoever asks for any, the next one might be anybody's before that.
    """
    # Not by the seed of a run, which others may have too.
    for port in random.SystemRandom().sample(PORTS, 100):
        if not taken(port):
            return port
    raise StartError(f"none of 100 ports from {PORTS[0]} to {PORTS[-1]} is free; say which with port=")


def taken(port: int) -> bool:
    """Whether something listens on a TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed lately is no listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def wait_until_ready(
    base_url: str, *, seconds: float, ended: Callable[[], str | None], log: Callable[[], str]
) -> None:
    """Poll ``GET /health`` until it answers 200. Blocks.

    Args:
        base_url: Where the server will be.
        seconds: How long it may take.
        ended: Says how the server ended, None while it runs: a server that died is not waited for.
        log: The last lines that it wrote, for the error.

    Raises:
        StartError: It ended.
        StartTimeoutError: It did not answer in time.
    """
    deadline = time.monotonic() + seconds
    last = "nobody listens"
    # No proxy of the environment: the server is on this machine, or named by its own address.
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while True:
            try:
                response = client.get(f"{base_url}/health")
            except httpx.HTTPError as error:
                last = said(error)
            else:
                if response.status_code == 200 and ended() is None:  # not another server, on its port
                    return
                last = f"it answers {response.status_code}"
            if (how := ended()) is not None:
                raise StartError(f"the server for {base_url} {how}{written(log())}")
            if time.monotonic() >= deadline:
                raise StartTimeoutError(
                    f"the server at {base_url} was not ready after {seconds:g} s ({last}); give it longer "
                    f"(wait_timeout=), or see why it is slow{written(log())}"
                )
            time.sleep(POLL_SECONDS)


def written(log: str) -> str:
    """The end of an error's message: what the server wrote."""
    return f"\nit wrote:\n{log.rstrip()}" if log.strip() else "; it wrote nothing"
