"""What environments raise is in the server's log with its traceback, once for each place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from turnwise import Env, tool
from turnwise.errors import EnvError, EnvSpecError
from turnwise.openenv import Action, Environment, MCPEnvironment, Observation, State, create_app, faults
from turnwise.openenv.typed import TypedEnv


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    faults._counts.clear()
    yield
    faults._counts.clear()


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """By Turnwise: asyncio may have something to say of an earlier test's tasks."""
    return [one for one in caplog.records if one.name.startswith("turnwise")]


class Broken(Environment[Action, Observation, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Observation:
        return Observation()

    def step(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        return {}["no such key"]

    @property
    def state(self) -> State:
        return State()


class Later(Broken):
    async def step_async(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        return self.step(action)


@pytest.mark.parametrize("env", [Broken, Later])
def test_an_authors_error_is_logged_with_its_traceback(env: type, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(env)) as http:
        assert http.post("/step", json={"action": {}}).status_code == 500
        assert f"environment {env.__name__}: step: KeyError" in caplog.text
        assert 'return {}["no such key"]' in caplog.text and __file__ in caplog.text
        caplog.clear()
        http.post("/step", json={"action": {"unknown": 1}})  # The client's mistake.
        assert told(caplog) == []


def test_the_same_error_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        session = await TypedEnv.of(Broken).open()
        for _ in range(99):
            with pytest.raises(EnvError):
                await session.step({})
        assert [len(one.getMessage().splitlines()) > 5 for one in told(caplog)] == [True, False]
        assert "(10 times so far)" in told(caplog)[-1].getMessage()
        with pytest.raises(EnvError):
            await session.step({})
        assert "(100 times so far)" in told(caplog)[-1].getMessage()
        await session.close()

    asyncio.run(play())


def test_places_that_are_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PLACES", 3)
    for n in range(10):
        faults.tell("somewhere", type(f"Odd{n}Error", (Exception,), {})())
        assert len(faults._counts) <= 3


class Shop(Env):
    def reset(self, task: object) -> str:
        if getattr(self, "closed_today", False):
            raise LookupError("no stock")
        return "welcome"

    @tool
    def price(self, item: str) -> int:
        """Look up the price."""
        return {"tea": 3}[item]

    def reward(self) -> float:
        raise ZeroDivisionError("no sales")


def test_what_a_turnwise_environment_raises_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    call = {"type": "call_tool", "tool_name": "price", "arguments": {"item": "tee"}}
    with TestClient(create_app(Shop)) as http:
        assert http.post("/reset").status_code == 200
        for _ in range(9):
            assert http.post("/step", json={"action": call}).json()["observation"]["error"]
        assert len(told(caplog)) == 1
        assert "tool price: KeyError" in caplog.text and 'return {"tea": 3}[item]' in caplog.text
        caplog.clear()
        http.post("/step", json={"action": {"type": "reply", "text": "bye"}})
        assert "reward: ZeroDivisionError" in caplog.text and __file__ in caplog.text
    assert all(one.levelno == logging.WARNING for one in told(caplog))


class ShopClosed(Shop):
    closed_today = True


def test_so_is_what_its_reset_raises(caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(ShopClosed)) as http:
        assert http.post("/reset").status_code == 500
    assert "reset: LookupError: no stock" in caplog.text and __file__ in caplog.text


class Desk(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()

        @self.tool()
        def stamp(page: int) -> str:
            """Stamp a page."""
            raise OSError("no ink")

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Observation:
        return Observation()

    def _step_impl(self, action: Any, timeout_s: float | None = None, **more: Any) -> Observation:
        return Observation()

    @property
    def state(self) -> State:
        return State()


def test_so_is_what_a_tool_written_for_openenv_raises(caplog: pytest.LogCaptureFixture) -> None:
    call = {"type": "call_tool", "tool_name": "stamp", "arguments": {"page": 1}}
    with TestClient(create_app(Desk)) as http:
        http.post("/reset")
        assert http.post("/step", json={"action": call}).json()["observation"]["error"]
    assert "Desk: tool stamp: OSError: no ink" in caplog.text and __file__ in caplog.text


def test_a_factory_that_fails_is_told_as_that(caplog: pytest.LogCaptureFixture) -> None:
    """Never as a class that is not marked; where one session was asked for, it may work by then."""
    tries: list[int] = []

    def make() -> Any:
        tries.append(1)
        raise ConnectionError("the service is not up yet")

    with pytest.raises(EnvError, match="ConnectionError: the service is not up yet") as raised:
        create_app(make, Action, Observation, max_concurrent_envs=8)
    assert isinstance(raised.value.__cause__, ConnectionError) and not isinstance(raised.value, EnvSpecError)
    assert told(caplog) == [] and len(tries) == 1
    for most in (None, 1):
        caplog.clear()
        assert create_app(make, Action, Observation, max_concurrent_envs=most).state.sessions.limit == 1
        assert caplog.text.count("the service is not up yet") == 1
    assert create_app(lambda: Broken(), max_concurrent_envs=8).state.sessions.limit == 8
