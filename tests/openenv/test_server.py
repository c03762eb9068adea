"""The server, played by OpenEnv's own clients: whole episodes of catch, echo and reasoning_gym."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openenv.cli._validation import validate_running_environment
from openenv.core import EnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from openenv.core.generic_client import GenericEnvClient
from openenv.core.mcp_client import MCPToolClient
from tests.openenv.containers import until
from tests.openenv.serving import as_app, running, serving


def run(spec: str, play: Callable[[str], Any], **args: Any) -> None:
    async def main() -> None:
        async with serving(spec, args=args) as url:
            await play(url)

    asyncio.run(main())


def move(direction: str) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": "move", "arguments": {"direction": direction}}


def best(text: str) -> str:
    ball, paddle = (int(number) for number in re.findall(r"(?:ball|paddle) (\d+)", text))
    return "left" if ball < paddle else "right" if ball > paddle else "stay"


def test_their_generic_client_plays_catch() -> None:
    async def play(url: str) -> None:
        async with GenericEnvClient(url) as env:
            for seed, chosen in ((3, best), (4, lambda _: "stay")):
                result = await env.reset(seed=seed)
                text, steps = result.observation["text"], 0
                assert text.startswith(f"ball {seed} paddle 2")
                while not result.done:
                    result = await env.step(move(chosen(text)))
                    text, steps = result.observation["result"], steps + 1
                assert (steps, text) == (9, "caught" if seed == 3 else "missed")
                assert result.reward == (1.0 if seed == 3 else 0.0)
                state = await env.state()
                assert (state["step_count"], state["seed"], state["done"]) == (9, seed, True)

    run("catch", play)


def test_their_sync_client_plays_catch() -> None:
    with running(as_app("catch")) as server, GenericEnvClient(server.url).sync() as env:
        result = env.reset(seed=0)
        while not result.done:
            result = env.step(move("left"))
        assert result.reward == 1.0


class Said(Observation):
    text: str = ""


class Reply(Action):
    text: str


class EchoClient(EnvClient[Reply, Said, State]):
    """Written as clients of OpenEnv are."""

    def _step_payload(self, action: Reply) -> dict[str, Any]:
        return {"text": action.text}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Said]:
        seen = Said(text=payload["observation"]["text"])
        return StepResult(observation=seen, reward=payload.get("reward"), done=payload.get("done", False))

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)


def test_their_typed_client_plays_echo() -> None:
    async def play(url: str) -> None:
        async with EchoClient(url) as env:
            first = await env.reset(seed=1, episode_id="mine")
            wanted = first.observation.text.splitlines()[-1]
            result = await env.step(Reply(text=wanted))
            state = await env.state()
            assert (state.episode_id, state.step_count) == ("mine", 1)
            assert result.done and result.reward is not None

    run("echo", play)


def test_their_tool_client_plays_catch_and_lists_its_tools() -> None:
    async def play(url: str) -> None:
        async with MCPToolClient(base_url=url) as env:
            (tool,) = await env.list_tools()
            assert tool.name == "move" and "direction" in tool.input_schema["properties"]
            await env.reset(seed=2)
            assert (await env.call_tool("move", direction="stay")).startswith("ball 2 paddle 2")
            with pytest.raises(RuntimeError, match="tool_not_found"):
                await env.call_tool("jump")
            with pytest.raises(RuntimeError, match="invalid_args"):
                await env.call_tool("move", direction="up")
            action = CallToolAction(tool_name="move", arguments={"direction": "stay"})
            assert isinstance((await env.step(action)).observation, CallToolObservation)

    run("catch", play)


def test_their_generic_client_plays_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")

    async def play(url: str) -> None:
        async with GenericEnvClient(url) as env:
            result = await env.reset(seed=7)
            tools = (await env.step({"type": "list_tools"})).observation["tools"]
            assert tools
            numbers = re.findall(r"-?\d+(?: [-+] \d+)+", result.observation["text"])
            answer = str(eval(numbers[0]))  # A sum of whole numbers, and nothing else.
            (name,) = tools[0]["input_schema"]["properties"]
            call = {"type": "call_tool", "tool_name": tools[0]["name"], "arguments": {name: answer}}
            result = await env.step(call)
            assert result.done and result.reward == 1.0

    run("reasoning_gym:chain_sum", play)


@pytest.mark.parametrize("spec", ["catch", "echo"])
def test_openenv_validates_the_running_server(spec: str) -> None:
    with running(as_app(spec)) as server:
        report = validate_running_environment(server.url)
    assert report["passed"], json.dumps(report, indent=1)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path, port: int) -> None:
    file = tmp_path / "shop.py"
    file.write_text(
        "from turnwise import Env, Step\n\n\nclass Shop(Env):\n    def __init__(self, size: int = 1):\n"
        "        self.size = size\n\n    def reset(self, task):\n        return 'x' * self.size\n\n"
        "    def step(self, reply):\n        return Step(reply, terminated=True)\n"
    )
    command = [sys.executable, "-m", "turnwise", "env", "serve", f"{file}:Shop", "--port", str(port)]
    command += ["--arg", "size=3"]
    settings = {**os.environ, "TURNWISE_TOKEN": "sesame"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings
    ) as process:
        assert process.stdout is not None
        try:
            url = f"http://127.0.0.1:{port}"
            assert url in process.stdout.readline()
            until(lambda: process.poll() is not None or answers(url))
            assert httpx.post(f"{url}/reset").status_code == 401
            reset = httpx.post(f"{url}/reset", headers={"Authorization": "Bearer sesame"})
            assert reset.json()["observation"]["text"] == "xxx"
        finally:
            process.send_signal(signal.SIGINT)
            said = process.stdout.read()
    assert "Traceback" not in said, said
