"""The page at ``/web``: an episode played by hand in the browser, over the same ``/ws`` as clients.

Plain files of this package, beside this one; the page asks nobody but the server that it came from. It says
nothing about the environment by itself, so it needs no token; what it asks of the server does, and then it
asks its reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

FILES = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page_form.js": "text/javascript; charset=utf-8",
    "page_view.js": "text/javascript; charset=utf-8",
    "page_wire.js": "text/javascript; charset=utf-8",
}
"""What is served, with its type."""

HEADERS = {
    # What an environment says is shown as text; were there a hole, this lets nothing run or leave.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(
    enter: Callable[[Request], Response], *, home: bool, middleware: Sequence[Middleware] = ()
) -> Sequence[BaseRoute]:
    """Routes of the page and its files; their addresses are relative, so a path prefix is no matter.

    Args:
        enter: The answer to the page once it has brought the server's token.
        home: Whether the application's root leads here.
        middleware: Of each route.
    """

    async def entered(request: Request) -> Response:
        return enter(request)

    routes = [
        Route("/web", _page, middleware=middleware),
        Route("/web", entered, methods=["POST"], middleware=middleware),
        Route("/web/", _back, middleware=middleware),
        Route("/web/{name}", _file, middleware=middleware),
    ]
    return [*([Route("/", _to_page)] if home else []), *routes]


async def _page(request: Request) -> Response:
    return _response("page.html")


async def _to_page(request: Request) -> Response:
    return RedirectResponse("web")


async def _back(request: Request) -> Response:
    return RedirectResponse("../web")


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES or name == "page.html":
        return Response("no such file", status_code=404)
    return _response(name)


def _response(name: str) -> Response:
    return Response(_read(name), media_type=FILES[name], headers=HEADERS)


@cache
def _read(name: str) -> bytes:
    return resources.files("turnwise.openenv").joinpath(name).read_bytes()
