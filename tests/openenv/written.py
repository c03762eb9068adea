"""Environments as people write them for OpenEnv, with the package they import left open."""

from __future__ import annotations

import sys
import types
from typing import Any

THEIRS = {
    "models": "openenv.core.env_server.types",
    "base": "openenv.core.env_server.interfaces",
    "mcp": "openenv.core.env_server.mcp_environment",
    "actions": "openenv.core.env_server.mcp_types",
}
OURS = dict.fromkeys(THEIRS, "turnwise.openenv")
PACKAGES = {"theirs": THEIRS, "ours": OURS}

TYPED = '''
import threading
from typing import Any

from {models} import Action, Observation, State
from {base} import Environment
from pydantic import Field


class Guess(Action):
    number: int = Field(ge=0, le=9)


class Told(Observation):
    hint: str


class Game(State):
    secret: int = 0
    guesses: list[int] = []


THREADS: list[int] = []
CLOSED: list[int] = []


class Guessing(Environment):
    """Find a number."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        THREADS.append(threading.get_ident())
        self.game = Game()

    def reset(self, seed: int | None = None, episode_id: str | None = None) -> Told:
        THREADS.append(threading.get_ident())
        self.game = Game(secret=(seed or 0) % 10, episode_id=episode_id)
        return Told(hint="guess", metadata={{"level": 1}})

    def step(self, action: Guess, timeout_s: float | None = None) -> Told:
        THREADS.append(threading.get_ident())
        self.game.step_count += 1
        self.game.guesses.append(action.number)
        if action.number == 9 and self.game.secret != 9:
            raise ValueError("nine is never it")
        found = action.number == self.game.secret
        hint = "found" if found else "higher" if action.number < self.game.secret else "lower"
        return Told(hint=hint, reward=float(found), done=found, metadata={{"tries": self.game.step_count}})

    @property
    def state(self) -> Game:
        THREADS.append(threading.get_ident())
        return self.game

    def close(self) -> None:
        THREADS.append(threading.get_ident())
        CLOSED.append(1)


class AsyncGuessing(Guessing):
    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Told:
        return self.reset(seed=seed, episode_id=episode_id)

    async def step_async(self, action: Guess, timeout_s: float | None = None, **more: Any) -> Told:
        return self.step(action)


class OneThread(Guessing):
    REQUIRES_SINGLE_THREAD_EXECUTOR = True


class Alone(Guessing):
    SUPPORTS_CONCURRENT_SESSIONS = False
'''

TOOLS = '''
from typing import Any

from fastmcp import Context, FastMCP
from {models} import Action, Observation, State
from {mcp} import MCPEnvironment
from {actions} import CallToolAction, CallToolObservation


class Counter(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("counter")
        self.total = 0

        @server.tool
        def add(n: int) -> int:
            """Add to the total."""
            self.total += n
            return self.total

        @server.tool
        async def report(prefix: str) -> dict:
            """The total, in words."""
            return {{"text": f"{{prefix}} {{self.total}}"}}

        @server.tool
        async def visits(ctx: Context) -> int:
            """How often this was called."""
            count = ((await ctx.get_state("visits")) or 0) + 1
            await ctx.set_state("visits", count)
            return count

        @server.tool
        def broken() -> str:
            """Never works."""
            raise RuntimeError("out of order")

        super().__init__(server)
        self._state = State(episode_id="none", step_count=0)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Observation:
        self.total = seed or 0
        self._state = State(episode_id=episode_id, step_count=0)
        return Observation(metadata={{"status": "ready"}})

    def _step_impl(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        return Observation(metadata={{"kind": type(action).__name__}})

    async def step_async(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        self._state.step_count += 1
        observation = await super().step_async(action, timeout_s=timeout_s, **more)
        if getattr(action, "tool_name", None) == "add" and observation.error is None:
            observation.reward = float(observation.result.data)
            observation.done = observation.result.data >= 10
        return observation

    @property
    def state(self) -> State:
        return self._state
'''

_made = 0


def written(source: str, package: str) -> Any:
    """A module with that source, whose imports are of ``theirs`` or ``ours``."""
    global _made
    _made += 1
    module = types.ModuleType(f"written_{package}_{_made}")
    sys.modules[module.__name__] = module
    exec(compile(source.format(**PACKAGES[package]), f"<{module.__name__}>", "exec"), vars(module))
    return module
