"""`create_server_app`: an environment as a FastAPI application that speaks OpenEnv.

app = create_server_app(hosted("catch"))          # uvicorn module:app
turnwise env serve catch --port 8000              # the same, with the server set up for it
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.routing import Route, WebSocketRoute

from turnwise.errors import TurnwiseError
from turnwise.openenv.page import page_routes
from turnwise.openenv.served import Served
from turnwise.openenv.server.access import Access
from turnwise.openenv.server.direct import DirectWebSocket
from turnwise.openenv.server.http import about_router, control_router, failed, invalid
from turnwise.openenv.server.mcp import Mcp, McpSocket
from turnwise.openenv.server.sessions import Sessions
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.server.socket import Socket
from turnwise.openenv.server.tasks import task_router

GRACE_SECONDS = 5
"""How long requests that run may take to end once the server is told to stop."""
API_VERSION = "1.0.0"
"""Of OpenEnv's HTTP API; ``openenv validate`` looks for it in ``/openapi.json``."""


def create_server_app(served: Served, *, settings: Settings | None = None) -> FastAPI:
    """The application; its sessions are ``app.state.sessions``.

    Args:
        served: What it hosts.
        settings: How; the defaults if not given.
    """
    app = FastAPI(title=served.name, version=API_VERSION)
    add_routes(app, served, settings or Settings())
    return app


def add_routes(app: FastAPI, served: Served, settings: Settings) -> None:
    """Have an application that has routes of its own speak OpenEnv too."""
    sessions = Sessions(served, settings)
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        try:
            async with own(app) as state:
                yield state
        finally:
            await sessions.aclose()

    app.router.lifespan_context = lifespan
    app.state.sessions = sessions
    app.add_middleware(Access, settings=settings)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(TurnwiseError, failed)
    app.add_exception_handler(Exception, failed)
    mcp = Mcp(sessions)
    app.router.routes += [
        WebSocketRoute("/ws", endpoint=Socket(sessions, mcp)),
        WebSocketRoute("/mcp", endpoint=McpSocket(sessions, mcp)),
        Route("/mcp", endpoint=mcp.http, methods=["GET", "POST", "DELETE"]),
    ]
    app.include_router(about_router(sessions))
    if settings.mode == "simulation":
        app.include_router(control_router(sessions))
        app.router.routes.extend(page_routes())
        app.include_router(task_router(served))


def uvicorn_config(app: FastAPI, *, host: str, port: int, **more: Any) -> uvicorn.Config:
    """How uvicorn serves it well: the fast WebSocket protocol, no compression, pings that find dead peers."""
    settings: Settings = app.state.sessions.settings
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        ws=DirectWebSocket,
        ws_per_message_deflate=False,
        ws_max_size=settings.max_frame,
        ws_ping_interval=settings.ping_interval,
        ws_ping_timeout=settings.ping_interval,
        timeout_graceful_shutdown=GRACE_SECONDS,
        access_log=False,
        **more,
    )
