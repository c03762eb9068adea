"""Who is let in: tokens, origins, sizes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse
from tests.openenv.serving import Serving, as_app, running
from tests.openenv.written import TYPED, written
from typer.testing import CliRunner
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from turnwise.cli import env_serve
from turnwise.cli.env import app as cli
from turnwise.cli.env_serve import chosen_token
from turnwise.errors import EnvError
from turnwise.openenv.hosted import hosted
from turnwise.openenv.server.access import loopback
from turnwise.openenv.server.app import add_routes
from turnwise.openenv.server.create import create_app
from turnwise.openenv.server.settings import Settings

TOKEN = "sesame"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    settings = Settings(token=TOKEN, origins=("https://play.example",), max_frame=1000)
    with running(as_app("echo", settings)) as server:
        yield server


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", ["/metadata", "/schema", "/state", "/docs", "/openapi.json", "/echo/splits"])
def test_all_but_health_needs_the_token(server: Serving, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + path, headers=bearer("open")).status_code == 401
    assert httpx.get(server.url + path, headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
    assert httpx.get(server.url + path, headers=bearer()).status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200


def test_posts_need_it_too(server: Serving) -> None:
    for path in ("/reset", "/step", "/mcp", "/nowhere"):
        assert httpx.post(server.url + path, json={}).status_code == 401
    assert httpx.post(server.url + "/reset", headers=bearer()).status_code == 200


def upgrade(server: Serving, **headers: str) -> str:
    async def play() -> str:
        try:
            named = {name.capitalize(): value for name, value in headers.items()}
            async with connect(f"ws{server.url[4:]}/ws", additional_headers=named, proxy=None) as ws:
                await ws.send(json.dumps({"type": "reset"}))
                return str(json.loads(await ws.recv())["type"])
        except InvalidStatus as refused:
            return str(refused.response.status_code)

    return asyncio.run(play())


def test_sockets_need_it_too(server: Serving) -> None:
    assert upgrade(server) == "401"
    assert upgrade(server, authorization="Bearer wrong") == "401"
    assert upgrade(server, authorization=f"Bearer {TOKEN}") == "observation"


def test_a_page_brings_it_once_and_in_a_header(server: Serving) -> None:
    with httpx.Client(base_url=server.url) as browser:
        assert browser.get("/web").status_code == 200  # The page asks for it.
        assert browser.post("/web", headers=bearer("wrong")).status_code == 401
        assert browser.get("/metadata").status_code == 401
        entered = browser.post("/web", headers=bearer())
        assert entered.status_code == 204
        assert "HttpOnly" in entered.headers["set-cookie"]
        assert "samesite=strict" in entered.headers["set-cookie"].lower()
        assert browser.get("/metadata").status_code == 200
        assert browser.get("/metadata", headers={"Origin": "https://evil.example"}).status_code == 403


def test_over_https_the_cookie_is_kept_in_frames_of_other_sites(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cookie(server: Serving) -> str:
        headers = {**bearer(), "X-Forwarded-Proto": "https"}
        return httpx.post(f"{server.url}/web", headers=headers).headers["set-cookie"].lower()

    for attribute in ("httponly", "samesite=none", "secure", "partitioned"):
        assert f"; {attribute}" in cookie(server)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")  # Not whom this comes from.
    with running(as_app("echo", Settings(token=TOKEN))) as wary:
        assert "samesite=strict" in cookie(wary) and "secure" not in cookie(wary)


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("same-site", 401), ("cross-site", 401)]
)
def test_the_cookie_serves_the_pages_own_requests_alone(server: Serving, site: str, status: int) -> None:
    """Images and links name no origin, and bring it where two frames of one page are of different sites."""
    brought = {"Cookie": f"turnwise_token={TOKEN}", "Sec-Fetch-Site": site}
    assert httpx.get(f"{server.url}/state", headers=brought).status_code == status


@pytest.mark.parametrize("path", ["/web", "/web/", "/", "/metadata", "/ws"])
def test_an_address_holds_no_token(server: Serving, path: str) -> None:
    """Those stay in histories and in the logs of proxies."""
    answer = httpx.get(server.url + path, params={"token": TOKEN})
    assert "set-cookie" not in answer.headers
    assert httpx.get(f"{server.url}/metadata", params={"token": TOKEN}).status_code == 401


def hosting(**given: Any) -> FastAPI:
    """An application with routes of its own, some of them added later, that speaks OpenEnv too."""
    host = FastAPI()

    @host.get("/")
    async def home() -> str:
        return "the host's"

    add_routes(host, hosted("catch"), Settings(**given))

    @host.post("/orders/tasks/{number}")
    async def order(number: int, body: dict[str, str]) -> str:
        if number < 0:
            raise EnvError("the host's own failure")
        if number == 0:
            raise ZeroDivisionError
        return body["text"]

    @host.exception_handler(EnvError)
    async def told(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"I heard: {error}", 418)

    @host.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse({"host": True, "detail": error.errors()}, 422)

    @host.websocket("/chat")
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("welcome")

    return host


def test_an_application_that_has_routes_of_its_own_keeps_them_as_they_are() -> None:
    evil = {"Origin": "https://evil.example"}
    with TestClient(hosting(token=TOKEN, max_frame=100), raise_server_exceptions=False) as http:
        assert http.get("/", headers=evil).json() == "the host's"
        assert http.post("/orders/tasks/1", json={"text": "x" * 200}).json() == "x" * 200
        assert http.post("/orders/tasks/-1", json={}).text == "I heard: the host's own failure"
        wrong = http.post("/orders/tasks/one", json={}).json()
        assert wrong["detail"][0]["type"] == "int_parsing" and "host" in wrong
        assert http.post("/orders/tasks/0", json={}).text == "Internal Server Error"
        assert http.get("/openapi.json").status_code == 200
        assert http.get("/nowhere").status_code == 404
        with http.websocket_connect("/chat") as socket:
            assert socket.receive_text() == "welcome"


def test_in_another_application_our_routes_are_guarded_all_the_same() -> None:
    with TestClient(hosting(token=TOKEN, max_frame=100), raise_server_exceptions=False) as http:
        for method, path in (
            ("GET", "/metadata"), ("GET", "/schema"), ("POST", "/reset"), ("POST", "/step"),
            ("GET", "/state"), ("POST", "/mcp"), ("POST", "/catch/tasks"), ("POST", "/web"),
        ):  # fmt: skip
            assert http.request(method, path, json={}).status_code == 401, path
        assert http.get("/health").status_code == http.get("/web").status_code == 200
        for path in ("/ws", "/mcp"):
            with pytest.raises(WebSocketDenialResponse) as refused, http.websocket_connect(path):
                pass
            assert refused.value.status_code == 401
        assert http.post("/reset", headers=bearer()).status_code == 200
        assert http.post("/reset", json={"sead": 1}, headers=bearer()).status_code == 422
        assert http.post("/step", json={"action": {"text": "x" * 200}}, headers=bearer()).status_code == 413
        streamed = http.post("/step", content=iter([b'{"action": ', b" " * 200, b"{}}"]), headers=bearer())
        assert streamed.status_code == 400
        with http.websocket_connect("/ws", headers=bearer()) as socket:
            socket.send_json({"type": "reset"})
            assert socket.receive_json()["type"] == "observation"


@pytest.mark.parametrize(
    ("origin", "let_in"),
    [
        ("{url}", True),
        ("https://play.example", True),
        ("https://evil.example", False),
        ("null", False),
        ("http://127.0.0.1:1", False),
    ],
)
def test_pages_of_other_sites_are_refused(server: Serving, origin: str, let_in: bool) -> None:
    origin = origin.format(url=server.url)
    answer = httpx.get(server.url + "/metadata", headers={**bearer(), "Origin": origin})
    assert answer.status_code == (200 if let_in else 403)
    assert upgrade(server, authorization=f"Bearer {TOKEN}", origin=origin) == (
        "observation" if let_in else "403"
    )


@pytest.fixture(scope="module")
def tokenless() -> Iterator[Serving]:
    with running(as_app("echo", Settings(origins=("https://play.example",)))) as server:
        yield server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),  # A page's own GETs name no origin.
        ({"Host": "[evil"}, 403),
        ({"Origin": "http://[evil"}, 403),
        ({"Host": "play.example"}, 200),  # As a proxy on this machine passes it on.
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://play.example"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_a_name_that_points_here_makes_no_page_ours(
    tokenless: Serving, headers: dict[str, str], status: int
) -> None:
    """DNS rebinding: the browser thinks that the page and the server are one."""
    assert httpx.get(tokenless.url + "/metadata", headers=headers).status_code == status


def test_a_link_leads_to_the_page(tokenless: Serving) -> None:
    answer = httpx.get(tokenless.url + "/web", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200


def test_behind_a_proxy_on_this_machine_the_token_opens_to_its_own_page(server: Serving) -> None:
    headers = {"Host": "envs.example", "Origin": "https://envs.example"}
    assert httpx.get(server.url + "/metadata", headers={**bearer(), **headers}).status_code == 200
    assert httpx.get(server.url + "/metadata", headers=headers).status_code == 401


def test_a_body_that_is_too_big_is_refused(server: Serving) -> None:
    big = {"action": {"text": "x" * 2000}}
    assert httpx.post(server.url + "/step", json=big, headers=bearer()).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'{"action": {"text": "'
        for _ in range(100):
            yield b"x" * 100
        yield b'"}}'

    streamed = httpx.post(server.url + "/step", content=chunks(), headers=bearer())
    assert streamed.status_code in (400, 413)


def test_where_other_machines_connect_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURNWISE_TOKEN", raising=False)
    assert chosen_token("127.0.0.1", None) is None
    assert len(chosen_token("0.0.0.0", None) or "") > 20
    assert chosen_token("0.0.0.0", "none") is None
    assert chosen_token("127.0.0.1", "mine") == "mine"
    monkeypatch.setenv("TURNWISE_TOKEN", "kept")
    assert chosen_token("0.0.0.0", None) == "kept"


@pytest.mark.parametrize(("said", "token"), [(None, None), ("", None), ("none", None), ("sesame", "sesame")])
def test_an_application_takes_its_token_from_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, said: str | None, token: str | None
) -> None:
    monkeypatch.delenv("TURNWISE_TOKEN", raising=False)
    if said is not None:
        monkeypatch.setenv("TURNWISE_TOKEN", said)
    module = written(TYPED, "ours")
    assert create_app(module.Guessing, module.Guess, module.Told).state.sessions.settings.token == token


def test_the_command_lets_origins_in(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Settings] = {}
    monkeypatch.setattr(env_serve, "serve", lambda spec, *, settings, **more: given.update({spec: settings}))
    command = ["serve", "echo", "--origin", "https://a.example", "--origin", "https://b.example"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert given["echo"].origins == ("https://a.example", "https://b.example")


def test_the_command_serves_agents_alone_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def run(server: env_serve.Server) -> None:
        made.append(server.config.app)
        server._listening(8000)

    monkeypatch.setattr(env_serve.Server, "run", run)
    for mode, status in (("simulation", 200), ("production", 404)):
        told = CliRunner().invoke(cli, ["serve", "catch", "--mode", mode])
        assert ("/web" in told.stdout) == (mode == "simulation")
        assert ("agents connect to http://127.0.0.1:8000/mcp" in told.stdout) == (mode == "production")
        with TestClient(made.pop(), base_url="http://localhost") as http:
            assert http.post("/reset").status_code == http.get("/state").status_code == status
            listed = http.post("/mcp", json={"jsonrpc": "2.0", "method": "tools/list", "id": 1}).json()
            assert listed["result"]["tools"][0]["name"] == "move"
            assert http.get("/health").status_code == http.get("/schema").status_code == 200
    assert CliRunner().invoke(cli, ["serve", "catch", "--mode", "training"]).exit_code == 2


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback(host: str, here: bool) -> None:
    assert loopback(host) == here
