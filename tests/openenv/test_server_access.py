"""Who is let in: tokens, origins, sizes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from tests.openenv.serving import Serving, as_app, running
from tests.openenv.written import TYPED, written
from typer.testing import CliRunner
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from turnwise.cli import env_serve
from turnwise.cli.env import app as cli
from turnwise.cli.env_serve import chosen_token
from turnwise.openenv.server.access import loopback
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


def test_a_browser_brings_it_once(server: Serving) -> None:
    with httpx.Client(base_url=server.url) as browser:
        assert browser.get("/web", params={"token": "wrong"}).status_code == 200  # The page asks for it.
        assert browser.get("/metadata").status_code == 401
        entered = browser.get("/web", params={"token": TOKEN, "seed": "1"})
        assert (entered.status_code, entered.headers["location"]) == (303, "/web?seed=1")
        assert "HttpOnly" in entered.headers["set-cookie"]
        assert "samesite=strict" in entered.headers["set-cookie"].lower()
        assert browser.get("/metadata").status_code == 200
        assert browser.get("/metadata", headers={"Origin": "https://evil.example"}).status_code == 403
    # Elsewhere an address gives nobody away.
    assert httpx.get(server.url + "/metadata", params={"token": TOKEN}).status_code == 401


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


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback(host: str, here: bool) -> None:
    assert loopback(host) == here
