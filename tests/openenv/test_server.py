"""The server, played by OpenEnv's own clients."""

from __future__ import annotations

import asyncio

from openenv.core.generic_client import GenericEnvClient
from tests.openenv.serving import serving


def test_their_generic_client_plays_an_episode_of_catch() -> None:
    async def play() -> None:
        async with serving("catch") as url, GenericEnvClient(url) as env:
            result = await env.reset(seed=3)
            assert result.observation["text"].startswith("ball 3 paddle 2")
            steps = 0
            while not result.done:
                result = await env.step(
                    {"type": "call_tool", "tool_name": "move", "arguments": {"direction": "right"}}
                )
                steps += 1
            assert steps == 9
            assert result.observation["result"] == "missed"
            assert result.reward == 0.0
            state = await env.state()
            assert state["step_count"] == 9 and state["seed"] == 3 and state["done"]

    asyncio.run(play())
