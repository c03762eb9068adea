"""`Servers`: the servers of one environment. Sessions go to the least busy; what fails is set aside a while.

A server that does not answer is tried again with growing pauses, and given up after ``patience`` seconds with
nobody else there. A full one is waited for: the next place that one of our own sessions leaves is taken at
once, and a session that rests between two episodes gives its place away, to another environment's too.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from turnwise.errors import EnvError, EnvHungError, EnvLostError, EnvSpecError
from turnwise.openenv.client.discovery import look
from turnwise.openenv.client.line import Reply, code_of, message_of
from turnwise.openenv.client.socket import EnvSocket, RefusedError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""One try to connect."""
SLOW_SECONDS = 0.25
"""After which a connection is taken to wait for its place."""
TOLD_AFTER, TOLD_AGAIN = 5.0, 60.0
"""Seconds of waiting after which the log says so, and for how long it says no more."""
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
        self.said = ""
        """Why there was no session."""
        self.alike = False
        """It is known to serve what the others do; not any more once it was lost."""
        self.looking = asyncio.Lock()

    def failed(self) -> None:
        self.alike = False
        if self.aside_until > monotonic():
            return  # One of several tries that failed together.
        self.aside_until = monotonic() + _pause(self.failures)
        self.failures += 1

    def full(self) -> None:
        if self.aside_until > monotonic():
            return
        self.aside_until = monotonic() + _pause(self.refusals)
        self.failures, self.refusals = 0, self.refusals + 1

    def well(self) -> None:
        self.failures = self.refusals = 0
        self.aside_until = 0.0


class Servers:
    """Opens sessions on several servers of the same environment, all on one event loop; see `servers`.

    Args:
        urls: As `turnwise.openenv.client.socket.base_url` writes them.
        headers: Of every request.
        identity: `About.identity` of what they serve, which a server that comes late or anew is asked for.
    """

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str], identity: str) -> None:
        self._identity = identity
        self._servers = [_Server(url) for url in urls]
        self._by_url = {server.url: server for server in self._servers}
        self._headers = dict(headers)
        self._told_at = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resting: WeakKeyDictionary[Resting, None] = WeakKeyDictionary()
        """A session that nobody else holds is closed, not kept for who waits."""
        self._closing: set[asyncio.Future[Any]] = set()

    @property
    def busy(self) -> dict[str, int]:
        """Our connections to each server."""
        return {server.url: server.busy for server in self._servers}

    async def open(self, seconds: float, *, patience: float, what: str) -> EnvSocket:
        """A connection that has a session behind it, to the least busy server that is well.

        Args:
            seconds: How long a server may take to make an environment.
            patience: Seconds to go on while no server answers.
            what: Whose it is, for errors and the log.

        Raises:
            RefusedError: No server takes this client.
            EnvLostError: None answered for ``patience`` seconds, or each failed to make an environment.
            EnvHungError: A server did not get an environment made in time.
        """
        timer = asyncio.get_running_loop().call_later(TOLD_AFTER, self._tell, what)
        try:
            return await self._opened(seconds, patience, what)
        finally:
            timer.cancel()

    def _tell(self, what: str) -> None:
        if monotonic() - self._told_at < TOLD_AGAIN:
            return
        self._told_at = monotonic()
        log.warning(
            "%s: no session after %g s, it goes on waiting (%s); where all places are taken, close other "
            "sessions, or let the server have more (max_concurrent_envs)",
            what,
            TOLD_AFTER,
            "; ".join(f"{one.url}: {one.said or 'no word yet'}" for one in self._servers),
        )

    async def _opened(self, seconds: float, patience: float, what: str) -> EnvSocket:
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
            except _FullError as error:
                server.said = str(error)
                server.full()
                began, full = monotonic(), True  # It answers.
            except (RefusedError, _BrokenError) as error:
                server.failed()
                broken[server.url] = error
            except EnvHungError:
                server.failed()
                raise
            except EnvLostError as error:
                server.said = str(error)
                server.failed()
                if monotonic() - began > patience:
                    raise EnvLostError(
                        f"{what}: no server answered for {patience:g} s; the last: {error}"
                    ) from error

    def release(self, socket: EnvSocket) -> asyncio.Task[None]:
        """Give a connection back: it is closed in the background, and its place is then somebody else's."""
        server = self._by_url[socket.url]
        if not socket.is_open:
            server.alike = False
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
            await self._compared(server)
        except BaseException:
            if socket is not None:
                await socket.close()
            raise
        server.well()
        return socket

    async def _compared(self, server: _Server) -> None:
        async with server.looking:
            if server.alike:
                return
            try:
                about = await look(server.url, self._headers)
            except EnvSpecError as error:
                raise _BrokenError(str(error)) from error
            if about.identity != self._identity:
                raise _BrokenError(
                    f"{server.url} serves '{about.name}' now, another environment or another version of it "
                    "than the others did; the servers of one environment must be alike"
                )
            server.alike = True

    def trust(self, urls: Iterable[str]) -> None:
        """These were just seen to be alike."""
        for url in urls:
            self._by_url[url].alike = True

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
        try:
            await socket.close()
        finally:
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


_shared: dict[tuple[asyncio.AbstractEventLoop, Hashable], Servers] = {}


def servers(
    urls: Sequence[str], headers: Mapping[str, str], identity: str, seen: Iterable[str] = ()
) -> Servers:
    """The `Servers` of the running loop: environments at the same addresses hand places on to each other.

    Args:
        urls: As for `Servers`.
        headers: Likewise.
        identity: Likewise.
        seen: Those that are known to be alike, where nothing is known yet.
    """
    key = (asyncio.get_running_loop(), (tuple(urls), tuple(sorted(headers.items())), identity))
    found = _shared.get(key)
    if found is None:
        for other in [one for one in list(_shared) if one[0].is_closed()]:
            _shared.pop(other, None)
        found = _shared[key] = Servers(urls, headers, identity)
        found.trust(seen)
    return found


class _BrokenError(EnvLostError):
    """The server answers, and cannot make an environment."""


def _check(reply: Reply, url: str) -> None:
    """Whether a reply says that there is a session."""
    code = code_of(reply)
    if code == "CAPACITY_REACHED":
        raise _FullError(message_of(reply))
    if code == "UNKNOWN_TYPE":
        raise RefusedError(f"{url} keeps episodes to itself, as in production mode: {message_of(reply)}")
    if code in ("FACTORY_ERROR", "SESSION_ERROR"):
        raise _BrokenError(f"{url}: no environment was made: {message_of(reply)}")


def _pause(tries: int) -> float:
    """Seconds; drawn, so that those who failed together do not all come again together."""
    longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))
    return longest * random.uniform(0.5, 1.0)
