"""An environment that a child process of a server can import: tests name it by the path of this file."""

from __future__ import annotations

import os
import time

from turnwise.envs.base import Env, tool
from turnwise.types import Step


class Isolated(Env):
    """Says which process it is, and dies when it is told to."""

    isolation = "process"

    def reset(self, task: object) -> str:
        return str(os.getpid())

    @tool
    def die(self) -> str:
        """Die."""
        os._exit(3)

    @tool
    def block(self) -> str:
        """Never answer."""
        time.sleep(60)
        return "late"

    def step(self, reply: str) -> Step:
        return Step(str(os.getpid()))
