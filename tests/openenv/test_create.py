"""`create_app` of Turnwise's own environments, and of classes that say their models themselves."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from fastapi import FastAPI
from openenv.core.env_server.mcp_types import CallToolAction
from openenv.core.mcp_client import MCPToolClient
from starlette.testclient import TestClient
from tests.openenv.serving import serving
from tests.openenv.written import TYPED, written

from turnwise import Env, tool
from turnwise.envs.library.catch import Catch
from turnwise.errors import EnvSpecError
from turnwise.openenv import HTTPEnvServer, create_app, create_fastapi_app
from turnwise.openenv.models import CallToolObservation


class Sleeper(Env):
    """Takes its time."""

    def reset(self, task: object) -> str:
        return "go"

    @tool
    async def sleep(self, seconds: float) -> str:
        """Sleep."""
        await asyncio.sleep(seconds)
        return "slept"


def test_their_client_plays_an_environment_of_ours_by_its_class_alone() -> None:
    async def play() -> None:
        app = create_app(partial(Catch, rows=4), env_name="ball", max_concurrent_envs=2)
        assert (app.title, app.state.sessions.limit) == ("ball", 2)
        async with serving(app) as url, MCPToolClient(url) as env:
            await env.reset(seed=3)
            assert [one.name for one in await env.list_tools()] == ["move"]
            act = CallToolAction(tool_name="move", arguments={"direction": "stay"})
            assert [(await env.step(act)).done for _ in range(3)] == [False, False, True]

    asyncio.run(play())


def test_in_every_form_of_it() -> None:
    with TestClient(create_fastapi_app(Catch)) as http:
        assert http.post("/reset", json={"split": "train", "index": 1}).status_code == 200
    host = FastAPI()
    HTTPEnvServer(Catch).register_routes(host, mode="production")
    with TestClient(host) as http:
        assert http.post("/reset").status_code == 404
        assert http.get("/schema").json()["action"]["properties"]["tool_name"] == {"enum": ["move"]}


def test_a_call_has_the_deadline_that_was_said() -> None:
    with TestClient(create_app(Sleeper, call_seconds=3.0)) as http:
        http.post("/reset")
        act = {"type": "call_tool", "tool_name": "sleep", "arguments": {"seconds": 30}}
        error = http.post("/step", json={"action": act}).json()["observation"]["error"]
        assert error["error_type"] == "timeout"


def test_what_has_no_meaning_for_one_of_ours_is_refused() -> None:
    with pytest.raises(EnvSpecError, match=r"leave out .* create_app\(Catch\)"):
        create_app(Catch, CallToolAction, CallToolObservation)
    with pytest.raises(EnvSpecError, match="by name"):
        create_app(partial(Catch, 4))
    with pytest.raises(EnvSpecError, match="columms"):
        create_app(partial(Catch, columms=4))


@pytest.mark.parametrize("package", ["theirs", "ours"])
def test_a_class_written_for_openenv_says_its_models_itself(package: str) -> None:
    module = written(TYPED, package)
    with TestClient(create_app(module.Guessing)) as http:
        assert http.get("/schema").json()["action"]["properties"]["number"]["maximum"] == 9
        http.post("/reset", json={"seed": 4})
        assert http.post("/step", json={"action": {"number": 11}}).status_code == 422
        assert http.post("/step", json={"action": {"number": 4}}).json()["done"]
