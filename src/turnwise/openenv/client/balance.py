"""`Servers`: the servers of one environment. Sessions go to the least busy; what fails is set aside a while.

A server that does not answer is tried again with growing pauses, and given up after ``patience`` seconds with
nobody else there. A full one is waited for: the next place that one of our own sessions leaves is taken at
once, and a session that rests between two episodes gives its place away.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

from turnwise.errors import EnvError, EnvHungError, EnvLostError
from turnwise.openenv.client.socket import EnvSocket, RefusedError, Reply, message_of

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""One try to connect."""
SLOW_SECONDS = 0.25
"""After which a connection is taken to wait for its place."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between tries; each pause is twice the one before."""


class Resting(Protocol):
    """A session between two episodes."""

    def give_up(self) -> EnvSocket | None:
        """Leave the connection to somebody else; the session opens another with its next episode."""
        ...


class _FullError(Exception):
    """The server has no place."""


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.busy = 0
        """Connections of ours, those being made among them."""
        self.failures = self.refusals = 0
        """In a row: no answer; no place."""
        self.aside_until = 0.0

    def failed(self) -> None:
        self.aside_until = monotonic() + _pause(self.failures)
        self.failures += 1

    def full(self) -> None:
        self.aside_until = monotonic() + _pause(self.refusals)
        self.failures, self.refusals = 0, self.refusals + 1

    def well(self) -> None:
        self.failures = self.refusals = 0
        self.aside_until = 0.0


class Servers:
    """Opens sessions on several servers of the same environment.

    Args:
        urls: As `turnwise.openenv.client.socket.base_url` writes them.
        headers: Of every request.
        patience: Seconds to go on while no server answers.
        what: For errors.
    """

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str], patience: float, what: str) -> None:
        self._servers = [_Server(url) for url in urls]
        self._by_url = {server.url: server for server in self._servers}
        self._headers, self._patience, self._what = dict(headers), patience, what
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resting: dict[Resting, None] = {}
        self._closing: set[asyncio.Future[Any]] = set()

    @property
    def busy(self) -> dict[str, int]:
        """Our connections to each server."""
        return {server.url: server.busy for server in self._servers}

    async def open(self, seconds: float) -> EnvSocket:
        """A connection that has a session behind it, to the least busy server that is well.

        Args:
            seconds: How long a server may take to make an environment.

        Raises:
            RefusedError: No server takes this client.
            EnvLostError: None answered for ``patience`` seconds, or each failed to make an environment.
            EnvHungError: A server did not get an environment made in time.
        """
        began = monotonic()
        full = False
        broken: dict[str, EnvError] = {}
        """Servers that will not do better by waiting, with what they said."""
        while True:
            if full and (socket := self._taken_over()) is not None:
                return socket
            server = self._next(broken)
            if server is None:
                raise next(reversed(broken.values()))
            pause = server.aside_until - monotonic()
            if pause > 0:
                await self._woken(timeout=pause)
                continue
            try:
                return await self._raced(server, seconds)
            except _FullError:
                server.full()
                began, full = monotonic(), True  # It answers.
            except (RefusedError, _BrokenError) as error:
                server.failed()
                broken[server.url] = error
            except EnvHungError:
                server.failed()
                raise
            except EnvLostError as error:
                server.failed()
                if monotonic() - began > self._patience:
                    raise EnvLostError(
                        f"{self._what}: no server answered for {self._patience:g} s; the last: {error}"
                    ) from error

    def release(self, socket: EnvSocket) -> asyncio.Task[None]:
        """Give a connection back: it is closed in the background, and its place is then somebody else's."""
        server = self._by_url[socket.url]
        if not socket.is_open:
            server.failed()
        task = asyncio.get_running_loop().create_task(self._closed(server, socket))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    def rest(self, session: Resting) -> None:
        """A session's episode is over: whoever waits may have its place."""
        self._resting[session] = None
        self._wake()

    def wake(self, session: Resting) -> None:
        """A session is used again, or closed."""
        self._resting.pop(session, None)

    # ------------------------------------------------------------------------------------------------

    def _next(self, broken: Mapping[str, EnvError]) -> _Server | None:
        """The least busy server that is well, else the one that is tried again first."""
        now = monotonic()
        left = [server for server in self._servers if server.url not in broken]
        well = [server for server in left if server.aside_until <= now]
        if well:
            return min(well, key=lambda server: server.busy)
        return min(left, key=lambda server: server.aside_until, default=None)

    async def _connected(self, server: _Server, seconds: float) -> EnvSocket:
        socket: EnvSocket | None = None
        try:
            socket = await EnvSocket.open(server.url, seconds=CONNECT_SECONDS, headers=self._headers)
            # A full server takes the connection and then says so, where any reply shows that it is not.
            try:
                reply = await socket.ask({"type": "state"}, seconds=seconds)
            except EnvLostError:
                if socket.notice is None:
                    raise
                reply = socket.notice
            _check(reply, server.url)
        except BaseException:
            if socket is not None:
                await socket.close()
            raise
        server.well()
        return socket

    async def _raced(self, server: _Server, seconds: float) -> EnvSocket:
        """A new connection, or one that comes to rest while the server has its queue wait."""
        server.busy += 1  # Now, so that whoever opens another at the same moment takes another server.
        connecting = asyncio.ensure_future(self._connected(server, seconds))
        connecting.add_done_callback(partial(self._tried, server))
        self._closing.add(connecting)
        taken = False
        try:
            await asyncio.wait((connecting,), timeout=SLOW_SECONDS)
            while not connecting.done():
                if (socket := self._taken_over()) is not None:
                    return socket
                await self._woken(connecting)
            socket = connecting.result()
            taken = True
            return socket
        finally:
            if not connecting.done():
                connecting.cancel()
            elif not taken and not connecting.cancelled() and connecting.exception() is None:
                self.release(connecting.result())

    def _tried(self, server: _Server, connecting: asyncio.Future[EnvSocket]) -> None:
        self._closing.discard(connecting)
        if connecting.cancelled() or connecting.exception() is not None:
            server.busy -= 1
            self._wake()

    def _taken_over(self) -> EnvSocket | None:
        while self._resting:
            session, _ = self._resting.popitem()
            socket = session.give_up()
            if socket is not None and socket.usable:
                return socket
            if socket is not None:
                self.release(socket)
        return None

    async def _closed(self, server: _Server, socket: EnvSocket) -> None:
        await socket.close()
        server.busy -= 1
        if not server.failures:
            server.aside_until = 0.0  # It was full, and is not any more.
        self._wake()

    async def _woken(self, *others: asyncio.Future[Any], timeout: float | None = None) -> None:
        """Wait until there may be a place, or one of ``others`` is done, or the time is over."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        woken = False
        try:
            await asyncio.wait((waiter, *others), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            woken = True
        finally:
            if not waiter.done():
                self._waiting.remove(waiter)
            elif not woken:
                self._wake()  # Cancelled just as there was a place: it is the next one's.

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class _BrokenError(EnvLostError):
    """The server answers, and cannot make an environment."""


def _check(reply: Reply, url: str) -> None:
    """Whether a reply says that there is a session."""
    if reply["type"] != "error":
        return
    data = reply.get("data")
    code = data.get("code") if isinstance(data, Mapping) else None
    if code == "CAPACITY_REACHED":
        raise _FullError
    if code in ("FACTORY_ERROR", "SESSION_ERROR"):
        raise _BrokenError(f"{url}: no environment was made: {message_of(reply)}")


def _pause(tries: int) -> float:
    """Seconds; drawn, so that those who failed together do not all come again together."""
    longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))
    return longest * random.uniform(0.5, 1.0)
