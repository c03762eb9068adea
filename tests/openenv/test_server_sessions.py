"""Sessions over /ws: how many, who waits, what ends them; frames that are none; order."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from tests.openenv.serving import Serving, as_app, running
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from turnwise.envs.base import Env, tool
from turnwise.openenv.hosted import HostedSpec, hosted
from turnwise.openenv.server import app
from turnwise.openenv.server.sessions import Sessions
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.server.socket import Socket
from turnwise.types import Step


class Counted(Env):
    """Says how many were made and closed."""

    opened = 0
    closed = 0

    def __init__(self) -> None:
        type(self).opened += 1

    def reset(self, task: object) -> str:
        self.said: list[str] = []
        return "go"

    @tool
    async def wait(self, seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    @tool
    def block(self, seconds: float) -> str:
        """Wait on the thread."""
        time.sleep(seconds)
        return "blocked"

    def step(self, reply: str) -> Step:
        self.said.append(reply)
        return Step(" ".join(self.said))

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture(autouse=True)
def none_leaks() -> Iterator[None]:
    Counted.opened = Counted.closed = 0
    yield
    # One that is left in a call is closed when the call returns.
    end = time.monotonic() + 10
    while Counted.opened != Counted.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert Counted.opened == Counted.closed


def serve(spec: Any = Counted, **settings: Any) -> Any:
    return running(as_app(spec, Settings(**settings)))


@asynccontextmanager
async def opened(server: Serving, **more: Any) -> AsyncIterator[ClientConnection]:
    async with connect(f"ws{server.url[4:]}/ws", **more) as ws:
        yield ws


async def ask(ws: ClientConnection, kind: str, data: Any = None) -> dict[str, Any]:
    await ws.send(json.dumps({"type": kind} | ({} if data is None else {"data": data})))
    return await heard(ws)


async def heard(ws: ClientConnection) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(ws.recv(), 60))


async def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.01)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", "INVALID_JSON"),
        ("[" * 3000, "INVALID_JSON"),
        (b"\xff\xfe", "INVALID_JSON"),
        ("[1]", "VALIDATION_ERROR"),
        ('{"type": "reset", "data": {"task": {"a": %s}}}' % ("[" * 700 + "]" * 700), "VALIDATION_ERROR"),
        ("null", "VALIDATION_ERROR"),
        ("{}", "UNKNOWN_TYPE"),
        ('{"type": "jump"}', "UNKNOWN_TYPE"),
        ('{"type": ["step"]}', "UNKNOWN_TYPE"),
        ('{"type": "step"}', "VALIDATION_ERROR"),
        ('{"type": "step", "data": [1]}', "VALIDATION_ERROR"),
        ('{"type": "step", "data": {"text": "a"}, "timeout_s": 1}', "VALIDATION_ERROR"),
        ('{"type": "state", "data": {}}', "VALIDATION_ERROR"),
        ('{"type": "step", "data": {"type": "fly"}}', "VALIDATION_ERROR"),
        ('{"type": "reset", "data": {"sead": 1}}', "VALIDATION_ERROR"),
        ('{"type": "turnwise", "data": {"method": 1}}', "VALIDATION_ERROR"),
        ('{"type": "turnwise", "data": {"method": "x"}}', "VALIDATION_ERROR"),
        ('{"type": "turnwise", "data": {"method": "teacher", "messages": []}}', "EXECUTION_ERROR"),
    ],
)
def test_a_bad_frame_is_answered_and_the_session_goes_on(frame: str | bytes, code: str) -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            assert (await ask(ws, "reset"))["type"] == "observation"
            await ws.send(frame)
            reply = await heard(ws)
            assert (reply["type"], reply["data"]["code"]) == ("error", code)
            assert reply["data"]["message"]
            assert (await ask(ws, "step", {"text": "on"}))["data"]["observation"]["text"] == "on"

    with serve() as server:
        asyncio.run(play(server))


def test_requests_sent_at_once_are_answered_in_order() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ask(ws, "reset")
            for number in range(50):
                await ws.send(json.dumps({"type": "step", "data": {"text": str(number)}}))
            for number in range(50):
                seen = (await heard(ws))["data"]["observation"]["text"]
                assert seen.split() == [str(one) for one in range(number + 1)]

    with serve() as server:
        asyncio.run(play(server))


def test_a_close_frame_is_answered_by_the_socket_alone() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ws.send('{"type": "close"}')
            with pytest.raises(ConnectionClosed) as closed:
                await heard(ws)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000
            await until(lambda: not server.sessions.live)

    with serve() as server:
        asyncio.run(play(server))


def test_who_finds_all_sessions_taken_waits_for_one() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as first:
            await ask(first, "reset")
            async with opened(server) as second:
                waiting = asyncio.ensure_future(ask(second, "reset"))
                await until(lambda: server.sessions.waiting == 1)
                assert not waiting.done()
                await first.close()
                assert (await waiting)["type"] == "observation"

    with serve(max_sessions=1) as server:
        asyncio.run(play(server))


def test_who_leaves_the_queue_loses_their_place() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as first:
            await ask(first, "reset")
            async with opened(server):
                await until(lambda: server.sessions.waiting == 1)
            await until(lambda: server.sessions.waiting == 0)
            assert Counted.opened - Counted.closed == 1

    with serve(max_sessions=1) as server:
        asyncio.run(play(server))


def test_a_full_queue_and_a_long_wait_are_refused_and_said() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as first:
            await ask(first, "reset")
            async with opened(server) as second, opened(server) as third:
                refused = await heard(third)
                assert refused["data"]["code"] == "CAPACITY_REACHED"
                assert (refused["data"]["active_sessions"], refused["data"]["max_sessions"]) == (1, 1)
                with pytest.raises(ConnectionClosed):
                    await heard(third)
                late = await heard(second)
                assert late["data"]["code"] == "CAPACITY_REACHED" and "0.3 s" in late["data"]["message"]
            assert (await ask(first, "state"))["type"] == "state"

    with serve(max_sessions=1, queue=1, queue_seconds=0.3) as server:
        asyncio.run(play(server))


def test_idle_sessions_end_with_their_socket() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as idle, opened(server) as busy:
            await ask(idle, "reset")
            # Both at once, so that it is not idle in between.
            for kind, data in (("reset", {}), ("step", call("wait", seconds=3.0))):
                await busy.send(json.dumps({"type": kind, "data": data}))
            told = await heard(idle)
            assert told["data"]["code"] == "SESSION_ERROR" and "idle" in told["data"]["message"]
            with pytest.raises(ConnectionClosed):
                await heard(idle)
            await heard(busy)
            assert (await heard(busy))["data"]["observation"]["result"] == "waited"

    with serve(idle_timeout=1.3) as server:
        asyncio.run(play(server))


def test_a_half_open_socket_is_found() -> None:
    """A peer that says nothing at all, not even that it is gone."""

    async def play(server: Serving) -> None:
        made = Counted.opened
        host, port = server.url[7:].split(":")
        silent = socket.create_connection((host, int(port)))
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        silent.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        # It may be found between two looks.
        await until(lambda: Counted.opened > made)
        await until(lambda: Counted.closed == Counted.opened and not server.sessions.live)
        silent.close()

    with serve(ping_interval=0.2) as server:
        asyncio.run(play(server))


def test_a_slow_call_neither_loses_its_socket_nor_keeps_pings_from_being_answered() -> None:
    """A second request waits behind a call that takes longer than pings do."""

    async def play(server: Serving) -> None:
        async with opened(server, ping_interval=0.5, ping_timeout=4.0) as ws:
            await ask(ws, "reset")
            await ws.send(json.dumps({"type": "step", "data": call("wait", seconds=7.5)}))
            await ws.send(json.dumps({"type": "step", "data": {"text": "next"}}))
            assert (await heard(ws))["data"]["observation"]["result"] == "waited"
            assert (await heard(ws))["data"]["observation"]["text"] == "next"

    with serve(ping_interval=3.5) as server:
        asyncio.run(play(server))


@pytest.mark.parametrize("how", ["wait", "block"])
def test_a_client_that_leaves_a_slow_call_is_noticed(how: str) -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ask(ws, "reset")
            # What blocks a thread cannot be stopped.
            await ws.send(
                json.dumps({"type": "step", "data": call(how, seconds=3 if how == "block" else 300)})
            )
            await asyncio.sleep(0.1)
        await until(lambda: not server.sessions.live)

    with serve() as server:
        asyncio.run(play(server))


def test_too_many_requests_behind_a_slow_call_end_the_session() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ask(ws, "reset")
            await ws.send(json.dumps({"type": "step", "data": call("wait", seconds=30.0)}))
            for _ in range(20):
                await ws.send(json.dumps({"type": "state"}))
            told = await heard(ws)
            assert told["data"]["code"] == "SESSION_ERROR" and "more than 8" in told["data"]["message"]
            with pytest.raises(ConnectionClosed):
                await heard(ws)
        await until(lambda: not server.sessions.live)

    with serve(max_ahead=8) as server:
        asyncio.run(play(server))


def test_too_many_requests_end_the_call_before_them_though_the_client_answers_no_close() -> None:
    async def play() -> None:
        sessions = Sessions(hosted(Counted), Settings(max_ahead=2))
        inbox: asyncio.Queue[Any] = asyncio.Queue()  # Nothing more comes of it, not even a disconnect.
        inbox.put_nowait({"type": "websocket.connect"})
        waiting = {"type": "step", "data": call("wait", seconds=30.0)}
        for request in ({"type": "reset"}, waiting, *[{"type": "state"}] * 4):
            inbox.put_nowait({"type": "websocket.receive", "text": json.dumps(request)})
        sent: list[Any] = []

        async def send(event: Any) -> None:
            sent.append(event)

        await asyncio.wait_for(Socket(sessions)({"type": "websocket"}, inbox.get, send), 10)
        assert [event["type"] for event in sent] == [
            "websocket.accept", "websocket.send", "websocket.send", "websocket.close"
        ]  # fmt: skip
        assert sent[-1]["code"] == 1008 and not sessions.live

    asyncio.run(play())


def test_slow_constructors_stall_nobody() -> None:
    takes_its_time, free = threading.Event(), threading.Event()
    began: list[bool] = []
    freed: list[bool] = []

    class Slow(Counted):
        def __init__(self) -> None:
            super().__init__()
            if takes_its_time.is_set():
                began.append(True)
                freed.append(free.wait(20))

    async def play(server: Serving) -> None:
        async with opened(server) as quick:
            await ask(quick, "reset")
            takes_its_time.set()
            async with opened(server) as slow:
                opening = asyncio.ensure_future(ask(slow, "reset"))
                await until(lambda: began)
                for _ in range(20):
                    await ask(quick, "step", {"text": "x"})
                assert not opening.done()
                free.set()
                assert (await opening)["type"] == "observation"
                assert freed == [True]

    Slow.opened = Slow.closed = 0
    with serve(Slow) as server:
        asyncio.run(play(server))
    assert Slow.opened == Slow.closed


def test_a_constructor_that_raises_is_a_factory_error() -> None:
    class Broken(Counted):
        def __init__(self) -> None:
            raise ValueError("no licence")

    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            told = await heard(ws)
            assert told["data"]["code"] == "FACTORY_ERROR" and "no licence" in told["data"]["message"]
            with pytest.raises(ConnectionClosed):
                await heard(ws)
        assert server.sessions._taken == 0

    with serve(Broken) as server:
        asyncio.run(play(server))


def test_sessions_opened_and_dropped_leave_nothing() -> None:
    async def drop(server: Serving, how: int) -> None:
        ws = await connect(f"ws{server.url[4:]}/ws")
        if how % 3:
            await ask(ws, "reset")
        if how % 3 == 2:
            await ws.send(json.dumps({"type": "step", "data": call("wait", seconds=0.2)}))
        ws.transport.abort()

    async def play(server: Serving) -> None:
        for start in range(0, 200, 50):
            await asyncio.gather(*(drop(server, how) for how in range(start, start + 50)))
        await until(lambda: server.sessions._taken == 0, seconds=15)
        await until(lambda: Counted.opened == Counted.closed, seconds=15)
        assert Counted.opened > 100

    with serve(max_sessions=64) as server:
        asyncio.run(play(server))


def test_a_thousand_at_once_all_get_one() -> None:
    async def play(server: Serving) -> None:
        async def one() -> str:
            async with opened(server, open_timeout=60, compression=None) as ws:
                text: str = (await ask(ws, "reset"))["data"]["observation"]["text"]
                await everybody.wait()
                return text

        everybody = asyncio.Event()
        tasks = [asyncio.ensure_future(one()) for _ in range(1000)]
        await until(lambda: len(server.sessions.live) == 1000, seconds=60)
        everybody.set()
        assert await asyncio.gather(*tasks) == ["say it"] * 1000

    class Say(Env):
        inline = True

        def reset(self, task: object) -> str:
            return "say it"

        def step(self, reply: str) -> Step:
            return Step(reply, terminated=True)

    with serve(Say) as server:
        asyncio.run(play(server))


def test_requests_over_the_rate_are_slowed_down() -> None:
    async def play(server: Serving) -> float:
        async with opened(server) as ws:
            await ask(ws, "reset")
            started = time.monotonic()
            for _ in range(30):
                await ask(ws, "state")
            return time.monotonic() - started

    with serve(rate=20.0) as server:
        taken = [asyncio.run(play(server)) for _ in range(3)]
    assert 0.4 < min(taken) < 3  # The machine may have paused in one of them.


def test_a_frame_that_is_too_big_ends_the_session() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ask(ws, "reset")
            await ws.send(json.dumps({"type": "step", "data": {"text": "x" * 5000}}))
            with pytest.raises(ConnectionClosed) as closed:
                await heard(ws)
            assert closed.value.sent is not None and closed.value.sent.code == 1009
        await until(lambda: not server.sessions.live)

    with serve(max_frame=4096) as server:
        asyncio.run(play(server))


def test_a_server_that_stops_waits_for_no_slow_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Serving) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            named = {"episode_id": "e"}
            await client.post("/reset", json=named)
            act = {**named, "action": call("wait", seconds=30.0)}
            asking = asyncio.ensure_future(client.post("/step", json=act))
            await asyncio.sleep(0.3)
            server.server.should_exit = True
            await asyncio.wait([asking], timeout=15)
            assert asking.done()

    monkeypatch.setattr(app, "GRACE_SECONDS", 0.2)
    with serve() as server:
        asyncio.run(play(server))


def test_a_server_that_stops_opens_no_more() -> None:
    free = threading.Event()

    class Late(Counted):
        def __init__(self) -> None:
            super().__init__()
            free.wait(60)

    async def nobody(_: str) -> None:
        """Is told nothing."""

    async def play() -> None:
        sessions = Sessions(hosted(Late), Settings())
        opening = asyncio.ensure_future(sessions.open(evict=nobody))
        await until(lambda: Late.opened == 1)
        await sessions.aclose()
        await asyncio.wait([opening], timeout=20)
        assert opening.cancelled() and sessions._taken == 0
        free.set()
        await until(lambda: Late.closed == 1)

    Late.opened = Late.closed = 0
    asyncio.run(play())


def test_an_application_whose_own_end_fails_closes_what_is_open() -> None:
    @asynccontextmanager
    async def broken(_: FastAPI) -> AsyncIterator[None]:
        yield
        raise ValueError("no end")

    host = FastAPI(lifespan=broken)
    app.add_routes(host, hosted(Counted), Settings())
    with pytest.raises(ValueError, match="no end"), TestClient(host) as client:
        assert client.post("/reset").status_code == 200
    assert not host.state.sessions.live


def test_a_server_that_stops_closes_what_is_open() -> None:
    async def play(server: Serving) -> None:
        async with opened(server) as ws:
            await ask(ws, "reset")
            server.server.should_exit = True
            with pytest.raises(ConnectionClosed):
                await heard(ws)

    with serve() as server:
        asyncio.run(play(server))


def test_one_that_is_made_just_as_its_client_leaves_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its last line and that of whoever waits for it, the loop may have another turn to do."""

    async def nobody(_: str) -> None:
        """Is told nothing."""

    async def play() -> None:
        sessions = Sessions(hosted(Counted), Settings(max_sessions=1))
        opening = asyncio.ensure_future(sessions.open(evict=nobody))
        made = HostedSpec.open

        async def leave(self: HostedSpec) -> Any:
            session = await made(self)
            asyncio.get_running_loop().call_soon(opening.cancel)
            return session

        with monkeypatch.context() as patched:
            patched.setattr(HostedSpec, "open", leave)
            with pytest.raises(asyncio.CancelledError):
                await opening
        assert (Counted.opened, Counted.closed) == (1, 1)
        await sessions.close(await sessions.open(evict=nobody))  # Its place is free again.
        await sessions.aclose()

    Counted.opened = Counted.closed = 0
    asyncio.run(play())
