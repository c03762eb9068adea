"""`Proxy`: stands between a client and a server and loses, delays or half-closes what passes."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from urllib.parse import urlsplit


class Proxy:
    """Forwards connections; made by `disturbed`.

    What is sent back passes in order, each piece (a reply's frame) after a pause where one is drawn.
    """

    def __init__(self, target: str) -> None:
        self.host, self.port_there = urlsplit(target).hostname, urlsplit(target).port
        self.delayed, self.seconds = 0.0, 0.0
        """The share of replies that is held up, and for how long."""
        self.late: Callable[[int, int], bool] = lambda *which: Random(f"{which}").random() < self.delayed
        """Which they are, by connection and reply, counted from 0: the same ones, whatever the order."""
        self.silent = False
        """Nothing comes back any more, and nobody is told."""
        self.connections: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        """To the client, to the server."""
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self._ready = threading.Event()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def end_replies(self) -> None:
        """Every client reads an end, while what it sends still passes."""
        self._on_all(lambda client, _: client.write_eof())

    def end_requests(self) -> None:
        """The server reads an end of every connection, while its replies still pass."""
        self._on_all(lambda _, server: server.write_eof())

    def _on_all(self, act) -> None:  # type: ignore[no-untyped-def]
        def run() -> None:
            for client, server in self.connections:
                if not (client.is_closing() or server.is_closing()):
                    act(client, server)

        self.loop.call_soon_threadsafe(run)

    def _run(self) -> None:
        async def listen() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stopped.wait()
            server.close()

        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(listen())  # Whatever still passes something on is cancelled at its end.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self.host, self.port_there)
        number = len(self.connections)
        self.connections.append((writer, back))
        replies = (self.late(number, reply) for reply in itertools.count())
        try:
            await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer, replies))
        except asyncio.CancelledError:
            return  # By `stop`: streams would tell of a handler that was cancelled.
        finally:
            writer.close()
            back.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        replies: Iterator[bool] | None = None,
    ) -> None:
        """``replies``: whether each is late, where what passes is replies."""
        try:
            while data := await reader.read(1 << 16):
                # The handshake is let through, so that what is delayed is a session's.
                if replies and not data.startswith(b"HTTP/") and next(replies):
                    await asyncio.sleep(self.seconds)
                if not (replies and self.silent):
                    writer.write(data)
                    await writer.drain()
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()
        except OSError:
            writer.close()


@contextmanager
def disturbed(target: str) -> Iterator[Proxy]:
    """A proxy before ``target``."""
    proxy = Proxy(target)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
