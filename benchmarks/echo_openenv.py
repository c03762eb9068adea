"""The environments of `benchmarks/echo.py` for openenv-core, served by openenv-core.

python benchmarks/echo_openenv.py sync|async|tool --port 8000 --max-sessions 64
"""

from __future__ import annotations

import argparse
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Said(Action):
    message: str


class Heard(Observation):
    text: str


class Echo(Environment):
    """Sync methods: a thread for each session."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Heard:
        return Heard(text="ready")

    def step(self, action: Said, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        return Heard(text=action.message, reward=1.0)

    @property
    def state(self) -> State:
        return State(episode_id="0", step_count=0)


class AsyncEcho(Echo):
    """Async methods: the event loop's own."""

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any
    ) -> Heard:
        return Heard(text="ready")

    async def step_async(self, action: Said, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        return Heard(text=action.message, reward=1.0)


class ToolEcho(MCPEnvironment):
    """A tool of MCP."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        mcp = FastMCP("echo")

        @mcp.tool
        def echo(message: str) -> str:
            """Say it back."""
            return message

        super().__init__(mcp)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Heard:
        return Heard(text="ready")

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        raise NotImplementedError(f"tools only; found {action}")

    @property
    def state(self) -> State:
        return State(episode_id="0", step_count=0)


CLASSES = {
    "sync": (Echo, Said, Heard),
    "async": (AsyncEcho, Said, Heard),
    "tool": (ToolEcho, CallToolAction, CallToolObservation),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=CLASSES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-sessions", type=int, default=64)
    args = parser.parse_args()
    env_class, action, observation = CLASSES[args.kind]
    app = create_app(env_class, action, observation, max_concurrent_envs=args.max_sessions)
    uvicorn.run(app, host="127.0.0.1", port=args.port, loop="uvloop", log_level="warning")


if __name__ == "__main__":
    main()
