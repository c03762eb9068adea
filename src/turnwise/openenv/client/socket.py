"""`EnvSocket`: one WebSocket to an OpenEnv server; each reply goes to the request it answers, or to none.

The protocol has no request ids: the n-th reply answers the n-th request. So a request keeps its place in the
line when its caller has gone, by a deadline or a cancellation, and the reply that comes late for it is
dropped, never given to the next one. A line that cannot be trusted any more (a frame that nobody asked for,
a reply of the wrong kind) is closed.

    socket = await EnvSocket.open("http://127.0.0.1:8000", seconds=10)
    reply = await socket.ask({"type": "reset", "data": {"seed": 3}}, seconds=60)
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson
from websockets.asyncio.client import connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    WebSocketException,
)

from turnwise.envs.alarm import Alarm
from turnwise.envs.registry import unsigned
from turnwise.errors import EnvHungError, EnvLostError, EnvSpecError
from turnwise.openenv.client.line import Line, LostError, Reply
from turnwise.openenv.client.refused import FORBIDDEN, GIVE_TOKEN

MAX_MESSAGE = 100 << 20
"""Bytes of one message from a server."""
PING_SECONDS, PONG_SECONDS = 20.0, 60.0
"""A server whose loop is busy, as while it makes another environment, may answer a ping late."""
CLOSE_SECONDS = 2.0


class RefusedError(EnvLostError):
    """The server answered the connection itself with a no: a status that another try will not change."""


class EnvSocket:
    """One session of a server; made by `open`, of the event loop that it was opened on."""

    def __init__(self, url: str, line: Line) -> None:
        self.url = url
        self._line = line
        self._alarm = Alarm()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_MESSAGE,
    ) -> EnvSocket:
        """Connect.

        Args:
            url: The server's, ``http://…``, without ``/ws``.
            seconds: To wait for the connection.
            headers: Of the request: ``{"Authorization": "Bearer …"}``.
            max_bytes: Of one message from the server; a longer one ends the connection.

        Raises:
            RefusedError: There is a server, which does not take this client: no such path, no valid token.
            EnvLostError: Nobody answers.
        """
        try:
            line = await _Connect(
                websocket_url(url),
                create_connection=Line,
                additional_headers=dict(headers or {}),
                compression=None,  # It costs more time than a loopback or a data centre's network saves.
                proxy=None if is_loopback(url) else True,
                open_timeout=seconds,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                max_size=max_bytes,
            )
        except InvalidStatus as cause:
            status = cause.response.status_code
            final = status < 400 or status in (400, 401, 403, 404)
            raise (RefusedError if final else EnvLostError)(_told_status(url, status)) from cause
        except InvalidHandshake as cause:
            if isinstance(cause, InvalidMessage) and isinstance(cause.__cause__, EOFError):
                # Taken and closed without a word: a proxy whose server starts, a server that ends.
                raise EnvLostError(f"{url}: the connection was closed before it was answered") from cause
            raise RefusedError(f"{url}: no WebSocket at /ws: {cause}") from cause
        except (OSError, TimeoutError, WebSocketException) as cause:
            raise EnvLostError(f"{url}: no connection: {cause or type(cause).__name__}") from cause
        assert isinstance(line, Line)
        line.most = max_bytes
        return cls(url, line)

    @property
    def is_open(self) -> bool:
        """Whether anything can be asked."""
        return self._line.gone is None

    @property
    def usable(self) -> bool:
        """Whether the next reply would be the next request's own: nothing is outstanding."""
        return self._line.gone is None and not self._line.waiting

    @property
    def notice(self) -> Reply | None:
        """What the server said unasked before it closed: why there is no session."""
        return self._line.notice

    async def ask(self, message: Mapping[str, Any], *, seconds: float) -> Reply:
        """Send a request and wait for its reply, an ``error`` frame perhaps.

        Raises:
            EnvHungError: No reply within ``seconds``; the session is of no more use until that reply comes.
            EnvLostError: The connection is closed, or was while this waited.
        """
        line = self._line
        if line.gone is not None:
            raise EnvLostError(f"{self.url}: {line.gone}")
        kind: str = message["type"]
        future = line.put(_written(message), kind)
        alarm = Alarm() if self._alarm.is_set else self._alarm  # Requests come one after another as a rule.
        alarm.set(seconds, partial(_expire, future, seconds))
        try:
            reply = await future
        except LostError as lost:
            raise EnvLostError(f"{self.url}: {lost}") from lost.__cause__
        except TimeoutError:
            raise EnvHungError(f"{self.url}: no answer to {kind} within {seconds:g} s") from None
        finally:
            (alarm.clear if alarm is self._alarm else alarm.stop)()
        return reply

    async def pings(self, seconds: float) -> bool:
        """Whether a ping is answered: the network is there, and so is the server's event loop."""
        try:
            async with asyncio.timeout(seconds):
                await (await self._line.ping())
        except (TimeoutError, ConnectionClosed):
            return False
        return True

    def abort(self) -> None:
        """Drop the connection without a word, as a client does whose machine is gone."""
        self._line.transport.abort()

    async def close(self) -> None:
        """Say goodbye and close, within bounds. Never raises; may be called twice."""
        line = self._line
        self._alarm.stop()
        if self.usable:
            # The server ends the session and then closes; where it is busy, only the latter is asked of it.
            line.say(b'{"type":"close"}')
            await asyncio.wait((line.connection_lost_waiter,), timeout=CLOSE_SECONDS)
        await line.close()


class _Connect(connect):
    """Follows redirects on the same host alone: the headers, a token among them, are for nobody else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        to = super().process_redirect(exc)
        return exc if isinstance(to, str) and not same_server(self.uri, to) else to


def _expire(future: asyncio.Future[Reply], seconds: float) -> None:
    if not future.done():
        future.set_exception(TimeoutError(seconds))


def _written(message: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(message)
    except TypeError:  # Whole numbers past 64 bits, halves of surrogate pairs: a policy may write them.
        return json.dumps(message).encode()


def _told_status(url: str, status: int) -> str:
    if status == 401:
        return f"{url}: HTTP 401: the server wants a token, or another one: {GIVE_TOKEN}"
    if status == 403:
        return f"{url}: HTTP 403 at /ws: {FORBIDDEN}"
    if status == 404:
        return f"{url}: HTTP 404 at /ws: no OpenEnv server, or one older than 0.2"
    if 300 <= status < 400:
        return (
            f"{url}: HTTP {status} at /ws: it leads to another server, and what is sent is not for that one"
        )
    return f"{url}: HTTP {status} in place of a WebSocket"


# -- addresses ---------------------------------------------------------------------------------------


def base_url(url: str) -> str:
    """A server's address as the rest of this room takes it: ``http(s)://``, without a slash at its end.

    ``ws(s)://`` and ``…/ws`` are taken too, and so is the page of a Hugging Face Space.

    Raises:
        EnvSpecError: It is no address, or holds a password, which would stand wherever it is told.
    """
    parts = urlsplit(url)
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    if scheme not in ("http", "https") or not parts.hostname:
        raise EnvSpecError(f"{unsigned(url)!r} is no address of a server; write http://host:port")
    if "@" in parts.netloc:
        raise EnvSpecError(
            f"{unsigned(url)} was given with a user or password, which recipes and logs would tell; leave "
            'them away and give the header: args.headers.Authorization: "Basic $NAME"'
        )
    path = parts.path.rstrip("/").removesuffix("/ws").removesuffix("/web")
    space = re.fullmatch(r"/spaces/([^/]+)/([^/]+)", path)
    if parts.hostname == "huggingface.co" and space:
        subdomain = re.sub(r"[^a-z0-9]+", "-", f"{space[1]}-{space[2]}".lower()).strip("-")
        return f"https://{subdomain}.hf.space"
    return urlunsplit((scheme, parts.netloc, path, "", ""))


def websocket_url(url: str) -> str:
    """``ws://…/ws`` of a server's address."""
    return f"ws{url.removeprefix('http')}/ws"


def same_server(url: str, to: str) -> bool:
    """Whether a redirect stays where it was, or goes from ``http`` to ``https`` there."""
    ports = {"http": 80, "ws": 80, "https": 443, "wss": 443}
    here, there = urlsplit(url), urlsplit(to)
    ends = [(one.hostname, one.port or ports.get(one.scheme)) for one in (here, there)]
    secure = [one.scheme in ("https", "wss") for one in (here, there)]
    if here.hostname == there.hostname and secure == [False, True]:
        return ends[0][1] == 80 and ends[1][1] == 443
    return ends[0] == ends[1] and secure[0] == secure[1]


def is_loopback(url: str) -> bool:
    """Whether a server is on this machine, where no proxy leads to."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
