"""Client classes written for OpenEnv: they play with the import changed, on servers of openenv-core itself.

The classes below have the shapes found in OpenEnv's own repository: a pydantic action dumped whole, fields by
hand, ``payload["observation"]`` unpacked, own methods on top of `step`, a constructor of its own, tools in
place of actions. Servers that come and go are ours, which start faster.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from tests.openenv.serving import as_app, running

from turnwise.errors import ActionError, EnvHungError, EnvSpecError
from turnwise.openenv import (
    Action,
    CallToolAction,
    EnvClient,
    GenericAction,
    GenericEnvClient,
    MCPToolClient,
    Observation,
    State,
    StepResult,
    SyncEnvClient,
)
from turnwise.openenv.client.env_client import ConnectError, ReplyTimeoutError, ServerError
from turnwise.openenv.client.mcp_client import ToolCallError
from turnwise.openenv.client.socket import EnvSocket
from turnwise.openenv.run import ProcessProvider, StartError
from turnwise.openenv.server.settings import Settings

SERVER = """
import time
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.types import Action, Observation, State


class Add(Action):
    number: int
    sleep: float = 0.0


class Total(Observation):
    total: int = 0
    seen: list[int] = []


class TotalState(State):
    total: int = 0


class Adder(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = TotalState()

    def reset(self, seed=None, episode_id=None, start=0, **more):
        self._state = TotalState(episode_id=episode_id, total=start + (seed or 0))
        return Total(total=self._state.total, done=False, reward=None)

    def step(self, action, timeout_s=None, **more):
        time.sleep(action.sleep)
        if action.number < 0:
            raise RuntimeError("a negative number")
        self._state.total += action.number
        self._state.step_count += 1
        total = self._state.total
        return Total(total=total, seen=[action.number], done=total >= 10, reward=float(action.number))

    @property
    def state(self):
        return self._state


class Tools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server = FastMCP("tools")

        @server.tool
        def price(item: str) -> int:
            "Look up a price."
            return {"tea": 420}[item]

        super().__init__(server)
        self._state = State()

    def reset(self, seed=None, episode_id=None, **more):
        self._state = State(episode_id=episode_id)
        return Observation(done=False)

    def _step_impl(self, action, timeout_s=None, **more):
        return Observation(done=False)

    @property
    def state(self):
        return self._state


app = create_app(Adder, Add, Total, env_name="adder", max_concurrent_envs=4)
app.mount("/tools", create_app(Tools, Action, Observation, env_name="tools", max_concurrent_envs=4))
"""
OURS = """
from turnwise.openenv import Action, Environment, Observation, State, create_app


class Adder(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **more):
        self.total = seed
        return Observation(metadata={"total": self.total})

    def step(self, action, timeout_s=None, **more):
        return Observation(reward=1.0)

    @property
    def state(self):
        return State(total=self.total)


app = create_app(Adder, Action, Observation, env_name="adder", max_concurrent_envs=4)
"""


# Client classes as OpenEnv's authors write them; ``turnwise.openenv`` stands where ``openenv.core`` stood.


class Add(Action):
    number: int
    sleep: float = 0.0


class Total(Observation):
    total: int = 0
    seen: list[int] = Field(default_factory=list)


class TotalState(State):
    total: int = 0


class Dumping(EnvClient[Add, Total, State]):
    """The action dumped whole, the observation unpacked with the brackets of `grid_world` and `coding`."""

    def _step_payload(self, action: Add) -> dict[str, Any]:
        return action.model_dump()

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Total]:
        return StepResult(
            observation=Total(**payload["observation"]),
            reward=payload["reward"],
            done=bool(payload.get("done", False)),
        )

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)


class ByHand(EnvClient[Add, Total, TotalState]):
    """Each field by hand, as in `maze` and `chess`, done and reward inside of the observation too."""

    def _step_payload(self, action: Add) -> dict[str, Any]:
        return {"number": action.number, "sleep": action.sleep}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Total]:
        fields = payload.get("observation", {})
        observation = Total(
            total=fields.get("total", 0),
            seen=fields.get("seen", []),
            done=payload.get("done", False),
            reward=payload.get("reward"),
            metadata=fields.get("metadata", {}),
        )
        return StepResult(
            observation=observation, reward=payload.get("reward"), done=payload.get("done", False)
        )

    def _parse_state(self, payload: dict[str, Any]) -> TotalState:
        return TotalState(
            episode_id=payload.get("episode_id"),
            step_count=payload.get("step_count", 0),
            total=payload.get("total", 0),
        )


class WithMethods(ByHand):
    """Methods of its own, async and plain, and a constructor of its own, as in `repl` and `dipg`."""

    def __init__(self, base_url: str, timeout: float = 5.0) -> None:
        super().__init__(base_url=base_url, message_timeout_s=timeout)

    async def add_twice(self, number: int) -> StepResult[Total]:
        await self.step(Add(number=number))
        return await self.step(Add(number=number))

    def add_one(self) -> Any:  # plain, though what it returns is awaited: `grid_world`
        return super().step(Add(number=1))

    async def total(self) -> int:
        return (await self.state()).total


class Plain:
    """An observation of nobody's models, as a dataclass would be."""

    def __init__(self, total: int) -> None:
        self.total = total


class Untyped(EnvClient):  # type: ignore[type-arg]  # bare, as some are
    def _step_payload(self, action: Any) -> dict[str, Any]:
        return {"number": action}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Plain]:
        return StepResult(Plain(payload["observation"]["total"]), payload["reward"], payload["done"])

    def _parse_state(self, payload: dict[str, Any]) -> Any:
        return payload


class PriceEnv(MCPToolClient):
    """Nothing of its own, as `echo`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "their_app.py").write_text(SERVER)
    (folder / "our_app.py").write_text(OURS)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    server = ProcessProvider.of_folder(folder, app="their_app:app")
    try:
        url = server.start()
        server.wait_for_ready(timeout_s=120)  # openenv-core takes seconds to import, on a busy machine many
        yield url
    finally:
        server.stop()


def ours(folder: Path) -> ProcessProvider:
    return ProcessProvider.of_folder(folder, app="our_app:app")


@pytest.mark.parametrize("client", [Dumping, ByHand, WithMethods])
def test_a_ported_client_plays_an_episode(url: str, client: type[EnvClient[Add, Total, Any]]) -> None:
    async def play() -> None:
        async with client(base_url=url) as env:
            result = await env.reset(seed=3, episode_id="e1")
            assert (result.observation.total, result.reward, result.done) == (3, None, False)
            result = await env.step(Add(number=4))
            assert (result.observation.total, result.observation.seen) == (7, [4])
            assert (result.reward, result.done) == (4.0, False)
            assert (await env.step(Add(number=3))).done
            state = await env.state()
            assert (state.episode_id, state.step_count) == ("e1", 2)
            assert state.total == 10  # a subclass's own field, or an extra one of State

    asyncio.run(play())


def test_what_is_no_model_is_returned_as_it_was_parsed(url: str) -> None:
    with Untyped(url.replace("http", "ws") + "/").sync() as env:
        assert env.reset(start=5).observation.total == 5
        assert env.step(2).observation.total == 7
        assert env.state()["total"] == 7


def test_the_sync_face_has_every_method(url: str) -> None:
    with WithMethods(url).sync() as env:
        env.reset()
        assert env.add_twice(2).observation.total == 4
        assert env.add_one().observation.total == 5
        assert env.total() == 5
        assert env._ws_url == f"{url.replace('http', 'ws')}/ws"
        assert isinstance(env.async_client, WithMethods)
        with pytest.raises(AttributeError, match="no_such"):
            env.no_such()


def test_the_sync_face_works_within_a_loop_and_in_threads(url: str) -> None:
    async def inside() -> int:
        with ByHand(url).sync() as env:
            env.reset(seed=1)
            return env.step(Add(number=1)).observation.total

    assert asyncio.run(inside()) == 2
    totals: list[int] = []

    def play(seed: int) -> None:
        with ByHand(url).sync() as env:
            env.reset(seed=seed)
            for _ in range(20):
                env.step(Add(number=0))
            totals.append(env.state().total)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(totals) == [0, 1, 2]


def test_mappings_and_models_are_actions_of_the_generic_client(url: str) -> None:
    class Free(BaseModel):
        number: int

    with GenericEnvClient(url.removeprefix("http://")).sync() as env:
        env.reset()
        env.step({"number": 1})
        env.step(GenericAction(number=2))
        assert env.step(Free(number=3)).observation == {"total": 6, "seen": [3]}
        with pytest.raises(ActionError, match="this is int"):
            env.step(7)
        with pytest.raises(ActionError, match=r"is not JSON.*_step_payload"):
            env.step({"number": object()})
        assert repr(GenericAction(number=2)) == "GenericAction(number=2)"
        assert env.state()["total"] == 6  # what was not sent did nothing


def test_errors_say_what_the_server_said_and_the_session_goes_on(url: str) -> None:
    with ByHand(url).sync() as env:
        env.reset(seed=2)
        with pytest.raises(RuntimeError, match=r"a negative number \(code: EXECUTION_ERROR\)"):
            env.step(Add(number=-1))
        with pytest.warns(UserWarning, match="timeout_s, which is not sent"):
            assert env.step(Add(number=1), timeout_s=3).observation.total == 3
    with GenericEnvClient(url).sync() as generic:
        generic.reset()
        with pytest.raises(ServerError, match="GET /schema says") as info:
            generic.step({"nonsense": 1})
        assert info.value.code == "VALIDATION_ERROR"


def test_constructors_take_what_openenvs_take(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from openenv.core.env_client import EnvClient as Theirs
    from openenv.core.mcp_client import MCPToolClient as TheirTools

    for ours, theirs in ((EnvClient, Theirs), (MCPToolClient, TheirTools)):
        wanted = list(inspect.signature(theirs).parameters.values())
        mine = list(inspect.signature(ours).parameters.values())[: len(wanted)]
        assert [(one.name, one.default, one.kind) for one in mine] == [
            (one.name, one.default, one.kind) for one in wanted
        ]
    with Untyped(url, 10.0, 60.0, 0.01, None, "Production").sync() as env:
        assert env.async_client._mode == "production" and env.reset().observation.total == 0
        with pytest.raises(ConnectError, match="max_message_size_mb"):
            env.reset(episode_id="e" * 20_000), env.state()
    with pytest.raises(ValueError, match="'simulation' or 'production'"):
        Untyped(url, mode="training")
    monkeypatch.setenv("OPENENV_CLIENT_MODE", "production")
    assert Untyped(url)._mode == "production"


def test_a_late_reply_never_answers_another_call(url: str) -> None:
    async def play() -> None:
        async with ByHand(url, message_timeout_s=4.0) as env:
            await env.reset(seed=1)
            with pytest.raises(TimeoutError, match="message_timeout_s"):
                await env.step(Add(number=5, sleep=8.0))
            result = await env.reset(seed=2)  # openenv-core returns the step's total, 6, here
            assert result.observation.total == 2
            assert (await env.step(Add(number=1))).observation.total == 3
            await asyncio.sleep(4.5)
            assert (await env.step(Add(number=1))).observation.total == 4

    asyncio.run(play())
    assert issubclass(ReplyTimeoutError, EnvHungError)


def test_a_lost_connection_ends_the_episode_and_no_more(folder: Path) -> None:
    async def play() -> None:
        server = ours(folder)
        url = server.start()
        port = int(url.rsplit(":", 1)[1])
        await asyncio.to_thread(server.wait_for_ready)
        try:
            async with ByHand(url) as env:
                await env.reset(seed=1)
                await asyncio.to_thread(server.stop)
                with pytest.raises(ConnectionError, match=r"episode is lost.*reset\(\) connects anew"):
                    await env.step(Add(number=1))
                with pytest.raises(ConnectError, match="is the server running"):
                    await env.reset(seed=1)
                server.start(port=port)
                await asyncio.to_thread(server.wait_for_ready)
                assert (await env.reset(seed=5)).metadata == {"total": 5}
        finally:
            await asyncio.to_thread(server.stop)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("token", "path", "told"),
    [
        ("open sesame", "", "HTTP 401: the server wants a token.*token= in Python"),
        (None, "/no", "HTTP 403 at /ws: a wrong path"),
    ],
)
def test_who_is_not_let_in_is_told_what_to_do(token: str | None, path: str, told: str) -> None:
    with running(as_app("catch", Settings(token=token), {"rows": 3})) as server:
        with pytest.raises(ConnectError, match=told) as refused:
            GenericEnvClient(server.url + path).sync().reset()
        assert "is the server running" not in str(refused.value)


def test_a_full_server_is_waited_for(url: str) -> None:
    async def play() -> None:
        clients = [ByHand(url) for _ in range(4)]
        for client in clients:
            await client.reset()
        async with ByHand(url, message_timeout_s=4.0) as late:
            with pytest.raises(ServerError, match=r"CAPACITY_REACHED.*no place was free for 4 s"):
                await late.reset(seed=1)
        async with ByHand(url) as fifth:
            asked = asyncio.create_task(fifth.reset(seed=9))
            await asyncio.sleep(0.5)
            assert not asked.done()
            await clients[0].close()
            assert (await asked).observation.total == 9
        for client in clients:
            await client.close()

    asyncio.run(play())


def test_two_first_calls_at_once_are_of_one_session(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[EnvSocket] = []
    opens = EnvSocket.open

    async def counted(*args: Any, **kwargs: Any) -> EnvSocket:
        opened.append(await opens(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(EnvSocket, "open", counted)

    async def play() -> None:
        client = Untyped(url)
        result, state = await asyncio.gather(client.reset(start=5), client.state())
        assert (result.observation.total, state["total"], len(opened)) == (5, 5, 1)
        await client.close()

    asyncio.run(play())


def test_one_loop_is_told_from_another(url: str) -> None:
    client = ByHand(url)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.connect())
    with pytest.raises(EnvSpecError, match="another event loop"):
        asyncio.run(client.reset())
    loop.run_until_complete(client.close())
    loop.close()
    with pytest.raises(TypeError, match="async with client"), ByHand(url):
        pass


# Tools


def test_a_tool_client_lists_and_calls(url: str) -> None:
    with PriceEnv(f"{url}/tools").sync() as env:
        env.reset(episode_id="e2")
        (tool,) = env.list_tools()
        assert (tool.name, tool.description) == ("price", "Look up a price.")
        assert tool.input_schema["required"] == ["item"]
        assert env.list_tools() is env.list_tools()
        assert env.list_tools(use_cache=False) is not env.list_tools(use_cache=False)
        assert env.has_tool("price") and not env.has_tool("none") and env.get_tool("none") is None
        assert env.call_tool("price", item="tea") == 420
        answer = env.step(CallToolAction(tool_name="price", arguments={"item": "tea"})).observation
        assert answer.tool_name == "price" and answer.error is None
        with pytest.raises(RuntimeError, match="Tool 'none' failed"):
            env.call_tool("none")
        with pytest.raises(ToolCallError):
            env.call_tool("price", item="gold")
        assert env.state().episode_id == "e2"


def test_tools_are_called_without_an_episode_too(url: str) -> None:
    client = MCPToolClient(f"{url}/tools")
    client.use_production_mode = True
    with client.sync() as env:
        assert [tool.name for tool in env.list_tools()] == ["price"]
        assert env.call_tool("price", item="tea") == 420
        with pytest.raises(ServerError):
            env.call_tool("none")
    with pytest.raises(EnvSpecError, match="GenericEnvClient"):
        MCPToolClient(url, mode="simulation")


# What runs the server


def test_a_client_stops_what_was_started_for_it(folder: Path) -> None:
    async def play() -> None:
        env = await ByHand.from_env(
            "acme/adder",
            use_docker=False,
            provider=ours(folder),
        )
        url = env._url
        async with env:
            assert (await env.reset(seed=4)).metadata == {"total": 4}
        with pytest.raises(ConnectError):
            await ByHand(url).reset()

    asyncio.run(play())


def test_a_client_of_a_started_server_has_a_sync_face(folder: Path) -> None:
    provider = ours(folder)
    client = asyncio.run(ByHand.from_env("acme/adder", use_docker=False, provider=provider))
    assert isinstance(client.sync(), SyncEnvClient)
    with client.sync() as env:
        assert env.reset(seed=4).metadata == {"total": 4}
    assert provider._process is None


def test_providers_written_for_openenv_are_taken(folder: Path) -> None:
    from openenv.core.containers.runtime.providers import ContainerProvider

    class Theirs(ContainerProvider):
        def __init__(self) -> None:
            self.server = ours(folder)
            self.asked: dict[str, Any] = {}

        def start_container(self, image, port=None, env_vars=None, **kwargs):  # type: ignore[no-untyped-def]
            self.asked = {"image": image, "env_vars": env_vars, **kwargs}
            return self.server.start(port)

        def stop_container(self) -> None:
            self.server.stop()

        def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
            self.server.wait_for_ready(timeout_s)

    async def play() -> None:
        provider = Theirs()
        env = await ByHand.from_docker_image("adder:latest", provider, env_vars={"A": "1"}, gpus="all")
        async with env:
            assert (await env.reset(seed=4)).metadata == {"total": 4}
        assert provider.asked == {"image": "adder:latest", "env_vars": {"A": "1"}, "gpus": "all"}
        assert provider.server._process is None

    asyncio.run(play())


def test_a_start_that_fails_or_is_given_up_leaves_nothing(folder: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]

    async def play() -> None:
        failing = ProcessProvider(sleeper)
        with pytest.raises(StartError, match=r"not ready after 0\.3 s"):
            await ByHand.from_env("a/b", use_docker=False, provider=failing, wait_timeout=0.3)
        assert failing._process is None
        given_up = ProcessProvider(sleeper)
        task = asyncio.create_task(ByHand.from_env("a/b", use_docker=False, provider=given_up))
        while given_up._process is None:
            await asyncio.sleep(0.01)
        process = given_up._process
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert process.poll() is not None

    asyncio.run(play())


def test_a_connection_that_fails_stops_what_was_started() -> None:
    with socket.socket() as mute:  # it listens and never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        provider = ProcessProvider([sys.executable, "-c", "import time; time.sleep(600)"])
        provider.start()
        client = ByHand(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout_s=0.3, provider=provider)
        with pytest.raises(ConnectError), client.sync():
            pass
        assert provider._process is None


def test_a_wrong_provider_is_told() -> None:
    async def wrong(**options: Any) -> None:
        await ByHand.from_env("a/b", **options)

    process = ProcessProvider(["true"])
    with pytest.raises(EnvSpecError, match="start_container"):
        asyncio.run(wrong(provider=process))
    with pytest.raises(EnvSpecError, match="revision: the provider was made already"):
        asyncio.run(wrong(provider=process, use_docker=False, revision="v2"))
    with pytest.raises(EnvSpecError, match="it is ORG/NAME"):
        asyncio.run(ByHand.from_env("echo"))


def test_a_client_needs_no_server(tmp_path: Path) -> None:
    program = """
        import sys
        import turnwise.openenv
        from turnwise.openenv import EnvClient, StepResult
        heavy = {"torch", "transformers", "uvicorn", "fastapi", "huggingface_hub", "openenv", "mcp"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        for name in turnwise.openenv.__all__:
            getattr(turnwise.openenv, name)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=tmp_path)
