"""A server of ours on an ephemeral port, in a thread of its own, as long as a test needs it."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from turnwise.openenv.hosted import hosted
from turnwise.openenv.server.app import create_server_app, uvicorn_config
from turnwise.openenv.server.sessions import Sessions
from turnwise.openenv.server.settings import Settings


@dataclass(frozen=True)
class Serving:
    """A server that runs."""

    url: str
    app: Any
    server: uvicorn.Server

    def __str__(self) -> str:
        return self.url

    @property
    def sessions(self) -> Sessions:
        return self.app.state.sessions


@contextmanager
def running(app: Any, *, config: uvicorn.Config | None = None, port: int = 0) -> Iterator[Serving]:
    """Any ASGI application under uvicorn: ours as it is set up in production, others' by its defaults."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        port = listener.getsockname()[1]
        if config is None and hasattr(getattr(app, "state", None), "sessions"):
            config = uvicorn_config(app, host="127.0.0.1", port=port, log_level="warning")
        server = uvicorn.Server(config or uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            thread.join(0.005)
        try:
            yield Serving(f"http://127.0.0.1:{port}", app, server)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"


@asynccontextmanager
async def serving(
    spec_or_app: Any, *, settings: Settings | None = None, args: dict[str, Any] | None = None
) -> AsyncIterator[str]:
    """The URL of a server: of an app, or of an environment by name, class or `Served`."""
    with running(as_app(spec_or_app, settings, args)) as server:
        yield server.url


def as_app(spec_or_app: Any, settings: Settings | None = None, args: dict[str, Any] | None = None) -> Any:
    if isinstance(spec_or_app, FastAPI) or (
        callable(spec_or_app) and not isinstance(spec_or_app, type) and not hasattr(spec_or_app, "open")
    ):
        return spec_or_app
    served = spec_or_app if hasattr(spec_or_app, "schemas") else hosted(spec_or_app, args=args)
    return create_server_app(served, settings=settings)
