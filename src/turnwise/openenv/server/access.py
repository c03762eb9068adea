"""Who may talk to a server: a bearer token, pages of which origins, bodies of what size.

``/health`` answers anybody. A program brings ``Authorization: Bearer TOKEN``. A browser opens
``/web?token=TOKEN`` once and has a cookie from then on, which pages of other sites cannot use: a request that
names another origin is refused, token or not, so that no page somebody happens to visit plays here. Where
this machine alone connects and no token is asked for, requests must name it by a name of its own too: a name
that somebody points at 127.0.0.1 would make any page this server's own.
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
        if origin is not None and not self._own(origin, headers.get(b"host", "")):
            return _error(
                403, f"the origin {origin[:100]} may not talk to this server; allow it in `origins`"
            )
        page = scope["path"] in ENTRANCE or scope["path"].startswith("/web/")
        token = self.settings.token
        if token is None and _is_local(scope) and scope["path"] not in OPEN:
            host = headers.get(b"host", "")
            if not self._names_us(host):
                return _error(
                    403, f"the name {host[:100]} is not this server's; allow its origin in `origins`"
                )
            # Requests of pages that bring no Origin: images, scripts, forms that get.
            if origin is None and not page and headers.get(b"sec-fetch-site") == "cross-site":
                return _error(403, "pages of other sites may not talk to this server")
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
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and page:
            return None  # The page says nothing by itself, and asks for the token.
        refused = _error(
            401, "this server needs a token: Authorization: Bearer …, or /web?token=… in a browser"
        )
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused

    def _own(self, origin: str, host: str) -> bool:
        if "*" in self.settings.origins or origin in self.settings.origins:
            return True
        return bool(host) and _place(origin) == host.lower()

    def _names_us(self, host: str) -> bool:
        """Whether a Host is loopback's or, as behind a proxy, an allowed origin's; programs may send none."""
        allowed = {_place(origin) for origin in self.settings.origins}
        return (
            not host or "*" in self.settings.origins or host.lower() in allowed or loopback(_hostname(host))
        )

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


def _is_local(scope: Scope) -> bool:
    server = scope.get("server")
    return server is not None and loopback(server[0])


def _place(origin: str) -> str:
    return origin.partition("://")[2].lower()


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # A bracket that nothing closes.
        return ""


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
