"""Environments as OpenEnv's users write them, on the real `openenv.core` server, and ways to disturb one."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from pydantic import BaseModel, Field, RootModel
from tests.openenv.ports import reserved


class GuessAction(Action):
    """Say a number."""

    number: int = Field(ge=0, le=9, description="The guess.")
    mood: Literal["calm", "bold"] = "calm"
    kind: Literal["guess"] = "guess"


class GuessObservation(Observation):
    text: str
    left: int | None = None


class Guess(Environment[GuessAction, GuessObservation, State]):
    """A number from 0 to 9 by higher and lower; the seed decides it."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    made: ClassVar[list[Guess]] = []

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.at = State(episode_id=None, step_count=0)
        Guess.made.append(self)

    def reset(self, seed: int | None = None, episode_id: str | None = None, low: int = 0, **_: Any) -> Any:
        self.number = low + (seed or 0) % (10 - low)
        self.at = State(episode_id=episode_id or "e", step_count=0)
        return GuessObservation(text=f"Guess a number from {low} to 9.")

    def step(self, action: GuessAction, timeout_s: float | None = None, **_: Any) -> GuessObservation:
        self.at.step_count += 1
        if action.number == 9 and action.mood == "bold":
            raise RuntimeError("nine is too bold")
        right = action.number == self.number
        told = "right" if right else "higher" if action.number < self.number else "lower"
        return GuessObservation(text=told, reward=float(right), done=right, left=None)

    @property
    def state(self) -> State:
        return self.at

    def close(self) -> None:
        self.closed = True


class Place(BaseModel):
    row: int = Field(ge=0, le=2)
    column: int = Field(ge=0, le=2)


class PutAction(Action):
    """Put a stone on an empty place."""

    kind: Literal["put"] = "put"
    at: Place


class UndoAction(Action):
    """Take the last stone back."""

    kind: Literal["undo"]


class StonesAction(RootModel[Annotated[PutAction | UndoAction, Field(discriminator="kind")]]):
    """One of two."""


class StonesObservation(Observation):
    stones: list[list[int]]


class Stones(Environment[Any, StonesObservation, State]):
    """Put stones, or take them back; three end it."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> StonesObservation:
        self.stones: list[list[int]] = []
        return StonesObservation(stones=[])

    def step(self, action: StonesAction, timeout_s: float | None = None, **_: Any) -> StonesObservation:
        if isinstance(action.root, PutAction):
            self.stones.append([action.root.at.row, action.root.at.column])
        else:
            self.stones.pop()
        return StonesObservation(stones=self.stones, reward=1.0, done=len(self.stones) == 3)

    @property
    def state(self) -> State:
        return State(episode_id="e", step_count=0)


class SayAction(Action):
    message: str = Field(min_length=1)


class SayObservation(Observation):
    prompt: str
    messages: list[dict[str, Any]]


class Chatter(Environment[SayAction, SayObservation, State]):
    """Repeats the whole conversation in each observation, as TextArena's games do."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> SayObservation:
        self.said: list[dict[str, Any]] = [{"sender_id": -1, "content": "Say anything."}]
        return SayObservation(prompt="You chat.", messages=list(self.said))

    def step(self, action: SayAction, timeout_s: float | None = None, **_: Any) -> SayObservation:
        self.said += [
            {"sender_id": 0, "content": action.message},
            {"sender_id": -1, "content": f"You said {action.message}."},
        ]
        return SayObservation(prompt="You chat.", messages=list(self.said), reward=0.5)

    @property
    def state(self) -> State:
        return State(episode_id="e", step_count=0)


class Shop(MCPEnvironment):
    """Prices over MCP."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        mcp: FastMCP[Any] = FastMCP("shop")

        @mcp.tool
        def price(item: str, count: int = 1) -> int:
            """Look up a price."""
            return {"tea": 3, "jam": 4}[item] * count

        @mcp.tool
        def describe(item: str) -> str:
            """Say what it is."""
            return f"It is {item}."

        @mcp.tool
        async def nap(seconds: float) -> str:
            """Wait."""
            import asyncio

            await asyncio.sleep(seconds)
            return "rested"

        super().__init__(mcp)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Observation:
        return Observation(done=False, reward=0.0, metadata={"status": "ready"})

    def _step_impl(self, action: Action, timeout_s: float | None = None, **_: Any) -> Observation:
        return Observation(done=False, reward=0.0)

    @property
    def state(self) -> State:
        return State(episode_id="e", step_count=0)


class SlowAction(Action):
    number: int


class SlowObservation(Observation):
    number: int


class Slow(Environment[SlowAction, SlowObservation, State]):
    """Answers with the number that it was given: after a tenth of a second for each of its last digit's.

    Below 0 it hangs until it is `free` to go on, at most for so many seconds.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True
    made: ClassVar[list[Slow]] = []
    free: ClassVar = threading.Event()
    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        with Slow.lock:
            Slow.made.append(self)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> SlowObservation:
        return SlowObservation(number=seed or 0)

    def step(self, action: SlowAction, timeout_s: float | None = None, **_: Any) -> SlowObservation:
        if action.number < 0:
            Slow.free.wait(-action.number)
        else:
            time.sleep(action.number % 10 / 10)
        return SlowObservation(number=action.number, reward=float(action.number))

    @property
    def state(self) -> State:
        return State(episode_id="e", step_count=0)

    def close(self) -> None:
        self.closed = True


def guess_app(most: int = 64) -> Any:
    return create_app(Guess, GuessAction, GuessObservation, env_name="guess", max_concurrent_envs=most)


def stones_app(most: int = 64) -> Any:
    return create_app(Stones, StonesAction, StonesObservation, env_name="stones", max_concurrent_envs=most)


def chatter_app(most: int = 64) -> Any:
    return create_app(Chatter, SayAction, SayObservation, env_name="chatter", max_concurrent_envs=most)


def shop_app(most: int = 64) -> Any:
    return create_app(Shop, CallToolAction, CallToolObservation, env_name="shop", max_concurrent_envs=most)


def slow_app(most: int = 256) -> Any:
    return create_app(Slow, SlowAction, SlowObservation, env_name="slow", max_concurrent_envs=most)


def vowels(text: str) -> float:
    """Their share."""
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


class LetterAction(Action):
    message: str


class LetterObservation(Observation):
    text: str


class Letters(Environment[LetterAction, LetterObservation, State]):
    """Three turns; each pays for the share of vowels in what was said."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    seconds = 0.0
    """A step takes so long."""
    last: ClassVar[int | None] = None
    """The process ends in the middle of this step, counted over all episodes."""
    _steps: ClassVar[Iterator[int]] = itertools.count(1)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> LetterObservation:
        self.turns = 0
        return LetterObservation(text="Sing.")

    def step(self, action: LetterAction, timeout_s: float | None = None, **_: Any) -> LetterObservation:
        self.turns += 1
        if next(self._steps) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return LetterObservation(text="More.", reward=vowels(action.message), done=self.turns == 3)

    @property
    def state(self) -> State:
        return State(episode_id="e", step_count=self.turns)


def letters_app(most: int = 64) -> Any:
    return create_app(Letters, LetterAction, LetterObservation, env_name="letters", max_concurrent_envs=most)


class Process:
    """A server in a process of its own, to be killed and started anew: ``letters`` or ``slow``."""

    def __init__(self, name: str, *, last: int | None = None) -> None:
        self.name = name
        self._holds = ExitStack()
        self.port = self._holds.enter_context(reserved())
        self.url = f"http://127.0.0.1:{self.port}"
        self.start(last=last)

    def start(self, *, last: int | None = None) -> None:
        """At the same address, where it was killed before."""
        command = [sys.executable, "-m", "tests.openenv.foreign", self.name, str(self.port), str(last or 0)]
        # What it logs when connections are torn is of no interest, and long.
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def ready(self) -> Process:
        """Wait until it answers."""
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                assert self._process.poll() is None, "the server did not start"
                time.sleep(0.05)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill it, and let others have its port."""
        self.kill()
        self._holds.close()


if __name__ == "__main__":
    Letters.seconds, Letters.last = 0.05, int(sys.argv[3]) or None
    app = {"letters": letters_app, "slow": slow_app}[sys.argv[1]]()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
