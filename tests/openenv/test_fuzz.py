"""What comes is arbitrary: no 500 but the environment's own, one reply to each request, no session left.

Requests are drawn from the server's OpenAPI description by schemathesis, frames and bytes by hypothesis.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.openenv.serving import Serving, as_app, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from turnwise.envs import Env, Step, tool
from turnwise.openenv import models
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.typed import TypedEnv

FUZZ = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
CODES = {"INVALID_JSON", "UNKNOWN_TYPE", "VALIDATION_ERROR", "EXECUTION_ERROR"}
"""After these a session goes on."""


class Shop(Env):
    """Says by its words when a failure is its own."""

    def tasks(self, split):
        return [{"item": split}, {"item": "tea"}]

    def reset(self, task):
        return f"Buy {task.get('item', 'what you like')}."

    def step(self, reply: str) -> Step:
        if reply == "fail":
            raise RuntimeError("my own failure")
        return Step(reply, reward=1.0, terminated=reply == "end")

    @tool
    def buy(self, item: str, count: int = 1, how: Literal["fast", "slow"] = "fast") -> dict[str, Any]:
        """Buy something."""
        if item == "fail":
            raise RuntimeError("my own failure")
        return {"item": item, "count": count, "how": how}

    @tool
    def leave(self) -> Step:
        """Go."""
        return Step("bye", terminated=True)


class Move(models.Action):
    to: Literal["left", "right"]
    far: float = 1.0


class Seen(models.Observation):
    at: float


class Line:
    """Written for OpenEnv."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    at = 0.0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Seen:
        self.at = 0.0
        return Seen(at=0.0)

    def step(self, action: Move, timeout_s: float | None = None, **_: Any) -> Seen:
        self.at += action.far if action.to == "right" else -action.far
        return Seen(at=self.at)

    @property
    def state(self) -> models.State:
        return models.State(step_count=0)

    def close(self) -> None: ...


SERVED = {"ours": lambda: Shop, "typed": lambda: TypedEnv(Line, Move, Seen)}


@pytest.fixture(scope="module", params=SERVED)
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    app = as_app(SERVED[request.param](), Settings(max_frame=100_000, max_sessions=64, idle_timeout=8.0))
    with running(app) as server:
        yield server
        # Whatever happened: nobody comes back over HTTP, and sockets' sessions went with them.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.sessions.live:
            time.sleep(0.05)
        assert not server.sessions.live and server.sessions.waiting == 0


# -- frames ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS = st.sampled_from(["reset", "step", "state", "mcp", "turnwise"])
RESET = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**70) | JSON,
        "episode_id": st.text(max_size=300) | JSON,
        "split": st.sampled_from(["train", "test", "dev"]) | JSON,
        "index": st.integers(-3, 3) | JSON,
        "task": st.fixed_dictionaries({"item": JSON}) | JSON,
    },
)
ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"item": st.sampled_from(["tea", "fail"]) | JSON, "count": JSON, "how": JSON, "x": JSON}
)
STEP = st.one_of(
    st.fixed_dictionaries({"type": st.just("reply"), "text": st.sampled_from(["a", "end", "fail"]) | JSON}),
    st.fixed_dictionaries(
        {
            "type": st.just("call_tool"),
            "tool_name": st.sampled_from(["buy", "leave", "none"]) | JSON,
            "arguments": ARGUMENTS | JSON,
        }
    ),
    st.just({"type": "list_tools"}),
    st.fixed_dictionaries({"to": st.sampled_from(["left", "right", "up"]), "far": JSON}),
    JSON,
)
RPC = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON,
        "id": JSON,
        "method": st.sampled_from(
            ["initialize", "ping", "tools/list", "tools/call", "openenv/session/create", "notifications/x"]
        )
        | JSON,
        "params": st.fixed_dictionaries({"name": st.sampled_from(["buy"]) | JSON, "arguments": ARGUMENTS})
        | JSON,
    },
)
ASK = st.fixed_dictionaries(
    {"method": st.sampled_from(["reward", "teacher", "state_key", "close"]) | JSON},
    optional={"messages": JSON},
)
REQUESTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("reset")}, optional={"data": RESET}),
    st.fixed_dictionaries({"type": st.just("step"), "data": STEP}),
    st.fixed_dictionaries({"type": st.just("turnwise"), "data": ASK}),
    st.fixed_dictionaries({"type": st.just("mcp"), "data": RPC}),
    st.fixed_dictionaries({"type": KINDS | JSON}, optional={"data": JSON, "extra": JSON}),
    JSON,
)


def said(frame: str | bytes) -> dict[str, Any]:
    """The request that a frame is; empty where it is none."""
    try:
        request = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}


FRAMES = st.one_of(
    REQUESTS.map(json.dumps),
    REQUESTS.map(lambda frame: json.dumps(frame).encode()),
    st.tuples(REQUESTS.map(json.dumps), st.integers(0, 40)).map(lambda pair: pair[0][: pair[1]]),
    st.text(max_size=40),
    st.binary(max_size=40),
    st.integers(100, 5000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 30_000).map(lambda size: json.dumps({"type": "step", "data": {"text": "a" * size}})),
).filter(lambda frame: said(frame).get("type") != "close")
"""None ends the session; hypothesis also draws literals of the code that it tests, and that is one."""


def ask(ws: ClientConnection, frame: str | bytes) -> dict[str, Any]:
    ws.send(frame)
    return json.loads(ws.recv(timeout=30))


def owes_nothing(frame: str | bytes) -> bool:
    """A JSON-RPC notification gets no answer."""
    request = said(frame)
    data = request.get("data") if request.get("type") == "mcp" else None
    return isinstance(data, dict) and "id" not in data


@settings(FUZZ, max_examples=150)
@given(frames=st.lists(FRAMES, min_size=1, max_size=12))
def test_each_frame_has_one_reply_and_the_session_goes_on(server: Serving, frames: list[str | bytes]) -> None:
    with connect(f"ws{server.url.removeprefix('http')}/ws", max_size=None) as ws:
        for frame in frames:
            ws.send(frame)
            # What is asked next is answered next: a reply too many or too few would be seen here.
            ws.send('{"type": "state"}')
            reply = json.loads(ws.recv(timeout=30))
            if not (owes_nothing(frame) and reply["type"] == "state"):
                following = json.loads(ws.recv(timeout=30))
                assert following["type"] == "state", (frame, reply, following)
            if reply["type"] == "error":
                assert reply["data"]["code"] in CODES and reply["data"]["message"], (frame, reply)
                if reply["data"]["code"] == "EXECUTION_ERROR":
                    # The environment's: its own failure, or that it has no teacher and no state key.
                    assert re.search("my own failure|define (teacher|state_key)", reply["data"]["message"])
            else:
                assert reply["type"] in ("observation", "state", "mcp", "turnwise"), (frame, reply)
        assert ask(ws, '{"type": "reset", "data": {"seed": 1}}')["type"] == "observation"


@settings(FUZZ, max_examples=40)
@given(frames=st.lists(REQUESTS.map(json.dumps), min_size=1, max_size=30), half=st.booleans())
def test_a_client_that_asks_and_leaves_leaves_nothing(server: Serving, frames: list[str], half: bool) -> None:
    """Many requests ahead, no answer read, gone: politely or not."""
    with connect(f"ws{server.url.removeprefix('http')}/ws", max_size=None) as ws:
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                ws.send(frame)
        if half:
            with contextlib.suppress(OSError):
                ws.socket.shutdown(socket.SHUT_RDWR)


@settings(FUZZ, max_examples=60)
@given(junk=st.binary(min_size=1, max_size=200), masked=st.booleans())
def test_bytes_that_are_no_websocket_end_the_socket_alone(server: Serving, junk: bytes, masked: bool) -> None:
    with (
        connect(f"ws{server.url.removeprefix('http')}/ws") as ws,
        contextlib.suppress(ConnectionClosed, OSError),
    ):
        ws.socket.sendall((b"\x81" + bytes([0x80 | min(len(junk), 125)]) if masked else b"") + junk)
        ws.socket.shutdown(socket.SHUT_WR)
        ws.recv(timeout=30)
    assert httpx.get(f"{server.url}/health").json() == {"status": "healthy"}


def test_a_frame_that_is_too_big_ends_its_socket_alone(server: Serving) -> None:
    with connect(f"ws{server.url.removeprefix('http')}/ws") as ws:
        assert ask(ws, '{"type": "reset"}')["type"] == "observation"
        ws.send(json.dumps({"type": "step", "data": {"text": "a" * 200_000}}))
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                ws.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    assert httpx.post(f"{server.url}/reset", content=b"[" + b"1," * 100_000 + b"1]").status_code == 413


# -- HTTP --------------------------------------------------------------------------------------------

BODIES = st.one_of(
    st.fixed_dictionaries({}, optional={"action": STEP, "timeout_s": JSON, "episode_id": JSON, "x": JSON}),
    RESET,
    RPC,
    JSON,
).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=60)
TYPES = st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
PATHS = st.sampled_from(
    ["/reset", "/step", "/mcp", "/shop/tasks", "/shop/task", "/shop/task_range", "/web/x"]
)
METHODS = st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS"])


@pytest.fixture(scope="module")
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@settings(FUZZ, max_examples=300)
@given(method=METHODS, path=PATHS, body=BODIES, kind=TYPES)
def test_any_body_is_answered(http: httpx.Client, method: str, path: str, body: bytes, kind: str) -> None:
    answer = http.request(method, path, content=body, headers={"content-type": kind} if kind else {})
    told = answer.text
    # Not there, not allowed, no tasks: 501 is the Task API's own word for that.
    assert answer.status_code < 500 or answer.status_code == 501 or "my own failure" in told, told
    if path == "/mcp" and method == "POST" and answer.content:
        rpc = answer.json()
        assert rpc["jsonrpc"] == "2.0" and ("result" in rpc) != ("error" in rpc)


@pytest.mark.slow
def test_requests_made_from_the_servers_own_description(server: Serving) -> None:
    """Every operation of ``/openapi.json``: what it answers is what the description says."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in description.get_all_operations()]
    assert {"/reset", "/step", "/state", "/schema", "/metadata", "/health"} <= {
        one.path for one in operations
    }
    checks = (status_code_conformance, content_type_conformance, response_schema_conformance)
    for operation in operations:

        @settings(FUZZ, max_examples=25)
        @given(case=operation.as_strategy())
        def play(case: Any) -> None:
            case.call_and_validate(checks=checks, timeout=10)

        play()


def test_bad_requests_in_http_itself_are_answered(server: Serving) -> None:
    address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    for junk in (
        b"\x00\xff\x00\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /step HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /step HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(address, timeout=10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            assert b" 500 " not in raw.recv(65536).split(b"\r\n", 1)[0], junk
    assert httpx.get(f"{server.url}/health").json() == {"status": "healthy"}
