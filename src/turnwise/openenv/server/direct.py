"""`DirectWebSocket`: uvicorn's WebSocket protocol with a short way for what nearly all frames are.

A whole, masked, uncompressed text frame that arrives alone goes to the session as it is, and its reply to the
transport; handshakes, fragments, control frames and everything else take uvicorn's own way. It saves half of
what a step costs. Only `turnwise.openenv.server.socket` asks for it, through the scope's extensions; other
endpoints of the same application see plain ASGI, as this one does under any other server.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from turnwise.openenv.frames import between_messages, read_client_frame, server_frame

EXTENSION = "turnwise.direct"
"""Of the scope: the protocol itself."""
NEEDED = ("close_sent", "conn", "disconnected", "frames", "read_paused", "transport", "writable")
"""Of uvicorn's protocol; they are no promise of it, and 0.53 is the first that has all."""


class DirectWebSocket(WebSocketsSansIOProtocol):
    """One connection; uvicorn makes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._short = all(hasattr(self, name) for name in NEEDED)
        if self._short:
            self.queue: Events = Events()  # type: ignore[assignment]  # Uvicorn asks no more of one.
        self._direct = False
        self._whole = False
        """Whether the parser waits for the beginning of a message."""
        self._max_size = self.config.ws_max_size

    def handle_connect(self, event: Request) -> None:
        """Offer the short way, where there is one, to whoever answers; its task has not begun yet."""
        super().handle_connect(event)
        if self._short and self.response.status_code == 101:
            cast(dict[str, Any], self.scope["extensions"])[EXTENSION] = self

    def claim(self) -> None:
        """Take the short way from now on, if nothing was compressed; what the handshake said is forgotten."""
        self._direct = not self.conn.extensions
        # Headers are a tenth of what an idle session holds.
        cast(list[Any], self.scope["headers"]).clear()
        for handshake in (self.request, self.response):
            handshake.headers.clear()
        self._whole = self._between_messages()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client: one text frame as a rule."""
        if self._whole:
            text = read_client_frame(data, self._max_size)
            if text is not None:
                self._deliver(text)
                return
        super().data_received(data)
        if self._direct:
            self._whole = self._between_messages()

    def _between_messages(self) -> bool:
        if self.frames:
            return False  # A message of several fragments has begun.
        return between_messages(self.conn)

    def _deliver(self, text: bytes) -> None:
        if self.close_sent:
            return
        if not self.queue.put_nowait(text) and not self.read_paused:
            self.read_paused = True  # The session is at work: the rest may wait in the kernel.
            self.transport.pause_reading()

    async def receive_direct(self) -> Any:
        """The next frame's text, or an ASGI event."""
        item: Any = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self.transport.resume_reading()
        return item

    async def send_direct(self, text: bytes) -> None:
        """Send a text frame.

        Raises:
            ClientDisconnected: Nobody is there any more.
        """
        if not self.writable.is_set():
            await self.writable.wait()
        if self.disconnected or self.close_sent or self.transport.is_closing():
            raise ClientDisconnected
        self.transport.write(server_frame(text))


class Events:
    """A queue with one reader, who as a rule waits already."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Any] = []  # Hardly ever two; an empty deque takes 600 bytes.
        self._waiter: asyncio.Future[None] | None = None

    def put_nowait(self, item: Any) -> bool:
        """Add one; whether the reader was waiting for it."""
        self._items.append(item)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return False
        waiter.set_result(None)
        return True

    async def get(self) -> Any:
        """The oldest."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.pop(0)

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._items

    def __len__(self) -> int:
        return len(self._items)
