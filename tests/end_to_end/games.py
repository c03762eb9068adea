"""Games for tests of learning: what can be learned in each is known, and how well.

`Levers` is a bandit. `Doors` is a lottery and then a question: credit by turn tells them apart, credit by
episode cannot.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from turnwise.envs.base import Env, tool
from turnwise.types import Message, Step, Task, ToolCall

SIDES = ("left", "right")


class Levers(Env):
    """Pull one of three levers: one pays 1, the others a tenth of it. The teacher knows nothing."""

    inline = True
    names = ("red", "green", "blue")

    def reset(self, task: Task) -> str:
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        return "Pull a lever."

    @tool
    def pull(self, lever: str) -> Step:
        """Pull a lever."""
        return Step("Done.", reward={"green": 1.0}.get(lever, 0.1), terminated=True)

    def teacher(self, messages: Sequence[Message]) -> Message:
        lever = self.teacher_rng.choice(self.names)
        return Message.assistant("", ToolCall(name="pull", arguments={"lever": lever}))


class Doors(Env):
    """Open two doors. The first pays ``prize`` or nothing, and nobody can know which. The second was named.

    All that can be learned is the second turn, whose pay is small beside the noise of the first.
    """

    inline = True

    def __init__(self, prize: float = 8.0, error: float = 0.3) -> None:
        self.prize, self.error = prize, error

    def tasks(self, split: str) -> Iterator[Task]:
        for number in range(64):
            yield {"side": SIDES[number % 2], "number": number, "split": split}

    def reset(self, task: Task) -> str:
        self.side, self.opened = task["side"], 0
        self.lucky = self.rng.choice(SIDES)
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        return "Open a door."

    @tool
    def open(self, side: str) -> Step:
        """Open the left or the right door."""
        self.opened += 1
        if self.opened == 1:
            return Step(f"The next is {self.side}.", reward=self.prize * (side == self.lucky))
        return Step("Done.", reward=float(side == self.side), terminated=True)

    def teacher(self, messages: Sequence[Message]) -> Message:
        side = self.side if self.opened else SIDES[0]
        if self.teacher_rng.random() < (self.error if self.opened else 0.5):
            side = SIDES[1 - SIDES.index(side)]
        return Message.assistant("", ToolCall(name="open", arguments={"side": side}))

    def state_key(self) -> str:
        return f"{self.opened}/{self.side if self.opened else '?'}"
