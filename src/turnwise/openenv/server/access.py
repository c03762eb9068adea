"""Who may talk to a server: a bearer token, pages of which origins, bodies of what size.

``/health`` answers anybody. A program brings ``Authorization: Bearer TOKEN``. A browser opens
``/web?token=TOKEN`` once and has a cookie from then on, which pages of other sites cannot use: a request that
names another origin is refused, token or not, so that no page somebody happens to visit plays here.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnwise.openenv.server.settings import Settings

COOKIE = "turnwise_token"
OPEN = ("/health",)
"""Paths that need no token."""
ENTRANCE = ("/web", "/web/", "/")
"""Where a browser may bring its token in the address."""


class Access:
    """An ASGI middleware.

    Args:
        app: What is behind it.
        settings: ``token``, ``origins`` and ``max_frame`` of these.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["type"] == "http":
            await self._bounded(scope, headers, receive, send)
        elif refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await _refuse_socket(scope, refusal, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> Response | None:
        origin = headers.get(b"origin")
        if origin is not None and not self._own(origin, headers.get(b"host", ""), scope):
            return _error(
                403, f"the origin {origin[:100]} may not talk to this server; allow it in `origins`"
            )
        token = self.settings.token
        if token is None or scope["path"] in OPEN:
            return None
        scheme, _, brought = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(brought.strip(), token):
            return None
        if _same(_cookie(headers.get(b"cookie", "")), token):
            return None
        if scope["type"] == "http" and scope["path"] in ENTRANCE:
            query = parse_qs(scope["query_string"].decode("latin-1"))
            if _same(query.pop("token", [""])[-1], token):
                rest = urlencode(query, doseq=True)
                entered = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
                entered.set_cookie(COOKIE, token, httponly=True, samesite="strict")
                return entered
        page = scope["path"] in ENTRANCE or scope["path"].startswith("/web/")
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and page:
            return None  # The page says nothing by itself, and asks for the token.
        refused = _error(
            401, "this server needs a token: Authorization: Bearer …, or /web?token=… in a browser"
        )
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused

    def _own(self, origin: str, host: str, scope: Scope) -> bool:
        if "*" in self.settings.origins or origin in self.settings.origins:
            return True
        if urlsplit(origin).netloc.lower() != host.lower() or not host:
            return False
        # A name that somebody points at 127.0.0.1 makes any page this server's own; on loopback only
        # loopback's names are its own.
        server = scope.get("server")
        return not (server and loopback(server[0])) or loopback(urlsplit(f"//{host}").hostname or "")

    async def _bounded(self, scope: Scope, headers: dict[bytes, str], receive: Receive, send: Send) -> None:
        limit = self.settings.max_frame
        declared = headers.get(b"content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared) > limit:
            await _error(413, f"a body has at most {limit} bytes; found {declared}")(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                return {"type": "http.disconnect"}  # A body of no declared length: nobody waits for it.
            return message

        await self.app(scope, bounded, send)


def loopback(host: str) -> bool:
    """Whether a host is this machine and reached from nowhere else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _refuse_socket(scope: Scope, refusal: Response, receive: Receive, send: Send) -> None:
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        return
    start = {"status": refusal.status_code, "headers": refusal.raw_headers}
    await send({"type": "websocket.http.response.start", **start})
    await send({"type": "websocket.http.response.body", "body": refusal.body})


def _error(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status)


def _same(found: str, token: str) -> bool:
    return hmac.compare_digest(found.encode(), token.encode())


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""
