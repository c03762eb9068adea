"""Environments that a child process can import: `test_process` names them by this file's path."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

from turnwise import Env, Message, Step, tool
from turnwise.errors import EnvLostError


class Child(Env):
    """Every way to answer and to fail."""

    isolation = "process"
    system = "You are in a child."
    max_turns = 3

    def __init__(self, log: str | None = None, slow: float = 0.0) -> None:
        self.log = log
        time.sleep(slow)

    def reset(self, task):
        self.task = task
        return [Message.user(f"pid {os.getpid()}"), Message.user(f"{self.rng.randrange(1000)}")]

    @tool
    def pid(self) -> int:
        """The process."""
        return os.getpid()

    @tool
    def say(self, text: str) -> Step:
        """Say."""
        return Step(text, reward=0.5, terminated=True, info={"n": len(text)})

    @tool
    def fail(self) -> str:
        """Fail."""
        raise KeyError("tea")

    @tool
    def hang(self) -> str:
        """Hang, with a child of its own."""
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60) # {self.log}"])
        time.sleep(60)

    @tool
    async def doze(self) -> str:
        """Hang politely."""
        await asyncio.sleep(60)

    @tool
    def die(self) -> str:
        """Die."""
        os.kill(os.getpid(), signal.SIGSEGV)

    @tool
    def scribble(self) -> str:
        """Write to every open file, the wire among them."""
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\x00\x00\x00\x05junk!")
        return "done"

    @tool
    def shut(self) -> str:
        """Close every open file, the wire among them."""
        os.closerange(3, 64)
        return "done"

    @tool
    def lose(self) -> str:
        """Lose the server."""
        raise EnvLostError("the server is gone")

    @tool
    def big(self) -> str:
        """10 MB."""
        return "x" * 10_000_000

    @tool
    def leave(self) -> str:
        """Leave."""
        sys.exit(3)

    def step(self, reply):
        return Step([Message.user(f"you said {reply}")])

    def reward(self):
        return float(self.task.get("reward", 1))

    def teacher(self, messages):
        return Message.assistant(f"{len(messages)} messages", reasoning="counted")

    def state_key(self):
        return "s"

    def close(self):
        if self.log:
            with open(self.log, "a") as file:
                file.write("closed\n")


class AsyncChild(Child):
    """Sync class attributes, async methods."""

    async def reset(self, task):
        await asyncio.sleep(0)
        return super().reset(task)


class TrlChild:
    """A TRL-style class that asks for a process."""

    turnwise: ClassVar = {"isolation": "process"}

    def reset(self):
        return "go"

    def pid(self) -> int:
        """The process."""
        return os.getpid()
