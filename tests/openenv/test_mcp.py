"""``/mcp`` and the frames of it: OpenEnv's dialect by its own clients, MCP's by stock MCP clients."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import fastmcp
import httpx
import mcp
import pytest
import websockets
from fastapi import FastAPI
from mcp.client.session import ClientSession
from mcp.client.streamable_http import streamable_http_client
from openenv.core.env_server.mcp_types import CallToolAction
from openenv.core.generic_client import GenericAction, GenericEnvClient
from openenv.core.mcp_client import MCPToolClient
from starlette.testclient import TestClient
from tests.openenv.serving import as_app, serving
from tests.openenv.written import PACKAGES, TOOLS, TYPED, written

import turnwise
from turnwise.errors import EnvSpecError
from turnwise.openenv import MCPEnvironment
from turnwise.openenv.models import Observation, State
from turnwise.openenv.server.create import create_app
from turnwise.openenv.server.settings import Settings

both = pytest.mark.parametrize("package", PACKAGES)


def counter(package: str = "theirs", **more: Any) -> FastAPI:
    module = written(TOOLS, package)
    return create_app(module.Counter, module.CallToolAction, module.CallToolObservation, **more)


def rpc(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params, "id": id}


def call(name: str, id: Any = 1, **arguments: Any) -> dict[str, Any]:
    return rpc("tools/call", id, name=name, arguments=arguments)


class Bare(MCPEnvironment):
    """Has nothing but what subclasses add: its episodes are empty."""

    def reset(self, **more: Any) -> Any:
        return Observation()

    def _step_impl(self, action: Any, **more: Any) -> Any:
        return Observation()

    @property
    def state(self) -> State:
        return State()


# -- openenv-core's clients ----------------------------------------------------------------------------


@both
def test_their_tool_client_plays_an_episode_of_their_mcp_environment(package: str) -> None:
    async def play() -> None:
        async with serving(counter(package)) as url, MCPToolClient(url) as env:
            assert [tool.name for tool in await env.list_tools()] == ["add", "report", "visits", "broken"]
            tool = await env.get_tool("add")
            assert tool is not None and tool.input_schema["properties"]["n"]["type"] == "integer"
            await env.reset(seed=4, episode_id="e")
            assert await env.call_tool("add", n=3) == 7
            assert await env.call_tool("report", prefix="now") == {"text": "now 7"}
            last = await env.step(CallToolAction(tool_name="add", arguments={"n": 5}))
            assert (last.reward, last.done, last.observation.result["data"]) == (12.0, True, 12)
            state = await env.state()
            assert (state.episode_id, state.step_count) == ("e", 3)
            for name, arguments, kind in (
                ("nope", {}, "tool_not_found"),
                ("broken", {}, "execution_error"),
            ):
                with pytest.raises(RuntimeError, match=kind):
                    await env.call_tool(name, **arguments)
            with pytest.raises(RuntimeError, match="Tool 'add' failed"):
                await env.call_tool("add", n="many")

    asyncio.run(play())


@both
def test_their_tool_client_plays_in_production(package: str) -> None:
    async def play() -> None:
        async with serving(counter(package, mode="production")) as url:
            env = MCPToolClient(url)
            env.use_production_mode = True
            assert len(await env.list_tools()) == 4
            assert [await env.call_tool("add", n=n) for n in (3, 4)] == [
                3,
                7,
            ]  # One environment for all calls.
            assert await env.call_tool("report", prefix="at") == {"text": "at 7"}
            with pytest.raises(RuntimeError, match="out of order"):
                await env.call_tool("broken")
            with pytest.raises(RuntimeError, match="nope"):
                await env.call_tool("nope")
            await env.close()

    asyncio.run(play())


def test_their_tool_client_plays_catch_both_ways() -> None:
    async def play() -> None:
        async with serving("catch") as url, MCPToolClient(url) as env:
            await env.reset(seed=3)
            assert [tool.name for tool in await env.list_tools()] == ["move"]
            told = [await env.call_tool("move", direction="right") for _ in range(9)]
            assert told[-1] == "missed" and told[0] == "ball 3 paddle 3 rows 8"
        async with serving("catch", settings=Settings(mode="production")) as url:
            env = MCPToolClient(url)
            env.use_production_mode = True
            told = [await env.call_tool("move", direction="stay") for _ in range(9)]
            assert told[0].startswith("ball ") and told[-1] in ("missed", "caught")
            with pytest.raises(RuntimeError, match="the episode is over"):
                await env.call_tool("move", direction="stay")
            await env.close()

    asyncio.run(play())


def test_their_generic_client_plays_echo() -> None:
    async def play() -> None:
        async with serving("echo") as url, GenericEnvClient(url) as env:
            for answer in (GenericAction(type="reply", text=None), GenericAction(text=None)):
                first = await env.reset(seed=1)
                asked, text = first.observation["text"].split(": ")
                assert asked == "Repeat exactly" and not first.done
                last = await env.step({**answer, "text": text})
                assert (last.reward, last.done) == (1.0, True)
            await env.reset(seed=1)
            assert (await env.step({"message": "something else"})).reward == 0.0

    asyncio.run(play())


def test_their_clients_play_reasoning_gym() -> None:
    async def play() -> None:
        async with serving("reasoning_gym:chain_sum") as url:
            async with GenericEnvClient(url) as env:
                sum_of = (await env.reset(seed=1)).observation["text"].rpartition(":")[2].strip(" =")
                assert set(sum_of) <= set("0123456789 +-")
                answer = {"answer": str(eval(sum_of))}
                last = await env.step({"type": "call_tool", "tool_name": "answer", "arguments": answer})
                assert (last.reward, last.done) == (1.0, True)
            async with MCPToolClient(url) as tools:
                await tools.reset(seed=1)
                right = await tools.step(CallToolAction(tool_name="answer", arguments=answer))
                assert (right.reward, right.done) == (1.0, True)
                await tools.reset(seed=1)
                wrong = await tools.step(CallToolAction(tool_name="answer", arguments={"answer": "a lot"}))
                assert wrong.done and wrong.reward is not None and wrong.reward < 1

    asyncio.run(play())


# -- stock MCP clients ---------------------------------------------------------------------------------


Play = Callable[[str], Any]


async def with_fastmcp(url: str) -> list[Any]:
    async with fastmcp.Client(f"{url}/mcp") as client:
        names = [tool.name for tool in await client.list_tools()]
        data = [(await client.call_tool("add", {"n": n})).data for n in (3, 4)]
        report = (await client.call_tool("report", {"prefix": "at"})).data
        with pytest.raises(Exception, match="out of order"):
            await client.call_tool("broken", {})
        return [names, data, report]


async def with_the_sdk(url: str) -> list[Any]:
    async with (
        streamable_http_client(f"{url}/mcp") as (reads, writes),
        ClientSession(reads, writes) as client,
    ):
        await client.initialize()
        await client.send_ping()
        return await _with(client)


async def with_the_sdks_client(url: str) -> list[Any]:
    async with mcp.Client(f"{url}/mcp") as client:
        assert client.protocol_version == "2025-11-25"
        return await _with(client)


async def _with(client: Any) -> list[Any]:
    names = [tool.name for tool in (await client.list_tools()).tools]
    answers = [await client.call_tool("add", {"n": n}) for n in (3, 4)]
    assert [answer.content[0].text for answer in answers] == ["3", "7"]
    report = (await client.call_tool("report", {"prefix": "at"})).structured_content
    broken = await client.call_tool("broken", {})
    assert broken.is_error and "out of order" in broken.content[0].text and broken.structured_content is None
    with pytest.raises(mcp.MCPError, match="nope"):
        await client.call_tool("nope", {})
    return [names, [answer.structured_content["result"] for answer in answers], report]


@both
@pytest.mark.parametrize("play", [with_fastmcp, with_the_sdk, with_the_sdks_client])
def test_stock_clients_list_and_call(play: Play, package: str) -> None:
    async def run() -> None:
        async with serving(counter(package)) as url:
            names, data, report = await play(url)
            assert names == ["add", "report", "visits", "broken"]
            assert data == [3, 7] and report == {"text": "at 7"}
            assert httpx.get(f"{url}/health").status_code == 200

    asyncio.run(run())


def test_a_stock_client_plays_catch_and_leaves_no_session() -> None:
    async def play() -> None:
        app = as_app("catch")
        async with serving(app) as url:
            async with fastmcp.Client(f"{url}/mcp") as client:
                assert client.initialize_result is not None
                assert (client.initialize_result.instructions or "").startswith("ball ")
                told = [(await client.call_tool("move", {"direction": "stay"})).data for _ in range(9)]
                assert told[-1] in ("missed", "caught")
                assert len(app.state.sessions.live) == 1
            assert not app.state.sessions.live

    asyncio.run(play())


# -- the protocol itself -------------------------------------------------------------------------------


def test_a_handshake_makes_a_session_that_a_header_names() -> None:
    with TestClient(counter()) as http:
        begun = http.post("/mcp", json=rpc("initialize", 0, protocolVersion="2025-06-18"))
        result = begun.json()["result"]
        assert result["protocolVersion"] == "2025-06-18" and result["capabilities"]["tools"] is not None
        assert result["serverInfo"]["name"] == "Counter"
        headers = {"mcp-session-id": begun.headers["mcp-session-id"], "mcp-protocol-version": "2025-06-18"}
        noted = http.post(
            "/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=headers
        )
        assert noted.status_code == 202 and not noted.content
        (add, *_) = http.post("/mcp", json=rpc("tools/list"), headers=headers).json()["result"]["tools"]
        assert add["name"] == "add" and "inputSchema" in add and "input_schema" not in add
        answer = http.post("/mcp", json=call("add", n=2), headers=headers).json()["result"]
        assert answer["isError"] is False and answer["structuredContent"] == {"result": 2}
        assert http.get("/mcp", headers=headers).status_code == 405
        assert http.delete("/mcp", headers=headers).status_code == 204
        gone = http.post("/mcp", json=call("add", n=2), headers=headers)
        assert gone.status_code == 404 and "initialize again" in gone.json()["error"]["message"]
        assert http.delete("/mcp", headers=headers).status_code == 404
        newest = http.post("/mcp", json=rpc("initialize", protocolVersion="2099-01-01"))
        assert newest.json()["result"]["protocolVersion"] == "2025-11-25"
        stateless = http.post("/mcp", json=rpc("tools/list"), headers={"mcp-protocol-version": "2026-07-28"})
        assert stateless.json()["error"]["code"] == -32022
        assert "2025-11-25" in stateless.json()["error"]["data"]["supported"]


def test_openenvs_dialect_over_http() -> None:
    app = counter()
    with TestClient(app) as http:

        def ask(body: Any, **more: Any) -> Any:
            answer = http.post("/mcp", json=body, **more)
            assert answer.status_code == 200
            return answer.json()

        # Without a session every call meets an environment of its own.
        assert [ask(call("add", n=5))["result"]["data"] for _ in range(2)] == [5, 5]
        assert not app.state.sessions.live
        name = ask(rpc("openenv/session/create", "c"))["result"]["session_id"]
        totals = [
            ask(rpc("tools/call", name="add", arguments={"n": 5}, session_id=name))["result"]
            for _ in range(2)
        ]
        assert totals[1] == {
            "content": [{"type": "text", "text": "10"}],
            "structured_content": {"result": 10},
            "meta": None,
            "data": 10,
            "is_error": False,
        }
        visits = [
            ask(rpc("tools/call", name="visits", arguments={}, session_id=name))["result"]["data"]
            for _ in range(3)
        ]
        assert visits == [1, 2, 3]
        (tool, *_) = ask(rpc("tools/list", session_id=name))["result"]["tools"]
        assert tool["input_schema"] == tool["inputSchema"]
        assert ask(rpc("openenv/session/close", session_id=name))["result"] == {
            "session_id": name, "closed": True
        }  # fmt: skip
        assert not app.state.sessions.live
        for request, code in (
            (rpc("openenv/session/close", session_id=name), -32602),
            (rpc("openenv/session/close"), -32602),
            (rpc("tools/call", name="add", arguments={"n": 1}, session_id=name), -32602),
            (rpc("tools/call", arguments={}), -32602),
            (rpc("tools/call", name="add", arguments=[1]), -32602),
            (rpc("tools/call", name=["add"]), -32602),
            (rpc("tools/invalid"), -32601),
            (rpc("reset"), -32601),
            (call("broken"), -32603),
            (call("nope"), -32602),
            ({"method": "tools/list", "id": 1}, -32600),
            ({"jsonrpc": "2.0", "method": "tools/list", "id": 1, "more": 1}, -32600),
            ({"jsonrpc": "2.0", "method": "tools/list", "id": 1, "params": [1]}, -32600),
            ({"jsonrpc": "2.0", "method": "tools/list", "id": 1.5}, -32600),
            ([rpc("tools/list")], -32600),
            (3, -32600),
        ):
            answer = ask(request)
            assert answer["error"]["code"] == code, (request, answer)
            id = request.get("id") if isinstance(request, dict) else None
            assert answer["id"] == (None if isinstance(id, float) else id)
        assert http.post("/mcp", content=b"{").json()["error"]["code"] == -32700


def test_a_handshake_that_fails_or_is_not_gone_on_with_keeps_no_environment() -> None:
    class Alone(turnwise.Env):
        def reset(self, task: Any) -> str:
            if broken:
                raise ValueError("no licence")
            return "go"

        @turnwise.tool
        def look(self) -> str:
            """Look."""
            return "seen"

    app = as_app(Alone, Settings(max_sessions=1, queue=0))
    with TestClient(app) as http:

        def begun() -> Any:
            return http.post("/mcp", json=rpc("initialize"))

        broken = True
        for _ in range(2):
            answer = begun()
            assert "no licence" in answer.json()["error"]["message"]
            assert "mcp-session-id" not in answer.headers and not app.state.sessions.live
        broken = False
        assert "result" in begun().json()  # This client says nothing more, so it gives way:
        named = {"mcp-session-id": begun().headers["mcp-session-id"]}
        http.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=named)
        assert "1 of 1 sessions" in begun().json()["error"]["message"]
        answer = http.post("/mcp", json=call("look"), headers=named).json()
        assert answer["result"]["content"][0]["text"] == "seen"


def test_a_handshake_makes_no_environment_beside_its_own() -> None:
    class Device(Bare):
        """Only one can be open."""

        live = 0

        def __init__(self) -> None:
            super().__init__()
            if Device.live:
                raise RuntimeError("the device is in use")
            Device.live += 1

        def close(self) -> None:
            Device.live -= 1

    with TestClient(create_app(Device, None, None)) as http:
        begun = http.post("/mcp", json=rpc("initialize"))
        assert begun.json()["result"]["instructions"], begun.text


@pytest.mark.parametrize("limit", ["max_turns", "max_tool_calls"])
@pytest.mark.parametrize("where", ["http", "socket", "frames"])
def test_an_agents_calls_are_bound_by_the_environments_limits(where: str, limit: str) -> None:
    ran: list[int] = []

    class Endless(turnwise.Env):
        inline = True

        def reset(self, task: Any) -> str:
            return "go"

        @turnwise.tool
        def dig(self) -> str:
            """Dig."""
            ran.append(1)
            return "deeper"

    setattr(Endless, limit, 3)
    with TestClient(as_app(Endless)) as http:

        def played(ask: Callable[[Any], Any]) -> None:
            assert [ask(call("dig"))["result"]["data"] for _ in range(3)] == ["deeper"] * 3
            for _ in range(2):
                refused = ask(call("dig"))["error"]["message"]
                assert refused == f"the episode is over, as it has reached {limit}=3: reset"
            assert len(ran) == 3

        if where == "http":
            name = http.post("/mcp", json=rpc("openenv/session/create")).json()["result"]["session_id"]
            named = {"mcp-session-id": name}
            played(lambda request: http.post("/mcp", json=request, headers=named).json())
        else:
            with http.websocket_connect("/mcp" if where == "socket" else "/ws") as socket:

                def ask(request: Any) -> Any:
                    socket.send_json({"type": "mcp", "data": request} if where == "frames" else request)
                    answer = socket.receive_json()
                    return answer["data"] if where == "frames" else answer

                played(ask)


@pytest.mark.parametrize("how", ["delete", "close"])
def test_a_session_that_is_ended_during_a_call_closes_after_it(how: str) -> None:
    told: list[str] = []
    free = threading.Event()

    class Slow(Bare):
        def __init__(self) -> None:
            super().__init__()

            @self.tool()
            async def wait() -> str:
                """Wait."""
                told.append("begins")
                while not free.is_set():
                    await asyncio.sleep(0.01)
                told.append("ends")
                return "waited"

        def close(self) -> None:
            told.append("closed")

    async def play() -> None:
        async with serving(create_app(Slow, None, None)) as url, httpx.AsyncClient(base_url=url) as http:
            made = (await http.post("/mcp", json=rpc("openenv/session/create"))).json()
            name = made["result"]["session_id"]
            request = rpc("tools/call", name="wait", arguments={}, session_id=name)
            waiting = asyncio.ensure_future(http.post("/mcp", json=request))
            while "begins" not in told:
                await asyncio.sleep(0.01)
            told.clear()
            ending = asyncio.ensure_future(
                http.delete("/mcp", headers={"mcp-session-id": name})
                if how == "delete"
                else http.post("/mcp", json=rpc("openenv/session/close", session_id=name))
            )
            await asyncio.wait((ending,), timeout=0.5)  # It may be answered at once, or after the call.
            assert told == []
            free.set()
            await ending
            assert (await waiting).json()["result"]["data"] == "waited"
            deadline = time.monotonic() + 10
            while "closed" not in told and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert told == ["ends", "closed"]

    asyncio.run(play())


def test_a_full_server_says_so() -> None:
    app = counter(max_concurrent_envs=1, settings=Settings(queue=0))
    with TestClient(app) as http:
        name = http.post("/mcp", json=rpc("openenv/session/create")).json()["result"]["session_id"]
        http.post("/mcp", json=rpc("tools/list"), headers={"mcp-session-id": name})
        full = http.post("/mcp", json=rpc("openenv/session/create", 7)).json()
        assert full["id"] == 7 and full["error"]["code"] == -32000
        assert full["error"]["data"] == {"active_sessions": 1, "max_sessions": 1}
        with http.websocket_connect("/mcp") as socket:
            assert socket.receive_json()["error"]["data"]["code"] == "CAPACITY_REACHED"


@pytest.mark.parametrize("spec", ["theirs", "ours", "catch"])
def test_agents_never_reach_an_episodes_controls(spec: str) -> None:
    app = as_app("catch") if spec == "catch" else counter(spec)
    with TestClient(app) as http, http.websocket_connect("/ws") as trainer:
        trainer.send_json({"type": "reset", "data": {"seed": 3, "episode_id": "training"}})
        trainer.receive_json()
        (theirs,) = app.state.sessions.live
        with http.websocket_connect("/mcp") as agent:

            def ask(request: Any) -> Any:
                agent.send_json(request)
                return agent.receive_json()

            for kind in ("reset", "step", "state", "close", "turnwise", "mcp"):
                assert ask({"type": kind, "data": {}})["error"]["code"] == -32600
                assert ask(rpc(kind))["error"]["code"] == -32601
            for name in ("reset", "step", "state", "close"):
                refused = ask(call(name))
                assert (
                    refused["error"]["code"] == -32602
                    and "controls the episode" in refused["error"]["message"]
                )
            # Another's session cannot be named, over the socket or over HTTP.
            assert ask(rpc("openenv/session/close", session_id=theirs))["error"]["code"] == -32602
            refused = http.post("/mcp", json=rpc("tools/list", session_id=theirs)).json()
            assert refused["error"]["code"] == -32602
            assert http.delete("/mcp", headers={"mcp-session-id": theirs}).status_code == 404
        trainer.send_json({"type": "state"})
        assert trainer.receive_json()["data"]["episode_id"] == "training"


def test_no_tool_has_a_reserved_name() -> None:
    class Sneaky(Bare):
        def __init__(self) -> None:
            super().__init__()

            @self.tool()
            def reset() -> str:
                """Begin anew."""
                return "done"

    with pytest.raises(EnvSpecError, match="reserved names"):
        Sneaky()

    class Named(turnwise.Env):
        def reset(self, task: Any) -> str:
            return "go"

        @turnwise.tool
        def look(self) -> str:
            """Look."""
            return "seen"

        @turnwise.tool(name="state")
        def look_behind(self) -> str:
            """See what nobody shall."""
            return "the secret"

    with TestClient(as_app(Named), raise_server_exceptions=False) as http:
        assert "the secret" not in http.post("/mcp", json=call("state")).text
        for tool in http.post("/mcp", json=rpc("tools/list")).json().get("result", {}).get("tools", ()):
            assert tool["name"] == "look"
        assert "rename state" in http.get("/metadata").text


def test_a_socket_at_mcp_speaks_both_dialects_and_owes_notifications_nothing() -> None:
    with TestClient(counter()) as http, http.websocket_connect("/mcp") as socket:

        def ask(request: Any) -> Any:
            socket.send_json(request)
            return socket.receive_json()

        assert ask(call("add", 1, n=2))["result"]["data"] == 2
        socket.send_text("{")
        assert socket.receive_json()["error"]["code"] == -32700
        own = ask(rpc("openenv/session/create"))["result"]["session_id"]
        assert ask(rpc("openenv/session/close", session_id=own))["error"]["code"] == -32600
        assert (
            ask(rpc("initialize", protocolVersion="2025-03-26"))["result"]["protocolVersion"] == "2025-03-26"
        )
        socket.send_json({"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert ask(call("add", "two", n=2)) == {
            "jsonrpc": "2.0",
            "id": "two",
            "result": {
                "content": [{"type": "text", "text": "4"}],
                "isError": False,
                "structuredContent": {"result": 4},
                "_meta": {"fastmcp": {"wrap_result": True}},
            },
        }


def test_mcp_frames_share_the_environment_of_their_socket() -> None:
    async def play() -> None:
        async with (
            serving(counter()) as url,
            websockets.connect(url.replace("http", "ws") + "/ws") as socket,
        ):

            async def ask(kind: str, data: Any) -> Any:
                await socket.send(json.dumps({"type": kind, "data": data}))
                return json.loads(await socket.recv())

            await ask("reset", {"seed": 5})
            step = {"type": "call_tool", "tool_name": "add", "arguments": {"n": 1}}
            assert (await ask("step", step))["data"]["observation"]["result"]["data"] == 6
            framed = await ask("mcp", call("add", 9, n=1))
            assert framed["type"] == "mcp" and framed["data"]["id"] == 9
            assert framed["data"]["result"]["data"] == 7
            assert (await ask("mcp", rpc("notifications/initialized")))["data"]["error"]["code"] == -32601
            assert (await ask("mcp", {}))["data"]["error"]["code"] == -32600

    asyncio.run(play())


def test_others_sessions_play_on_while_a_tool_is_slow() -> None:
    begun, free = threading.Event(), threading.Event()
    ran: list[str] = []

    class Slow(Bare):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()

            @self.tool()
            async def wait(how: str) -> str:
                """Wait."""
                if how == "slow":
                    begun.set()
                    while not free.is_set():
                        await asyncio.sleep(0.01)
                ran.append(how)
                return how

    async def play() -> None:
        async with serving(create_app(Slow, None, None)) as url, httpx.AsyncClient(base_url=url) as http:
            names = []
            for _ in range(2):
                made = (await http.post("/mcp", json=rpc("openenv/session/create"))).json()
                names.append(made["result"]["session_id"])

            async def wait(name: str, how: str) -> None:
                body = rpc("tools/call", name="wait", arguments={"how": how}, session_id=name)
                assert (await http.post("/mcp", json=body)).json()["result"]["data"] == how

            slow = asyncio.create_task(wait(names[0], "slow"))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            # Calls of one session come one after the other, whoever is quicker.
            behind = asyncio.create_task(wait(names[0], "behind"))
            await asyncio.sleep(0.1)
            await wait(names[1], "another's")
            assert ran == ["another's"]
            free.set()
            await asyncio.gather(slow, behind)
            assert ran == ["another's", "slow", "behind"]

    asyncio.run(play())


# -- what a call costs ---------------------------------------------------------------------------------


@both
def test_no_mcp_client_stands_between_an_environment_and_its_own_tools(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = counter(package)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("an MCP client was opened")

    monkeypatch.setattr(fastmcp.Client, "__aenter__", refused)
    with TestClient(app) as http, http.websocket_connect("/ws") as socket:
        for name in ("add", "report"):
            arguments = {"n": 1} if name == "add" else {"prefix": "at"}
            socket.send_json(
                {"type": "step", "data": {"type": "call_tool", "tool_name": name, "arguments": arguments}}
            )
            assert socket.receive_json()["data"]["observation"]["error"] is None
            assert "result" in http.post("/mcp", json=call(name, **arguments)).json()
        socket.send_json({"type": "step", "data": {"type": "list_tools"}})
        assert len(socket.receive_json()["data"]["observation"]["tools"]) == 4
        # A tool that takes a Context needs a client's session, and has one.
        assert "an MCP client was opened" in http.post("/mcp", json=call("visits")).json()["error"]["message"]


# -- authored with our base class ----------------------------------------------------------------------


class Shelf(MCPEnvironment):
    """Tools without FastMCP."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.items: list[str] = []

        @self.tool()
        def put(item: str, times: int = 1) -> list[str]:
            """Put something there.

            Args:
                item: What.
                times: How often.
            """
            self.items += [item] * times
            return self.items

        @self.tool(mode="production")
        async def price(item: str) -> dict[str, float]:
            """What it costs."""
            return {"price": 2.5}

        @self.tool(mode="simulation")
        async def price(item: str) -> dict[str, float]:  # noqa: F811
            """What it would cost."""
            return {"price": 1.0}

        @self.tool(mode="simulation")
        def cheat() -> str:
            """Look behind it."""
            return "a wall"

    def reset(self, seed: int | None = None, **more: Any) -> Observation:
        self.items.clear()
        return Observation()

    def _step_impl(self, action: Any, **more: Any) -> Observation:
        return Observation(metadata={"kind": type(action).__name__})

    @property
    def state(self) -> State:
        return State(items=list(self.items))


@pytest.mark.parametrize(("mode", "names", "price"), [
    ("simulation", ["put", "price", "cheat"], 1.0), ("production", ["put", "price"], 2.5),
])  # fmt: skip
def test_tools_of_a_function_each_and_of_a_mode(mode: str, names: list[str], price: float) -> None:
    with TestClient(create_app(Shelf, None, None, mode=mode)) as http:
        listed = http.post("/mcp", json=rpc("tools/list")).json()["result"]["tools"]
        assert [tool["name"] for tool in listed] == names
        assert listed[0]["inputSchema"]["properties"]["times"] == {
            "type": "integer", "description": "How often.", "default": 1
        }  # fmt: skip
        assert http.post("/mcp", json=call("price", item="pen")).json()["result"]["data"] == {"price": price}
        assert http.post("/mcp", json=call("put", item="pen", times=2)).json()["result"]["data"] == [
            "pen",
            "pen",
        ]
        wrong = http.post("/mcp", json=call("put", item="pen", times="two")).json()["error"]
        assert wrong["code"] == -32603 and "times" in wrong["message"]
        assert ("error" in http.post("/mcp", json=call("cheat")).json()) == (mode == "production")


def test_an_environment_of_tools_is_called_without_a_server_too() -> None:
    from turnwise.openenv.models import CallToolAction as OurCall
    from turnwise.openenv.models import ListToolsAction as OurList

    shelf = Shelf()
    assert [tool.name for tool in shelf.step(OurList()).tools] == ["put"]
    shelf._mode = "simulation"
    assert shelf.step(OurCall(tool_name="price", arguments={"item": "pen"})).result.data == {"price": 1.0}
    failed = shelf.step(OurCall(tool_name="nope"))
    assert failed.error is not None and failed.error.error_type == "tool_not_found"

    async def within_a_loop() -> Any:
        return shelf.step(OurCall(tool_name="put", arguments={"item": "cup"}))

    assert asyncio.run(within_a_loop()).result.data == ["cup"]


def test_a_typed_environment_has_no_tools() -> None:
    module = written(TYPED, "theirs")
    with TestClient(create_app(module.Guessing, module.Guess, module.Told)) as http:
        assert http.post("/mcp", json=rpc("tools/list")).json()["result"] == {"tools": []}
        assert http.post("/mcp", json=call("guess")).json()["error"]["code"] == -32602
