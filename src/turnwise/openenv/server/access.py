"""Who may talk to a server: a bearer token, pages of which origins, bodies of what size.

``/health`` answers anybody. A program brings ``Authorization: Bearer TOKEN``. So does the page at ``/web``,
once: it trades the token that its reader types for a cookie (`enter`), since no browser lets a page give a
WebSocket a header, and a token in an address would stay in histories and logs. Over https that cookie is kept
in a frame of another site too (Hugging Face shows a Space in one), in which it serves the page's own requests
alone. A request that names another origin is refused, token or not, so that no page somebody happens to visit
plays here. Where this machine alone connects and no token is asked for, requests must name it by a name of
its own too: a name that somebody points at 127.0.0.1 would make any page this server's own.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnwise.openenv.server.settings import Settings

COOKIE = "turnwise_token"
OPEN = ("/health",)
"""Paths that need no token."""


class Guard:
    """What a server asks of every request.

    Args:
        settings: ``token``, ``origins`` and ``max_frame`` of these.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def refusal(self, scope: Scope) -> Response | None:
        """What a request is refused with; None lets it through."""
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._stranger(scope, headers)
        if refused is None and scope["type"] == "http":
            declared, limit = headers.get(b"content-length", "0"), self.settings.max_frame
            if declared.isascii() and declared.isdigit() and int(declared) > limit:
                return _error(413, f"a body has at most {limit} bytes; found {declared}")
        return refused

    def bounded(self, receive: Receive) -> Receive:
        """``receive``, of a body whose length was not declared no more than may be."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.settings.max_frame:
                return {"type": "http.disconnect"}  # Nobody waits for the rest.
            return message

        return bounded

    def _stranger(self, scope: Scope, headers: dict[bytes, str]) -> Response | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        origin = headers.get(b"origin")
        if origin is not None and not self._own(origin, headers.get(b"host", "")):
            return _error(
                403, f"the origin {origin[:100]} may not talk to this server; allow it in `origins`"
            )
        page = path in ("/", "/web") or path.startswith("/web/")
        token = self.settings.token
        if token is None and _is_local(scope) and path not in OPEN:
            host = headers.get(b"host", "")
            if not self._names_us(host):
                return _error(
                    403, f"the name {host[:100]} is not this server's; allow its origin in `origins`"
                )
            # Requests of pages that bring no Origin: images, scripts, forms that get.
            if origin is None and not page and headers.get(b"sec-fetch-site") == "cross-site":
                return _error(403, "pages of other sites may not talk to this server")
        if token is None or path in OPEN:
            return None
        scheme, _, brought = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(brought.strip(), token):
            return None
        # One of another site brings the cookie too, where both are frames of a third.
        own = origin is not None or headers.get(b"sec-fetch-site", "none") in ("same-origin", "none")
        if own and _same(_cookie(headers.get(b"cookie", "")), token):
            return None
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and page:
            return None  # The page says nothing by itself, and asks for the token.
        refused = _error(
            401, "this server needs a token: Authorization: Bearer …; in a browser /web asks for it"
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


class Access:
    """A `Guard` as an ASGI middleware.

    Args:
        app: What is behind it.
        settings: Of the guard.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.guard = app, Guard(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.guard.refusal(scope)
        if scope["type"] == "http":
            answer = self.app if refusal is None else refusal
            await answer(scope, self.guard.bounded(receive), send)
        elif refusal is None:
            await self.app(scope, receive, send)
        else:
            await _refuse_socket(scope, refusal, receive, send)


def enter(settings: Settings, request: Request) -> Response:
    """The answer to a page that brought the token: its cookie, which no script and no other site can use.

    By https, also as uvicorn has it from ``X-Forwarded-Proto`` of the proxies that it trusts (those of
    ``FORWARDED_ALLOW_IPS``, 127.0.0.1 if not set), browsers keep it in frames too, apart for each site that
    shows one (CHIPS, https://github.com/privacycg/CHIPS). Without https they keep none there.
    """
    entered = Response(status_code=204)
    if settings.token is None:
        return entered
    if request.url.scheme != "https":
        entered.set_cookie(COOKIE, settings.token, httponly=True, samesite="strict")
        return entered
    entered.set_cookie(COOKIE, settings.token, httponly=True, samesite="none", secure=True)
    entered.headers["set-cookie"] += "; Partitioned"  # `http.cookies` knows it from Python 3.14 on.
    return entered


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
