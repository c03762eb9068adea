"""Environments of which something can be wrong, for recipes to name: ``tests/pipeline/envs.py:Wrong``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from turnwise.envs.base import Env, tool
from turnwise.errors import EnvLostError
from turnwise.types import Message, Step, Task, ToolCall


class Wrong(Env):
    """Every fault by a tool's name; its teacher does what the row says and then wins.

    Args:
        do: What the rows ask for, one after another.
        size: Rows.
        environment: The ``environment`` column of every fifth row; None leaves it out.
    """

    max_turns = 4

    def __init__(self, do: Sequence[str] = ("win",), size: int = 40, environment: str | None = None) -> None:
        self.do, self.size, self.environment = list(do), size, environment

    def tasks(self, split: str) -> Iterator[Task]:
        for number in range(self.size):
            row: dict[str, Any] = {"do": self.do[number % len(self.do)], "n": number}
            if self.environment is not None and number % 5 == 3:
                row["environment"] = self.environment
            yield row

    def reset(self, task: Task) -> str:
        self.task, self.used = task, False
        if task["do"] == "no_reset":
            raise RuntimeError("the world is not ready")
        return "go" + "7" * (400 if task["do"] == "long" else 1)

    @tool
    def act(self, what: str) -> Any:
        """Do something."""
        if what == "raise":
            raise ValueError("not like this")
        if what == "hang":
            time.sleep(10)
        if what == "object":
            return object()
        if what == "huge":
            return "x" * 10_000_000
        if what == "nan":
            return Step("paid", reward=float("nan"))
        return Step("won", reward=1.0, terminated=True)

    def teacher(self, messages: Sequence[Message]) -> Message:
        what, self.used = ("win" if self.used else self.task["do"]), True
        return Message.assistant("", ToolCall(name="act", arguments={"what": what}))


class NotJson(Env):
    """A row that JSON cannot hold."""

    def tasks(self, split: str) -> Iterator[Any]:
        yield {"n": 0}
        yield {"n": {1, 2}}

    def reset(self, task: Task) -> str:
        return "go"

    def reward(self) -> float:
        return 1.0


class Plain(Env):
    """No tools, no rows of its own: what others route to it."""

    max_turns = 1

    def reset(self, task: Task) -> str:
        return f"say {task.get('n', 'nothing')}"

    def step(self, reply: str) -> Step:
        return Step(reward=1.0, terminated=True)

    def teacher(self, messages: Sequence[Message]) -> str:
        return "ok"


class Flaky(Env):
    """Its server is gone for the first resets of some rows."""

    inline = True
    max_turns = 1
    failures: ClassVar[dict[int, int]] = {}
    """Row → how many resets still fail."""

    def tasks(self, split: str) -> Iterator[Task]:
        yield from ({"n": n} for n in range(8))

    def reset(self, task: Task) -> str:
        if Flaky.failures.get(task["n"], 0):
            Flaky.failures[task["n"]] -= 1
            raise EnvLostError("the server is gone")
        return f"say {task['n']}"

    def reward(self) -> float:
        return self.rng.random()

    def teacher(self, messages: Sequence[Message]) -> str:
        return "ok"
