"""Environments in processes of their own behind the server: what ends one ends its session, and no other."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.openenv.serving import Serving, as_app, running
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

ISOLATED = f"{Path(__file__).parent / 'isolated.py'}:Isolated"


@pytest.fixture(scope="module")
def server() -> Any:
    with running(as_app(ISOLATED)) as server:
        yield server


def call(name: str) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": name, "arguments": {}}


async def ask(ws: ClientConnection, kind: str, data: Any = None) -> Any:
    await ws.send(json.dumps({"type": kind, "data": data or {}}))
    return json.loads(await asyncio.wait_for(ws.recv(), 30))["data"]


async def begun(ws: ClientConnection) -> int:
    return int((await ask(ws, "reset"))["observation"]["text"])


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def socket_of(server: Serving) -> Any:
    return connect(f"ws{server.url[4:]}/ws", open_timeout=30)


def test_an_environment_that_dies_is_told_by_its_name_and_ends_its_session_alone(server: Serving) -> None:
    async def play() -> None:
        async with socket_of(server) as ws, socket_of(server) as other:
            first, second = await begun(ws), await begun(other)
            assert len({first, second, os.getpid()}) == 3
            told = await ask(ws, "step", call("die"))
            assert told["code"] == "EXECUTION_ERROR" and told["kind"] == "EnvCrashedError"
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(ws.recv(), 30)
            assert closed.value.rcvd is not None and "connect again" in closed.value.rcvd.reason
            assert (await ask(other, "step", {"text": "on"}))["observation"]["text"] == str(second)

    asyncio.run(play())


def test_a_client_that_leaves_a_call_takes_its_process_along(server: Serving) -> None:
    async def play() -> None:
        ws = await socket_of(server)
        process = await begun(ws)
        await ws.send(json.dumps({"type": "step", "data": call("block")}))
        await asyncio.sleep(0.3)
        ws.transport.abort()
        began = time.monotonic()
        while (runs(process) or server.sessions.live) and time.monotonic() - began < 60:
            await asyncio.sleep(0.05)
        assert not runs(process) and not server.sessions.live
        assert time.monotonic() - began < 25  # Not the 30 s that the call may take.

    asyncio.run(play())


def test_over_http_the_next_reset_is_of_a_new_environment(server: Serving) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        first = http.post("/reset").json()["observation"]["text"]
        died = http.post("/step", json={"action": call("die")})
        assert (died.status_code, died.json()["kind"]) == (500, "EnvCrashedError")
        assert http.post("/step", json={"action": {"text": "on"}}).status_code == 404
        again = http.post("/reset")
        assert again.status_code == 200 and again.json()["observation"]["text"] != first


def test_an_agent_s_session_ends_with_its_environment(server: Serving) -> None:
    def rpc(method: str, **params: Any) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}

    with httpx.Client(base_url=server.url, timeout=60) as http:
        me = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "x", "version": "1"},
        }
        begun = http.post("/mcp", json=rpc("initialize", **me))
        name = begun.headers["mcp-session-id"]
        headers = {"mcp-session-id": name, "mcp-protocol-version": "2025-06-18"}
        died = http.post("/mcp", json=rpc("tools/call", name="die", arguments={}), headers=headers).json()
        assert "its process died" in json.dumps(died)
        gone = http.post("/mcp", json=rpc("tools/list"), headers=headers)
        assert gone.status_code == 404
        assert name not in server.sessions.live
