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
import logging
import re
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidState,
    InvalidStatus,
    PayloadTooBig,
    WebSocketException,
)
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import State

from turnwise.errors import EnvHungError, EnvLostError, EnvSpecError

log = logging.getLogger(__name__)

MAX_MESSAGE = 100 << 20
"""Bytes of one message from a server."""
PING_SECONDS, PONG_SECONDS = 20.0, 60.0
"""A server whose loop is busy, as while it makes another environment, may answer a ping late."""
CLOSE_SECONDS = 2.0
ANSWERS = {
    "reset": "observation", "step": "observation", "state": "state", "mcp": "mcp", "turnwise": "turnwise",
}  # fmt: skip
"""What each kind of request is answered with, beside ``error``."""

Reply = dict[str, Any]


class RefusedError(EnvLostError):
    """The server answered the connection itself with a no: a status that another try will not change."""


class EnvSocket:
    """One session of a server; made by `open`, of the event loop that it was opened on."""

    def __init__(self, url: str, line: _Line) -> None:
        self.url = url
        self._line = line

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
                create_connection=_Line,
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
        assert isinstance(line, _Line)
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
        timer = line.loop.call_later(seconds, _expire, future, seconds)
        try:
            reply = await future
        except _LostError as lost:
            raise EnvLostError(f"{self.url}: {lost}") from lost.__cause__
        except TimeoutError:
            raise EnvHungError(f"{self.url}: no answer to {kind} within {seconds:g} s") from None
        finally:
            timer.cancel()
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


class _LostError(Exception):
    """The connection went while a request was under way."""


def _expire(future: asyncio.Future[Reply], seconds: float) -> None:
    if not future.done():
        future.set_exception(TimeoutError(seconds))


class _Line(ClientConnection):
    """The connection itself: hands each message to the future that has waited longest.

    Overrides what gives messages to ``recv``: a queue, a task's wake-up and a lock for each would cost more
    than all the rest of a request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting: deque[tuple[str, asyncio.Future[Reply]]] = deque()
        self.notice: Reply | None = None
        self.lost: str | None = None
        """Why nothing can be asked any more."""
        self._parts: list[bytes] = []

    @property
    def gone(self) -> str | None:
        """Why nothing can be asked; also while the connection is being closed."""
        return self.lost or (None if self.protocol.state is State.OPEN else _told_close(self, None))

    def put(self, message: bytes, kind: str) -> asyncio.Future[Reply]:
        """Send a request; the future of its reply."""
        future: asyncio.Future[Reply] = self.loop.create_future()
        self.waiting.append((kind, future))
        self.say(message)
        return future

    def say(self, message: bytes) -> None:
        """Send what is not answered; while the connection closes, nothing: `connection_lost` tells."""
        with suppress(InvalidState):
            self.protocol.send_text(message)
        self.send_data()

    def process_event(self, event: Any) -> None:
        """A frame has arrived."""
        if self.response is None or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        assert isinstance(event, Frame)
        if self._parts or not event.fin:
            self._parts.append(bytes(event.data))
            if event.fin:
                whole = b"".join(self._parts)
                self._parts = []
                self._arrived(whole)
            return
        self._arrived(event.data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, and with it all that was under way."""
        super().connection_lost(exc)
        self._lose(_told_close(self, exc), exc)

    def _arrived(self, data: Any) -> None:
        if self.lost is not None:
            return
        reply = _parsed(data)
        if reply is None:
            self._distrust(f"the server sent no JSON object: {bytes(data[:60])!r}")
            return
        kind = reply.get("type")
        if not self.waiting:
            if kind == "error":
                self.notice = reply  # Sent before it closes: no place, no environment.
            else:
                self._distrust(f"the server sent a frame of type {kind!r:.40} that nobody asked for")
            return
        asked, future = self.waiting[0]
        if kind not in (ANSWERS.get(asked), "error"):
            self._distrust(f"a {asked} was answered with a frame of type {kind!r:.40}")
            return
        self.waiting.popleft()
        if not future.done():
            future.set_result(reply)

    def _distrust(self, why: str) -> None:
        log.warning("%s; the connection is closed", why)
        self._lose(why, None)
        if self.transport is not None:
            self.transport.abort()

    def _lose(self, why: str, cause: BaseException | None) -> None:
        self.lost = self.lost or why
        while self.waiting:
            _, future = self.waiting.popleft()
            if not future.done():
                lost = _LostError(self.lost)
                lost.__cause__ = cause
                future.set_exception(lost)


def _written(message: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(message)
    except TypeError:  # Whole numbers past 64 bits, halves of surrogate pairs: a policy may write them.
        return json.dumps(message).encode()


def _parsed(data: Any) -> Reply | None:
    try:
        reply = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:  # Python's own writer, which many servers use, writes NaN.
            reply = json.loads(bytes(data), parse_constant=lambda _: None)
        except ValueError:
            return None
    return reply if isinstance(reply, dict) else None


def _told_close(line: _Line, exc: Exception | None) -> str:
    if line.notice is not None:
        return f"the server closed the session: {message_of(line.notice)}"
    if isinstance(long := line.protocol.parser_exc, PayloadTooBig):
        return f"the server sent a longer message than is taken ({long}); see EnvClient(max_message_size_mb=)"
    if exc is not None:
        return f"the connection was lost: {exc or type(exc).__name__}"
    code, reason = line.close_code, line.close_reason
    return f"the connection was closed (code {code}{': ' + reason if reason else ''})"


def code_of(reply: Mapping[str, Any]) -> str | None:
    """The code of an error frame; None of one that has none, and of any other."""
    data = reply.get("data")
    code = data.get("code") if reply.get("type") == "error" and isinstance(data, Mapping) else None
    return None if code is None else str(code)


def message_of(error: Mapping[str, Any]) -> str:
    """What an error frame says."""
    data = error.get("data")
    return str(data.get("message", data)) if isinstance(data, Mapping) else str(data)


def _told_status(url: str, status: int) -> str:
    if status in (401, 403):
        return f"{url}: HTTP {status}: the server wants a token, or another one: give it as args.token"
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


def unsigned(url: str) -> str:
    """An address without user and password, to be told."""
    return re.sub(r"^([a-z]*://)?[^/]*@", r"\1", url, flags=re.IGNORECASE)


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
