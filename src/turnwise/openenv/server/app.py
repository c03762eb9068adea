"""`create_server_app`: an environment as a FastAPI application that speaks OpenEnv.

app = create_server_app(hosted("catch"))          # uvicorn module:app
turnwise env serve catch --port 8000              # the same, with the server set up for it
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

from turnwise import images
from turnwise.openenv.page import page_routes
from turnwise.openenv.served import Served
from turnwise.openenv.server.access import Access, Guard, enter
from turnwise.openenv.server.direct import DirectWebSocket
from turnwise.openenv.server.http import about_router, control_router
from turnwise.openenv.server.mcp import Mcp, McpSocket
from turnwise.openenv.server.mcp_route import mcp_router
from turnwise.openenv.server.route import failed, route_class
from turnwise.openenv.server.sessions import Sessions
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.server.socket import Socket
from turnwise.openenv.server.tasks import task_router

GRACE_SECONDS = 5
"""How long requests that run may take to end once the server is told to stop."""
IMAGES_ON_DISK = 1 << 30
"""Bytes of images beyond memory's `turnwise.images.MEMORY`; those of tasks' rows are kept beside."""
API_VERSION = "1.0.0"
"""Of OpenEnv's HTTP API; ``openenv validate`` looks for it in ``/openapi.json``."""


def create_server_app(served: Served, *, settings: Settings | None = None) -> FastAPI:
    """The application; its sessions are ``app.state.sessions``.

    Args:
        served: What it hosts.
        settings: How; the defaults if not given.
    """
    settings = settings or Settings()
    app = FastAPI(title=served.name, version=API_VERSION)
    app.add_middleware(Access, settings=settings)
    app.add_exception_handler(Exception, _failed)
    _add(app, served, settings, own=True)
    return app


def add_routes(app: FastAPI, served: Served, settings: Settings) -> None:
    """Have an application that has routes of its own speak OpenEnv too; those stay as they are."""
    _add(app, served, settings, own=False)


def _add(app: FastAPI, served: Served, settings: Settings, *, own: bool) -> None:
    sessions = Sessions(served, settings)
    around = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        with images.STORE.bounded(disk=IMAGES_ON_DISK):
            try:
                async with around(app) as state:
                    yield state
            finally:
                await sessions.aclose()

    app.router.lifespan_context = lifespan
    app.state.sessions = sessions
    guards = () if own else (Middleware(Access, settings=settings),)
    route = route_class(None if own else Guard(settings))
    mcp = Mcp(sessions)
    app.router.routes += [
        WebSocketRoute("/ws", endpoint=Socket(sessions, mcp), middleware=guards),
        WebSocketRoute("/mcp", endpoint=McpSocket(sessions, mcp), middleware=guards),
    ]
    app.include_router(mcp_router(mcp, route))
    app.include_router(about_router(sessions, route))
    if settings.mode == "simulation":
        app.include_router(control_router(sessions, route))
        app.router.routes.extend(page_routes(partial(enter, settings), home=own, middleware=guards))
        app.include_router(task_router(served, route))


async def _failed(_: Request, error: Exception) -> Response:
    """Whatever nobody else has answered."""
    return failed(error)


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
