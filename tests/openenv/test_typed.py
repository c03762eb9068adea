"""Environments written for OpenEnv, importing its package or ours, on our server, played by its clients."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import websockets
from fastapi import FastAPI
from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server.types import ConcurrencyConfig as TheirConfig
from openenv.core.env_server.types import ServerMode
from openenv.core.generic_client import GenericEnvClient
from pydantic import model_validator
from starlette.testclient import TestClient
from tests.openenv.serving import serving
from tests.openenv.written import PACKAGES, TYPED, written

from turnwise.cli.env_serve import served_as
from turnwise.envs import thread as threads
from turnwise.envs.thread import abandoned_threads
from turnwise.errors import ActionError, EnvError, EnvHungError, EnvSpecError
from turnwise.openenv import typed_session
from turnwise.openenv.models import Action, ConcurrencyConfig, Observation, State
from turnwise.openenv.models import StepResult as OurResult
from turnwise.openenv.server.create import HTTPEnvServer, create_app, create_fastapi_app
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.typed import TypedEnv
from turnwise.openenv.typed_class import written_for_openenv

both = pytest.mark.parametrize("package", PACKAGES)


def client_of(module: Any) -> type[EnvClient[Any, Any, Any]]:
    """A client as people write it: a subclass of theirs over the environment's own models."""

    class Client(EnvClient[Any, Any, Any]):
        def _step_payload(self, action: Any) -> dict[str, Any]:
            return {"number": action.number}

        def _parse_result(self, payload: dict[str, Any]) -> StepResult[Any]:
            seen = module.Told(
                hint=payload["observation"]["hint"],
                done=payload.get("done", False),
                reward=payload.get("reward"),
                metadata=payload.get("metadata", {}),
            )
            return StepResult(observation=seen, reward=payload.get("reward"), done=payload.get("done", False))

        def _parse_state(self, payload: dict[str, Any]) -> Any:
            return module.Game(**payload)

    return Client


@both
@pytest.mark.parametrize("kind", ["Guessing", "AsyncGuessing"])
def test_a_subclass_of_their_client_plays_a_whole_episode(package: str, kind: str) -> None:
    module = written(TYPED, package)
    app = create_app(getattr(module, kind), module.Guess, module.Told, env_name="guessing")

    async def play() -> None:
        async with serving(app) as url, client_of(module)(url) as env:
            first = await env.reset(seed=7, episode_id="mine")
            assert first.observation.hint == "guess" and first.reward is None and not first.done
            assert first.observation.metadata == {"level": 1}
            hints = []
            for number in (3, 8, 7):
                result = await env.step(module.Guess(number=number))
                hints.append((result.observation.hint, result.reward, result.done))
            assert hints == [("higher", 0.0, False), ("lower", 0.0, False), ("found", 1.0, True)]
            assert result.observation.metadata == {"tries": 3}
            state = await env.state()
            assert state.model_dump() == {
                "episode_id": "mine", "step_count": 3, "secret": 7, "guesses": [3, 8, 7]
            }  # fmt: skip

    asyncio.run(play())
    assert module.CLOSED == [1]


@both
def test_http_keeps_a_subclass_of_state_whole_and_sends_metadata(package: str) -> None:
    module = written(TYPED, package)
    app = create_app(module.Guessing, module.Guess, module.Told)
    with TestClient(app) as http:
        reset = http.post("/reset", json={"seed": 4, "episode_id": "a"}).json()
        assert reset == {
            "observation": {"hint": "guess"}, "reward": None, "done": False, "metadata": {"level": 1}
        }  # fmt: skip
        step = http.post("/step", json={"action": {"number": 4}, "episode_id": "a"}).json()
        assert step["observation"] == {"hint": "found"} and step["reward"] == 1.0 and step["done"] is True
        assert http.get("/state", params={"episode_id": "a"}).json()["guesses"] == [4]
        schemas = http.get("/schema").json()
        assert schemas["action"]["properties"]["number"]["maximum"] == 9
        assert "hint" in schemas["observation"]["properties"] and "secret" in schemas["state"]["properties"]
        assert http.get("/metadata").json()["name"] == "Guessing"
        wrong = http.post("/step", json={"action": {"number": 12}, "episode_id": "a"})
        assert wrong.status_code == 422 and wrong.json()["detail"][0]["loc"] == ["number"]


@both
def test_wrong_actions_and_errors_leave_the_session_alive(package: str) -> None:
    module = written(TYPED, package)

    async def play() -> None:
        app = create_app(module.Guessing, module.Guess, module.Told)
        async with serving(app) as url, websockets.connect(url.replace("http", "ws") + "/ws") as socket:

            async def ask(kind: str, data: Any = None) -> Any:
                await socket.send(json.dumps({"type": kind, "data": data or {}}))
                return json.loads(await socket.recv())

            await ask("reset", {"seed": 2})
            for action in ({"number": "many"}, {"numbr": 1}, {"number": 10}, {}):
                refused = (await ask("step", action))["data"]
                assert refused["code"] == "VALIDATION_ERROR" and refused["errors"][0]["loc"]
            raised = (await ask("step", {"number": 9}))["data"]
            assert raised["code"] == "EXECUTION_ERROR" and "nine is never it" in raised["message"]
            assert raised["kind"] == "EnvError"
            assert (await ask("step", {"number": 2}))["data"]["done"] is True

    asyncio.run(play())


@both
def test_an_environment_has_one_thread_for_life_and_one_for_all_where_it_asks(package: str) -> None:
    module = written(TYPED, package)

    async def play(kind: str) -> list[int]:
        module.THREADS.clear()
        env = TypedEnv.of(getattr(module, kind))
        first, second = [await env.open(), await env.open()]
        for session in (first, second):
            await session.reset({})
            await session.step({"number": 1})
            await session.state()
            await session.close()
        assert len(module.THREADS) == 10
        assert threading.get_ident() not in module.THREADS
        return module.THREADS

    own = asyncio.run(play("Guessing"))
    assert len(set(own)) == 2
    assert len(set(asyncio.run(play("OneThread")))) == 1


@both
def test_async_methods_run_on_the_loop_and_the_rest_on_the_thread(package: str) -> None:
    module = written(TYPED, package)

    async def play() -> None:
        session = await TypedEnv.of(module.AsyncGuessing).open()
        await session.reset({"seed": 1})
        await session.step({"number": 1})
        await session.close()
        here = threading.get_ident()
        assert [thread == here for thread in module.THREADS] == [False, True, True, False]

    asyncio.run(play())


def test_what_reset_takes_no_parameter_for_is_named() -> None:
    module = written(TYPED, "theirs")

    async def play() -> None:
        session = await TypedEnv.of(module.Guessing).open()
        answer = await session.reset({"seed": 1, "difficulty": "hard"})
        assert answer.metadata == {"level": 1, "ignored": ["difficulty"]}
        assert "ignored" not in (await session.reset({"seed": 1})).metadata
        await session.close()
        session = await TypedEnv.of(module.AsyncGuessing).open()  # Takes whatever comes.
        assert (await session.reset({"difficulty": "hard"})).metadata == {"level": 1}
        await session.close()

    asyncio.run(play())


class Picky(Action):
    value: int

    @model_validator(mode="after")
    def look_up(self) -> Picky:
        names: dict[int, str] = {}
        names[self.value]
        return self


def test_a_validator_that_breaks_is_the_environments_fault() -> None:
    async def play() -> None:
        session = await TypedEnv(Odd, Picky).open()
        with pytest.raises(EnvError, match="its action's validators: KeyError"):
            await session.step({"value": 3})
        with pytest.raises(ActionError, match="valid integer"):
            await session.step({"value": "three"})
        await session.close()

    asyncio.run(play())


class Anything(Action):
    value: Any = None


class Seen(Observation):
    value: Any = None


class Odd:
    """No base class at all; what it returns is what it is given, or what that names."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    closed = 0
    free = threading.Event()

    def __init__(self) -> None:
        self.steps = 0

    def reset(self) -> Seen:
        return Seen(value=0)

    def step(self, action: Anything) -> Any:
        self.steps += 1
        odd: Mapping[str, Any] = {
            "nan": Seen(value={"a": float("nan"), "b": [float("inf")]}, reward=float("nan")),
            "numpy": Seen(value=np.arange(3), reward=np.float64(0.5)),
            "unsendable": Seen(metadata={"thread": threading.current_thread(), "tries": 2}),
            "true": Seen(reward=True),
            "mapping": {"value": 3, "reward": 2, "done": True},
            "nothing": None,
            "words": Seen.model_construct(value=1, reward="much", done=False, metadata={}),
        }
        if action.value == "hang":
            self.free.wait(60)
        if action.value == "exit":
            raise SystemExit(3)
        return odd[action.value]

    @property
    def state(self) -> State:
        return State(step_count=self.steps, extra={"a": 1})

    def close(self) -> None:
        Odd.closed += 1


def odd_answer(value: str) -> Mapping[str, Any]:
    async def ask() -> Any:
        async with serving(create_app(Odd, Anything, Seen)) as url, GenericEnvClient(url) as env:
            await env._send({"type": "step", "data": {"value": value}})
            return await env._receive()

    return asyncio.run(ask())


def test_nan_is_null_and_numpy_is_lists() -> None:
    assert odd_answer("nan")["data"] == {
        "observation": {"value": {"a": None, "b": [None]}}, "reward": None, "done": False, "metadata": {}
    }  # fmt: skip
    answer = odd_answer("numpy")["data"]
    assert answer["observation"]["value"] == [0, 1, 2] and answer["reward"] == 0.5


def test_metadata_that_is_no_json_is_named_and_the_rest_is_sent() -> None:
    assert odd_answer("unsendable")["data"]["metadata"] == {"not_json": ["thread"], "tries": 2}


def test_a_reward_may_be_true_and_an_observation_a_mapping() -> None:
    assert odd_answer("true")["data"]["reward"] is True  # As openenv-core sends it.
    answer = odd_answer("mapping")["data"]
    assert (answer["observation"], answer["reward"], answer["done"]) == ({"value": 3}, 2.0, True)


@pytest.mark.parametrize(
    ("value", "said"),
    [("nothing", "step returned NoneType; return an Observation"), ("words", "'much', which is no number"),
     ("exit", "sys.exit(3)"), ("unknown", "KeyError")],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_of_the_environment(value: str, said: str) -> None:
    answer = odd_answer(value)
    assert answer["type"] == "error" and answer["data"]["code"] == "EXECUTION_ERROR"
    assert said in answer["data"]["message"]


def test_a_step_that_hangs_ends_its_environment_and_no_other() -> None:
    async def play() -> None:
        env = TypedEnv(Odd, Anything, Seen)
        hung, other = await env.open(), await env.open()
        with pytest.raises(EnvHungError, match=r"did not return within 0\.5 s"):
            await hung.step({"value": "hang"}, seconds=0.5)
        with pytest.raises(EnvHungError, match="hangs in an earlier call"):
            await hung.step({"value": "true"})
        began = time.perf_counter()
        await hung.close()
        assert time.perf_counter() - began < 20  # Its step goes on for a minute.
        assert (await other.step({"value": "true"})).reward == 1.0
        await other.close()

    Odd.free.clear()
    try:
        asyncio.run(play())
    finally:
        Odd.free.set()


def test_a_coroutine_that_overruns_is_stopped_and_its_environment_goes_on() -> None:
    class Slow(Odd):
        async def step_async(self, action: Anything) -> Seen:
            if action.value == "cancelled":
                raise asyncio.CancelledError
            await asyncio.sleep(0 if action.value == "fast" else 30)
            return Seen(value=action.value)

    async def play() -> None:
        session = await TypedEnv(Slow, Anything, Seen, call_seconds=4.0).open()
        with pytest.raises(EnvError, match=r"did not finish within 4 s"):
            await session.step({"value": "slow"})
        with pytest.raises(EnvError, match="cancelled itself"):
            await session.step({"value": "cancelled"})
        assert (await session.step({"value": "fast"})).observation == {"value": "fast"}
        await session.close()

    asyncio.run(play())


def test_timeout_s_reaches_a_step_that_takes_it() -> None:
    class Timed(Odd):
        def step(self, action: Anything, timeout_s: float | None = None) -> Seen:
            time.sleep(timeout_s or 0.0)  # It keeps the deadline itself, and says so on time.
            return Seen(value=timeout_s)

    async def play() -> None:
        timed, other = await TypedEnv(Timed, Anything).open(), await TypedEnv(Odd, Anything).open()
        assert (await timed.step({}, seconds=0.2)).observation == {"value": 0.2}
        assert (await timed.step({})).observation == {"value": None}
        assert (await other.step({"value": "true"}, seconds=2.5)).reward == 1.0
        await timed.close()
        await other.close()

    asyncio.run(play())


def test_a_constructor_that_raises_or_is_slow_is_its_own_sessions_alone() -> None:
    slow, begun, free = (threading.Event() for _ in range(3))
    freed: list[bool] = []

    class Heavy(Odd):
        def __init__(self) -> None:
            super().__init__()
            if slow.is_set():
                begun.set()
                freed.append(free.wait(20))

    async def play() -> None:
        async with serving(create_app(Heavy, Anything, Seen)) as url, GenericEnvClient(url) as env:
            await env.reset()
            slow.set()
            opening = asyncio.create_task(GenericEnvClient(url).reset())
            while not begun.is_set():
                await asyncio.sleep(0.01)
            for _ in range(3):
                assert (await env.step({"value": "true"})).reward == 1.0
            assert not opening.done()
            free.set()
            await opening
            assert freed == [True]

        def broken() -> Any:
            raise OSError("no display")

        with pytest.raises(EnvError, match="constructor: OSError: no display"):
            await TypedEnv(broken, Anything).open()

    asyncio.run(play())


class Heavy(Odd):
    """Slow to make, slow to step, slow to close: until it is free to."""

    free: ClassVar = {"make": threading.Event(), "step": threading.Event(), "close": threading.Event()}
    log: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.free["make"].wait(30)
        self.log.append("made")

    def step(self, action: Anything) -> Seen:
        if action.value == "hang":
            self.free["step"].wait(60)
        else:
            time.sleep(action.value or 0.0)
        return Seen()

    def close(self) -> None:
        self.log.append("closed")
        self.free["close"].wait(30)


class OneForAll(Heavy):
    REQUIRES_SINGLE_THREAD_EXECUTOR = True


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> type[Heavy]:
    monkeypatch.setattr(Heavy, "log", [])
    for event in Heavy.free.values():
        event.set()
    monkeypatch.setattr(typed_session, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(typed_session, "TURN_SECONDS", 0.1)
    return Heavy


async def settled(log: list[str], expected: list[str]) -> None:
    end = time.monotonic() + 10
    while log != expected and time.monotonic() < end:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert log == expected


@pytest.mark.parametrize("ended", ["cancelled", "overran"])
def test_one_that_nobody_waits_for_any_more_is_closed_when_it_is_made(heavy: type[Heavy], ended: str) -> None:
    async def play() -> None:
        heavy.free["make"].clear()
        env = TypedEnv(heavy, Anything, call_seconds=20.0 if ended == "cancelled" else 0.1)
        opening = asyncio.create_task(env.open())
        await asyncio.sleep(0.05)
        if ended == "cancelled":
            opening.cancel()
        with pytest.raises((asyncio.CancelledError, EnvHungError)):
            await opening
        assert heavy.log == []
        heavy.free["make"].set()
        await settled(heavy.log, ["made", "closed"])

    asyncio.run(play())


def test_a_close_that_overruns_is_not_done_again(heavy: type[Heavy]) -> None:
    async def play() -> None:
        heavy.free["close"].clear()
        session = await TypedEnv(heavy, Anything).open()
        await session.close()
        assert abandoned_threads() == len(threads._abandoned) and session._thread in threads._abandoned
        heavy.free["close"].set()
        session._thread._thread.join(10)
        assert not session._thread.alive and heavy.log == ["made", "closed"]

    asyncio.run(play())


def test_on_a_thread_for_all_a_close_that_waits_for_anothers_step_harms_nobody(heavy: type[Heavy]) -> None:
    async def play() -> None:
        heavy.free["step"].clear()
        env = TypedEnv(OneForAll, Anything)
        first, second = await env.open(), await env.open()
        stepping = asyncio.create_task(first.step({"value": "hang"}))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(second.close(), 20)
        assert not stepping.done()
        heavy.free["step"].set()
        await stepping
        await first.step({"value": 0.0})
        await settled(heavy.log, ["made", "made", "closed"])
        await first.close()
        await settled(heavy.log, ["made", "made", "closed", "closed"])

    asyncio.run(play())


def test_on_a_thread_for_all_a_step_s_clock_starts_with_it(heavy: type[Heavy]) -> None:
    async def play() -> None:
        env = TypedEnv(OneForAll, Anything, call_seconds=4.5)
        sessions = [await env.open() for _ in range(8)]
        # The last begins when its deadline would be over; each may take so much longer as a machine pauses.
        await asyncio.gather(*(session.step({"value": 0.65}) for session in sessions))
        for session in sessions:
            await session.close()

    asyncio.run(play())


def test_a_thread_for_all_that_hangs_is_told_at_once_and_all_are_closed_when_it_returns(
    heavy: type[Heavy],
) -> None:
    async def play() -> None:
        before = abandoned_threads()  # Of other tests, which may come to an end meanwhile.
        heavy.free["step"].clear()
        env = TypedEnv(OneForAll, Anything)
        hung, waiting, idle = [await env.open() for _ in range(3)]
        told = await asyncio.gather(
            hung.step({"value": "hang"}, seconds=0.5), waiting.step({"value": 0.0}), return_exceptions=True
        )
        assert [type(one) for one in told] == [EnvHungError, EnvHungError]
        assert "0.5 s" in str(told[0]) and "an earlier call" in str(told[1])
        began = time.perf_counter()
        with pytest.raises(EnvHungError, match="thread was stopped"):
            await idle.step({"value": 0.0})
        assert time.perf_counter() - began < 20  # And not the minute that the thread is busy for.
        fresh = await env.open()  # On a thread of its own age.
        await fresh.step({"value": 0.0})
        for session in (hung, waiting, idle, fresh):
            await session.close()
        heavy.free["step"].set()
        await settled(heavy.log, ["made"] * 4 + ["closed"] * 4)
        deadline = time.monotonic() + 10
        while abandoned_threads() > before and time.monotonic() < deadline:
            # The last `close` has written its line, and its thread may still be in it.
            await asyncio.sleep(0.01)
        assert abandoned_threads() <= before

    asyncio.run(play())


def test_closed_once_whoever_ends_the_session() -> None:
    async def play() -> None:
        Odd.closed = 0
        session = await TypedEnv(Odd, Anything).open()
        await session.close()
        await session.close()
        assert Odd.closed == 1

    asyncio.run(play())


# -- create_app ----------------------------------------------------------------------------------------


@both
def test_many_sessions_where_the_class_supports_them_and_one_where_it_does_not(package: str) -> None:
    module = written(TYPED, package)
    made = [module.Guess, module.Told]
    assert create_app(module.Guessing, *made).state.sessions.limit == 1024
    assert create_app(module.Guessing, *made, max_concurrent_envs=3).state.sessions.limit == 3
    assert create_app(module.Alone, *made).state.sessions.limit == 1
    assert create_app(lambda: module.Alone(), *made).state.sessions.limit == 1
    for config in (TheirConfig, ConcurrencyConfig):
        app = create_app(
            module.Guessing,
            *made,
            concurrency_config=config(max_concurrent_envs=5, session_timeout=30.0),
        )
        assert (app.state.sessions.limit, app.state.sessions.settings.idle_timeout) == (5, 30.0)
    with pytest.raises(EnvSpecError, match="not marked as SUPPORTS_CONCURRENT_SESSIONS"):
        create_app(module.Alone, *made, max_concurrent_envs=2)
    with pytest.raises(EnvSpecError, match="both"):
        create_app(
            module.Guessing,
            *made,
            max_concurrent_envs=2,
            concurrency_config=TheirConfig(max_concurrent_envs=2),
        )
    with pytest.raises(EnvSpecError, match="its class or a function"):
        create_app(module.Guessing(), *made)


def test_what_a_class_alone_says_of_its_models() -> None:
    module = written(TYPED, "theirs")
    env = TypedEnv.of(module.Guessing)
    assert env.action is module.Guess and env.observation is module.Told

    class Unsaid(Odd):
        def step(self, action):  # type: ignore[no-untyped-def]
            return Seen()

    with pytest.raises(EnvSpecError, match="cannot tell its actions"):
        TypedEnv.of(Unsaid)
    assert written_for_openenv(module.Guessing) and not written_for_openenv(dict)


def test_the_command_line_serves_classes_by_file_and_by_module(tmp_path: Path) -> None:
    file = tmp_path / "guessing.py"
    file.write_text(TYPED.format(**PACKAGES["theirs"]))
    found = served_as(f"{file}:Guessing", {}, Settings(mode="production"))
    assert isinstance(found, TypedEnv) and found.name == "Guessing" and found.mode == "production"
    assert found.max_sessions is None
    assert served_as(f"{file}:Alone", {}, Settings()).max_sessions == 1
    assert served_as("catch", {"rows": 4}, Settings()).name == "catch"
    assert served_as("reasoning_gym:chain_sum", {}, Settings()).name == "reasoning_gym:chain_sum"
    with pytest.raises(EnvSpecError, match="has no 'Gessing'"):
        served_as(f"{file}:Gessing", {}, Settings())


def test_values_that_only_models_write_are_written_as_models_do() -> None:
    class Wide(Odd):
        def step(self, action: Anything) -> Seen:
            return Seen(value=[{1}, b"raw", Decimal("1.5"), Path("a/b"), Seen(reward=1.0)])

    async def ask() -> Any:
        async with serving(create_app(Wide, Anything, Seen)) as url, GenericEnvClient(url) as env:
            return (await env.step({})).observation["value"]

    *plain, model = asyncio.run(ask())
    assert plain == [[1], "raw", "1.5", "a/b"] and model["reward"] == 1.0


def test_a_factory_that_cannot_be_tried_holds_one_session(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise OSError("no display")

    assert create_app(broken, Anything, Seen).state.sessions.limit == 1
    assert "no display" in caplog.text


def test_gradio_is_told_to_be_unused(caplog: pytest.LogCaptureFixture) -> None:
    create_app(Odd, Anything, Seen, gradio_builder=lambda *_: None)
    assert "Gradio" in caplog.text


@pytest.mark.parametrize("mode", ["production", "PRODUCTION", ServerMode.PRODUCTION])
def test_in_production_mode_nobody_controls_an_episode(mode: Any) -> None:
    app = create_app(Odd, Anything, Seen, mode=mode)
    with TestClient(app) as http:
        for method, path in (("POST", "/reset"), ("POST", "/step"), ("GET", "/state")):
            assert http.request(method, path, json={"action": {"value": "true"}}).status_code == 404
        for path in ("/health", "/schema", "/metadata"):
            assert http.get(path).status_code == 200
        with http.websocket_connect("/ws") as socket:
            for kind in ("reset", "step", "state", "turnwise"):
                socket.send_json({"type": kind, **({} if kind == "state" else {"data": {"value": "true"}})})
                refused = socket.receive_json()
                assert refused["type"] == "error" and refused["data"]["code"] == "UNKNOWN_TYPE"
            rpc = {"jsonrpc": "2.0", "method": "tools/list", "id": 1}
            socket.send_json({"type": "mcp", "data": rpc})
            assert socket.receive_json()["data"]["result"] == {"tools": []}
    with pytest.raises(EnvSpecError, match="Must be one of: simulation, production"):
        create_app(Odd, Anything, Seen, mode="training")


def test_an_application_with_routes_of_its_own_speaks_openenv_too() -> None:
    entered = []

    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        entered.append("in")
        yield
        entered.append("out")

    app = FastAPI(lifespan=lifespan)
    HTTPEnvServer(env=Odd, action_cls=Anything, observation_cls=Seen).register_routes(app)

    @app.get("/mine")
    def mine() -> str:
        return "mine"

    with TestClient(app) as http:
        assert http.get("/mine").json() == "mine"
        assert http.post("/step", json={"action": {"value": "true"}}).json()["reward"] == 1.0
    assert entered == ["in", "out"]
    with TestClient(create_fastapi_app(Odd, Anything, Seen)) as http:
        assert http.get("/health").json() == {"status": "healthy"}


def test_actions_are_refused_before_the_environment_sees_them() -> None:
    async def play() -> None:
        session = await TypedEnv(Odd, Anything).open()
        with pytest.raises(ActionError):
            await session.step({"wrong": 1})
        with pytest.raises(ActionError, match="answers no 'reward'"):
            await session.ask("reward", {})
        assert await session.state() == {"episode_id": None, "step_count": 0, "extra": {"a": 1}}
        await session.close()

    asyncio.run(play())


def test_a_result_as_clients_have_it_is_unwrapped() -> None:
    class Wrapping(Odd):
        def step(self, action: Anything) -> Any:
            inner = Seen(value=1, reward=0.5, metadata={"tries": 2})
            if action.value == "ours":
                return OurResult(observation=inner, reward=2, metadata={"by": "ours"})
            return (
                StepResult({"value": 1}, done=True)
                if action.value == "mapping"
                else StepResult(inner, done=True)
            )

    async def play() -> None:
        session = await TypedEnv(Wrapping, Anything, Seen).open()
        ours = await session.step({"value": "ours"})
        assert (ours.observation["value"], ours.reward, ours.done) == (1, 2, False)
        assert "observation" not in ours.observation and ours.metadata == {"tries": 2, "by": "ours"}
        theirs = await session.step({"value": "theirs"})
        assert (theirs.observation["value"], theirs.reward, theirs.done) == (1, 0.5, True)
        mapping = await session.step({"value": "mapping"})
        assert (mapping.observation, mapping.reward, mapping.done) == ({"value": 1}, None, True)
        await session.close()

    asyncio.run(play())


@pytest.mark.parametrize(("paid", "sent"), [(1, "1"), (1.0, "1.0"), (True, "true"), (np.int64(2), "2.0")])
def test_a_reward_is_sent_as_it_is_paid(paid: Any, sent: str) -> None:
    """A whole number stays one, as in openenv-core."""

    class Paying(Odd):
        def step(self, action: Anything) -> Any:
            return Seen.model_construct(value=0, reward=paid, done=False, metadata={})

    with TestClient(create_app(Paying, Anything, Seen)) as http:
        assert f'"reward":{sent},' in http.post("/step", json={"action": {}}).text
