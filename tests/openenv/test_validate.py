"""`turnwise env validate`: good servers pass, whoever wrote them; each fault is named by its own check."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import Field, field_validator
from tests.openenv.serving import running
from typer.testing import CliRunner

from turnwise.cli.env_new import scaffold
from turnwise.cli.env_validate import read_action, target_of
from turnwise.cli.main import app as cli
from turnwise.errors import EnvSpecError
from turnwise.openenv import Action, Environment, Observation, State, create_app
from turnwise.openenv.hosted import hosted
from turnwise.openenv.server.app import create_server_app
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.validate import Options, Report, validate
from turnwise.openenv.validate.sample import sample


class Add(Action):
    number: int = Field(ge=1, le=3)


class Total(Observation):
    total: int = 0


class Adder(Environment):  # type: ignore[type-arg]
    """A good one; those below differ from it in one thing."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.episode_id: str | None = None

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        self.total, self.episode_id = random.Random(seed).randrange(1000), episode_id
        return Total(total=self.total)

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Total:
        self.total += action.number
        return Total(total=self.total, reward=1.0)

    @property
    def state(self) -> State:
        return State(episode_id=self.episode_id)


class Unseeded(Adder):
    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        return super().reset(None, episode_id)


class Forgetful(Adder):
    """Its reset clears nothing."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        self.total += random.Random(seed).randrange(1000)
        self.episode_id = episode_id
        return Total(total=self.total)


class Sharing(Adder):
    """All instances count in one place."""

    totals: ClassVar[list[int]] = [0]

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        first = super().reset(seed, episode_id)
        self.totals[0] = first.total
        return first

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Total:
        self.totals[0] += action.number
        return Total(total=self.totals[0], reward=1.0)


class Same(Adder):
    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        return super().reset(0, episode_id)


class Nameless(Adder):
    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Total:
        return super().reset(seed, None)


class Alone(Adder):
    SUPPORTS_CONCURRENT_SESSIONS = False


def outcomes(report: Report) -> dict[str, str]:
    """Those that are not well: id → outcome."""
    return {one.id: one.outcome for one in report.findings if one.outcome != "ok"}


def look(app: Any, **options: Any) -> Report:
    with running(app) as server:
        return asyncio.run(validate(server.url, Options(seconds=options.pop("seconds", 20.0), **options)))


@pytest.mark.parametrize("spec", ["catch", "guess_number"])
def test_our_own_environments_pass(spec: str) -> None:
    report = look(create_server_app(hosted(spec)))
    assert outcomes(report) == {} and report.ok
    assert {one.topic for one in report.findings} == {"conformance", "seeds", "concurrency", "leaks"}


@pytest.mark.parametrize(
    ("env", "wrong"),
    [
        (Adder, {}),
        (Unseeded, {"seed_repeats": "error", "isolation": "skipped"}),
        (Forgetful, {"reset_clears": "error"}),
        (Sharing, {"isolation": "error"}),
        (Same, {"seeds_differ": "warning"}),
        (Nameless, {"episode_id": "warning"}),
        (Alone, {"sessions": "error", "isolation": "skipped"}),
    ],
)
def test_each_fault_is_named(env: type[Adder], wrong: dict[str, str]) -> None:
    settings = Settings(queue=0) if env is Alone else None  # who refuses at once, as openenv-core does
    report = look(create_app(env, Add, Total, env_name="adder", settings=settings), sessions=4)
    found = outcomes(report)
    if env is Forgetful:  # its episodes in one session are not what they are alone, which shows there too
        found.pop("isolation")
    assert found == wrong
    assert report.ok == ("error" not in wrong.values())
    assert all(one.advice for one in report.findings if one.outcome in ("warning", "error"))


def test_a_server_of_openenv_core_passes() -> None:
    from openenv.core.env_server.http_server import create_app as their_app
    from openenv.core.env_server.interfaces import Environment as TheirEnvironment
    from openenv.core.env_server.types import Action as TheirAction
    from openenv.core.env_server.types import Observation as TheirObservation
    from openenv.core.env_server.types import State as TheirState

    class TheirAdd(TheirAction):
        number: int

    class TheirTotal(TheirObservation):
        total: int = 0

    class TheirAdder(TheirEnvironment):  # type: ignore[type-arg]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: Any = None, episode_id: Any = None, **more: Any) -> Any:
            self.total, self.id = random.Random(seed).randrange(1000), episode_id
            return TheirTotal(total=self.total)

        def step(self, action: Any, timeout_s: Any = None, **more: Any) -> Any:
            self.total += action.number
            return TheirTotal(total=self.total, reward=1.0)

        @property
        def state(self) -> Any:
            return TheirState(episode_id=self.id)

    report = look(their_app(TheirAdder, TheirAdd, TheirTotal, max_concurrent_envs=8), sessions=4)
    assert outcomes(report) == {}
    # Its default of one session is refused by closing, which is an error for training.
    report = look(their_app(TheirAdder, TheirAdd, TheirTotal, max_concurrent_envs=1), sessions=4)
    assert outcomes(report) == {"sessions": "error", "isolation": "skipped"}


def leaky(places: int) -> FastAPI:
    """A server that counts a session as over when its client says so, and only then."""
    app, live = FastAPI(version="1.0.0"), [0]
    empty: dict[str, Any] = {}
    for path in ("/reset", "/step"):
        app.post(path)(lambda: empty)
    app.get("/state")(lambda: empty)
    app.get("/health")(lambda: {"status": "healthy"})
    app.get("/metadata")(lambda: {"name": "leaky", "description": "It leaks."})
    app.get("/schema")(lambda: {"action": empty, "observation": empty, "state": empty})
    app.post("/mcp")(lambda: {"jsonrpc": "2.0"})

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        if live[0] == places:
            await socket.send_json({"type": "error", "data": {"code": "CAPACITY_REACHED", "message": "full"}})
            await socket.close()
            return
        live[0] += 1
        seed = 0
        try:
            while True:
                try:
                    message = json.loads(await socket.receive_text())
                except ValueError:
                    await socket.send_json({"type": "error", "data": {"code": "INVALID_JSON"}})
                    continue
                kind = message["type"]
                if kind == "close":
                    live[0] -= 1
                    await socket.close()
                    return
                if kind == "reset":
                    seed = message["data"]["seed"]
                answer: dict[str, Any] = {"type": "error", "data": {"code": "UNKNOWN_TYPE"}}
                if kind in ("reset", "step"):
                    observation = {"seed": seed}
                    answer = {"type": "observation", "data": {"observation": observation, "done": False}}
                elif kind == "state":
                    answer = {"type": "state", "data": {"episode_id": None, "step_count": 0}}
                await socket.send_json(answer)
        except WebSocketDisconnect:
            return

    return app


def test_places_that_do_not_come_back_are_a_leak() -> None:
    report = look(leaky(12), sessions=4, seconds=5.0)
    found = outcomes(report)
    assert found["dropped"] == "error", report
    assert found["bad_action"] == found["episode_id"] == "warning"
    (dropped,) = (one for one in report.findings if one.id == "dropped")
    assert "8 clients vanished" in dropped.found


def test_who_does_not_answer_is_told() -> None:
    mute = FastAPI(version="1.0.0")
    mute.get("/health")(lambda: {"status": "healthy"})

    @mute.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            pass

    report = look(mute, seconds=4.0)
    found = outcomes(report)
    assert found["metadata"] == found["schema"] == found["mcp"] == "error"
    last = report.findings[-1]
    assert last.id == "answers" and "no answer to reset within 4 s" in last.found
    nobody = asyncio.run(validate("http://127.0.0.1:9", Options(seconds=1.0)))
    assert [one.id for one in nobody.findings] == ["health"] and not nobody.ok


def test_a_token_is_brought() -> None:
    app = create_server_app(hosted("catch"), settings=Settings(token="abc"))
    with running(app) as server:
        assert not asyncio.run(validate(server.url, Options())).ok
        assert asyncio.run(validate(server.url, Options(token="abc"))).ok


# Packages


def test_a_new_package_passes(tmp_path: Path) -> None:
    scaffold("web_shop", tmp_path)
    (tmp_path / "web_shop/uv.lock").write_text("version = 1\n")  # `turnwise env new` has uv write it
    report = asyncio.run(validate(tmp_path / "web_shop", Options(start_seconds=120)))
    assert outcomes(report) == {}
    assert {"memory", "threads", "files", "starts", "package"} <= {one.id for one in report.findings}


def test_what_sessions_leave_behind_is_measured(tmp_path: Path) -> None:
    scaffold("web_shop", tmp_path)
    folder = tmp_path / "web_shop"
    (folder / "environment.py").write_text(
        "import threading\n"
        "from turnwise.envs import Env\n"
        "KEPT = []\n"
        "class WebShop(Env):\n"
        "    inline = True\n"
        "    def __init__(self):\n"
        "        KEPT.append((open(__file__), bytearray(b'a' * (3 << 20))))\n"
        "        threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    def tasks(self, split):\n"
        "        return [{'number': number} for number in range(9)]\n"
        "    def reset(self, task):\n"
        "        return str(task['number'])\n"
    )
    report = asyncio.run(validate(folder, Options(start_seconds=120)))
    assert outcomes(report) == {"lock": "error", "memory": "error", "threads": "error", "files": "error"}


def test_a_package_is_given_none_of_our_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaffold("web_shop", tmp_path)
    (tmp_path / "web_shop/server/app.py").write_text("import os\nraise SystemExit(sorted(os.environ))\n")
    for name in ("HF_TOKEN", "TURNWISE_TOKEN", "SHOP_KEY"):
        monkeypatch.setenv(name, "secret")
    (starts,) = [
        one for one in asyncio.run(validate(tmp_path / "web_shop", Options())).findings if one.id == "starts"
    ]
    assert "'SHOP_KEY'" in starts.found and "_TOKEN'" not in starts.found


def test_a_package_that_does_not_start_says_why(tmp_path: Path) -> None:
    scaffold("web_shop", tmp_path)
    folder = tmp_path / "web_shop"
    (folder / "server/app.py").write_text("import no_such_module\n")
    (folder / "pyproject.toml").write_text("[project]\nname = 'a'\ndependencies = ['numpy']\n")
    report = asyncio.run(validate(folder, Options()))
    assert outcomes(report) == dict.fromkeys(("script", "dependency", "lock", "main", "starts"), "error")
    assert "No module named 'no_such_module'" in report.findings[-1].found
    empty = asyncio.run(validate(tmp_path, Options()))
    assert outcomes(empty) == {"package": "error", "pyproject": "error"}


# The command


def test_the_command_prints_a_table_or_json_and_tells_by_its_exit_code() -> None:
    with running(create_server_app(hosted("catch"))) as good, running(leaky(12)) as bad:
        done = CliRunner().invoke(cli, ["env", "validate", good.url])
        assert done.exit_code == 0 and "ready to train on" in done.output and "concurrency" in done.output
        done = CliRunner().invoke(cli, ["env", "validate", bad.url, "--sessions", "4", "--seconds", "4"])
        assert done.exit_code == 1 and "1 error, " in done.output
        assert "end a session when its socket is lost" in " ".join(done.output.split())
        done = CliRunner().invoke(
            cli, ["env", "validate", bad.url, "--sessions", "4", "--seconds", "4", "--json"]
        )
        report = json.loads(done.stdout)
        assert done.exit_code == 1 and not report["ok"] and report["target"] == bad.url
        assert report["errors"] == len([one for one in report["findings"] if one["outcome"] == "error"])


def test_an_action_can_be_given() -> None:
    class Two(Action):
        number: int

        @field_validator("number")
        @classmethod
        def two(cls, number: int) -> int:
            if number != 2:
                raise ValueError("two, please")
            return number

    app = create_app(Adder, Two, Total, env_name="picky")
    assert outcomes(look(app, sessions=2)).items() >= {"step": "warning", "seed_repeats": "skipped"}.items()
    assert outcomes(look(app, sessions=2, action={"number": 2})) == {}
    assert read_action('{"number": 2}') == {"number": 2} and read_action(None) is None
    for text, said in (("{", "is no JSON"), ("[1]", "is an object")):
        with pytest.raises(EnvSpecError, match=said):
            read_action(text)
    assert target_of("127.0.0.1:8000") == "127.0.0.1:8000"
    with pytest.raises(EnvSpecError, match="no folder, and no address"):
        target_of("no-such-folder")


def test_an_environment_that_raises_is_an_error_and_nothing_is_said_of_its_seeds() -> None:
    class Raising(Adder):
        def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Total:
            raise RuntimeError("no board")

    report = look(create_app(Raising, Add, Total, env_name="raising"), sessions=2)
    wrong = {one.id: one for one in report.findings if one.outcome != "ok"}
    assert not report.ok and {id: one.outcome for id, one in wrong.items()} == {
        "step": "error", "seed_repeats": "skipped", "isolation": "skipped",
    }  # fmt: skip
    assert "the environment raised:" in wrong["step"].found and "no board" in wrong["step"].found
    assert "--action" not in wrong["step"].advice and "EXECUTION_ERROR" in wrong["seed_repeats"].found


def test_actions_are_sampled_from_schemas() -> None:
    schema = {
        "$defs": {"Kind": {"enum": ["up", "down"]}},
        "properties": {
            "type": {"const": "move", "default": "move"},
            "kind": {"$ref": "#/$defs/Kind"},
            "steps": {"type": "integer", "minimum": 2, "maximum": 3},
            "note": {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]},
            "items": {"type": "array", "minItems": 1, "items": {"type": "number", "exclusiveMinimum": 0}},
            "optional": {"type": "string"},
        },
        "required": ["kind", "steps", "note", "items"],
    }
    made = [sample(schema, random.Random(seed)) for seed in range(20)]
    assert {one["kind"] for one in made} == {"up", "down"} and {one["steps"] for one in made} == {2, 3}
    for one in made:
        assert one["type"] == "move" and one["note"] == "aa" and "optional" not in one
        assert len(one["items"]) == 1 and one["items"][0] > 0
    assert sample(schema, random.Random(3)) == made[3]
    for bounds, allowed in (
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, lambda x: 0 < x < 1),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, lambda x: 0 < x <= 0.5),
        ({"minimum": 0.5, "maximum": 0.5}, lambda x: x == 0.5),
        ({"minimum": 2, "exclusiveMinimum": 3, "maximum": 9, "exclusiveMaximum": 5}, lambda x: x == 4),
        ({"maximum": -5}, lambda x: x <= -5),
        ({}, lambda x: 0 <= x <= 100),
    ):
        numbers = [sample({"type": "number", **bounds}, random.Random(seed)) for seed in range(20)]
        assert all(map(allowed, numbers)), (bounds, numbers)
    for seed in range(20):
        assert (
            2.5 < sample({"type": "integer", "exclusiveMinimum": 2.5, "maximum": 4}, random.Random(seed)) <= 4
        )
    assert sample({"properties": {"any": True}, "required": ["any"]}, random.Random(0)) == {"any": None}
    recursive = {
        "$ref": "#/$defs/A",
        "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}},
    }
    assert sample(recursive, random.Random(0))["a"]
