"""Addresses that hold a password: it is sent where it can be, refused where it would be written down."""

from __future__ import annotations

import asyncio
import base64
import logging
from typing import Any

import pytest
from tests.openenv import foreign
from tests.openenv.serving import running

import turnwise
from turnwise.cli.env_serve import served_as
from turnwise.envs.registry import make, unsigned
from turnwise.errors import EnvSpecError
from turnwise.openenv import GenericEnvClient, MCPToolClient
from turnwise.openenv.client.address import address
from turnwise.openenv.client.env_client import ConnectError
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.validate import Options, validate

SIGNED = f"Basic {base64.b64encode(b'me:s@cret').decode()}"


class Guarded:
    """An application behind HTTP's basic authentication."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        brought = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
        if scope["type"] == "lifespan" or brought == SIGNED:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def test_a_password_is_sent_and_never_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="turnwise")
    with running(Guarded(foreign.guess_app())) as server, running(Guarded(foreign.shop_app())) as shop:
        host = server.url.removeprefix("http://")
        with GenericEnvClient(f"ws://me:s%40cret@{host}").sync() as env:
            assert env.reset(seed=3).observation["text"] == "Guess a number from 0 to 9."
        with MCPToolClient(shop.url.replace("//", "//me:s%40cret@")).sync() as tools:
            tools.reset()
            assert "price" in [tool.name for tool in tools.list_tools()]
        report = asyncio.run(validate(f"http://me:s%40cret@{host}", Options(seconds=5, sessions=2)))
        assert report.target == server.url and report.ok
        with (
            pytest.raises(ConnectError) as wrong,
            GenericEnvClient(f"http://me:s%40hunter2@{host}").sync() as env,
        ):
            env.reset()
    assert "hunter2" not in str(wrong.value) + str(wrong.value.__cause__)
    assert "s%40" not in caplog.text and "s@cret" not in caplog.text


@pytest.mark.parametrize("use", [make, turnwise.connect])
def test_what_recipes_hold_has_none(use: Any) -> None:
    with pytest.raises(EnvSpecError, match=r"http://host:8000 was given with a user or password") as refused:
        use("http://me:s3cret@host:8000")
    assert "s3cret" not in str(refused.value) and "args.headers.Authorization" in str(refused.value)


def test_the_header_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIR", SIGNED.removeprefix("Basic "))
    with running(Guarded(foreign.guess_app())) as server:
        spec = make(server.url, args={"headers": {"Authorization": "Basic $PAIR"}})
        assert [tool.name for tool in spec.tools] == ["guess"]


def test_a_password_and_a_token_are_one_too_many() -> None:
    with pytest.raises(EnvSpecError, match="http://host: a user in the address and a token") as refused:
        address("http://me:s3cret@host", "token")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("http://me:pw@host:80/x", "http://host:80/x"),
        ("me:pw@host", "host"),
        ("http://host/a@b", "http://host/a@b"),
        ("ftp://me:pw@host", "ftp://host"),
        ("http://a:b@c@host", "http://host"),
    ],
)
def test_what_is_told_of_an_address(written: str, told: str) -> None:
    assert unsigned(written) == told


def test_errors_tell_no_password() -> None:
    for wrong in (
        lambda: make("ftp://me:s3cret@host"),
        lambda: address("ftp://me:s3cret@host"),
        lambda: served_as("http://me:s3cret@host", {}, Settings()),
    ):
        with pytest.raises(EnvSpecError) as refused:
            wrong()
        assert "s3cret" not in str(refused.value)
