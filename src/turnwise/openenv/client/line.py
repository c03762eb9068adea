"""`Line`: the connection beneath `turnwise.openenv.client.socket.EnvSocket`, and what goes over it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import PayloadTooBig
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import State

from turnwise.openenv.frames import between_messages, client_frame, read_server_frame

log = logging.getLogger(__name__)

ANSWERS = {
    "reset": "observation", "step": "observation", "state": "state", "mcp": "mcp", "turnwise": "turnwise",
}  # fmt: skip
"""What each kind of request is answered with, beside ``error``."""

Reply = dict[str, Any]


class LostError(Exception):
    """The connection went while a request was under way."""


class Line(ClientConnection):
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
        self.most = 0
        """Bytes of a message that may pass the parser by."""
        self._whole = False
        """Whether the parser waits for the beginning of a message, so that a whole one can pass it by."""

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
        if self.protocol.state is State.OPEN:
            self.transport.write(client_frame(message))

    def data_received(self, data: bytes) -> None:
        """Bytes of the server: one text frame as a rule, which needs no parser."""
        if self._whole and self.protocol.state is State.OPEN:
            text = read_server_frame(data, self.most)
            if text is not None:
                self._arrived(text)
                return
        super().data_received(data)
        self._whole = not self._parts and not self.protocol.extensions and between_messages(self.protocol)

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
                lost = LostError(self.lost)
                lost.__cause__ = cause
                future.set_exception(lost)


def _parsed(data: Any) -> Reply | None:
    try:
        reply = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:  # Python's own writer, which many servers use, writes NaN.
            reply = json.loads(bytes(data), parse_constant=lambda _: None)
        except ValueError:
            return None
    return reply if isinstance(reply, dict) else None


def _told_close(line: Line, exc: Exception | None) -> str:
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
