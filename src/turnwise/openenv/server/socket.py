"""WS ``/ws``: one environment a socket, one reply a request, in order.

Plain ASGI, so that nothing stands between a frame and the environment. While a call runs, the socket is not
read: requests wait in the client's order. Only once a call is slow a task reads ahead, so that a client that
leaves is noticed and pings are answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from turnwise.errors import EnvError, TurnwiseError, message_of
from turnwise.openenv import wire
from turnwise.openenv.served import DEAD
from turnwise.openenv.server.direct import EXTENSION, DirectWebSocket, Events
from turnwise.openenv.server.sessions import CapacityError, Live, Sessions

NORMAL, POLICY, TOO_BIG = 1000, 1008, 1009
"""Codes of RFC 6455, 7.4.1."""

AGENTS_ONLY = "in production mode agents have their tools and nobody controls the episode"


class Mcp(Protocol):
    """What answers frames of type ``mcp``."""

    async def __call__(self, live: Live, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON-RPC response to a request, on a session of the caller's own."""
        ...


class Socket:
    """The endpoint: an ASGI application of WebSocket scopes.

    Args:
        sessions: Where environments come from.
        mcp: Answers frames of type ``mcp``; None knows no such frames.
    """

    def __init__(self, sessions: Sessions, mcp: Mcp | None = None) -> None:
        self.sessions, self.mcp = sessions, mcp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        connection = Connection(self, receive, send, scope.get("extensions", {}).get(EXTENSION))
        # In a task of its own: each frame would else wake a dozen layers of the application around it.
        await asyncio.create_task(connection.serve())


class Connection:
    """One socket and its session."""

    def __init__(
        self, endpoint: Socket, receive: Receive, send: Send, direct: DirectWebSocket | None = None
    ) -> None:
        self.sessions, self.mcp = endpoint.sessions, endpoint.mcp
        self.settings = endpoint.sessions.settings
        self._agents_only = self.settings.mode == "production"
        self._receive, self._send, self._direct = receive, send, direct
        self._hear = receive if direct is None else direct.receive_direct
        self._ahead: Events
        self._reader: asyncio.Task[None] | None = None
        """Set once requests are read `_ahead`; from then on it alone receives."""
        self._task: asyncio.Task[Any] | None = None
        self._calling = False
        """Whether the environment is at work, so that a client that leaves has something to end."""
        self._left = False
        """Nobody is there any more to be answered."""
        self._ended = False
        self._dead = False
        """The environment can be of no more use."""

    async def serve(self) -> None:
        """From the handshake to the end."""
        if (await self._receive())["type"] != "websocket.connect":
            return
        await self._send({"type": "websocket.accept"})
        if self._direct is not None:
            self._direct.claim()
        self._task = asyncio.current_task()
        live = None
        try:
            live = await self._open()
            if live is not None:
                await self._play(live)
        except asyncio.CancelledError:
            if not self._left or self._task is None:
                raise
            self._task.uncancel()  # It was `_read` that ended a call whose reply nobody gets.
        except OSError:
            pass  # The client left before its reply.
        finally:
            if self._reader is not None:
                self._reader.cancel()
            if live is not None:
                await asyncio.shield(asyncio.ensure_future(self.sessions.close(live)))

    async def _open(self) -> Live | None:
        self._calling = True
        try:
            return await self.sessions.open(evict=self.evict, watch=self.watch)
        except CapacityError as full:
            more = {"active_sessions": full.active, "max_sessions": full.limit}
            await self._fail("CAPACITY_REACHED", str(full), **more)
        except TurnwiseError as error:
            await self._fail("FACTORY_ERROR", str(error), factory_name=self.sessions.served.name)
        finally:
            self._calling = False
        return None

    async def _play(self, live: Live) -> None:
        rate, max_frame = self.settings.rate, self.settings.max_frame
        while True:
            text = _heard(await self._hear()) if self._reader is None else await self._ahead.get()
            if text is None or self._ended:
                return
            if len(text) > max_frame:
                await self._fail("SESSION_ERROR", f"a frame has at most {max_frame} bytes", closing=TOO_BIG)
                return
            live.begin()
            self._calling = True
            if rate is not None and (early := live.early(rate)) > 0:
                await asyncio.sleep(early)
            reply = await self._answer(live, text)
            self._calling = False
            live.end()
            if reply is None or self._ended:  # From outside, while the call ran.
                await self.end(NORMAL)
                return
            if reply and self._direct is not None:
                await self._direct.send_direct(reply.encode())
            elif reply:
                await self._send({"type": "websocket.send", "text": reply})
            if self._dead:
                await self.end(NORMAL, "the environment is gone: connect again")
                return

    async def _answer(self, live: Live, text: str | bytes) -> str | None:
        """The reply to one frame; None closes the socket, and nothing is sent where none is owed."""
        try:
            kind, data = wire.request(text)
            if self._agents_only and kind not in ("mcp", "close"):
                return wire.error("UNKNOWN_TYPE", f"Unknown message type: {kind}: {AGENTS_ONLY}")
            if kind == "step":
                return wire.observation(await live.session.step(data))
            if kind == "reset":
                return wire.observation(await live.session.reset(data))
            if kind == "state":
                return wire.frame("state", await live.session.state())
            if kind == "close":
                return None
            if kind == "mcp" and self.mcp is not None:
                return wire.frame("mcp", await self.mcp(live, data))
            if kind == "turnwise":
                return wire.frame("turnwise", await self._ask(live, data))
            return wire.error("UNKNOWN_TYPE", f"Unknown message type: {kind}: not on this server")
        except wire.FrameError as wrong:
            return wire.error(wrong.code, str(wrong))
        except TurnwiseError as error:
            self._dead = isinstance(error, DEAD)
            return wire.failure(error)
        except Exception as error:  # noqa: BLE001 - whoever wrote the session: its client is told, others go on
            return wire.error("EXECUTION_ERROR", message_of(error), kind=EnvError.__name__)

    async def _ask(self, live: Live, data: Mapping[str, Any]) -> Any:
        method = data.get("method")
        if not isinstance(method, str):
            raise wire.FrameError("VALIDATION_ERROR", "a 'turnwise' frame's data needs a method, as text")
        return await live.session.ask(method, data)

    # -- the socket itself ---------------------------------------------------------------------------

    async def evict(self, why: str) -> None:
        """End the session from outside, telling its client."""
        await self._fail("SESSION_ERROR", f"{why}: connect again")

    def watch(self) -> None:
        """Read ahead from now on, so that a client that leaves is noticed while a call runs."""
        if self._reader is None:
            self._ahead = Events()
            self._reader = asyncio.ensure_future(self._read())

    async def end(self, code: int, reason: str = "") -> None:
        """Close the socket, unless that was done."""
        if not self._ended:
            self._ended = True
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def _fail(self, code: wire.Code, message: str, closing: int = NORMAL, **more: Any) -> None:
        if not self._ended:
            # A client that has left is told nothing.
            with suppress(OSError):
                await self._send({"type": "websocket.send", "text": self._told(code, message, **more)})
                await self.end(closing)

    def _told(self, code: wire.Code, message: str, **more: Any) -> str:
        return wire.error(code, message, **more)

    async def _read(self) -> None:
        while True:
            text = _heard(await self._hear())
            self._ahead.put_nowait(text)
            if text is not None:
                if len(self._ahead) <= self.settings.max_ahead:
                    continue
                waiting = f"more than {self.settings.max_ahead} requests wait for the one before them"
                await self._fail("SESSION_ERROR", waiting, closing=POLICY)
            self._left = self._ended = True
            if self._calling and self._task is not None:
                self._task.cancel()
            return


def _heard(event: Any) -> str | bytes | None:
    """The frame; None if the client has left."""
    if type(event) is bytes:
        return event
    if event["type"] != "websocket.receive":
        return None
    text: str | None = event.get("text")
    frame: str | bytes = event["bytes"] if text is None else text
    return frame
