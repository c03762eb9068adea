"""A first environment: open a lock of three digits by what it says about each try.

turnwise env check examples/first_environment.py:Lock
turnwise env play examples/first_environment.py:Lock --teacher
python examples/first_environment.py                 # the teacher opens one, in ten lines
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from turnwise.envs import Env, Message, Step, ToolCall, tool

CODES = ["".join(digits) for digits in itertools.product("1234", repeat=3)]


def match(code: str, attempt: str) -> int:
    """How many digits are right and in their place."""
    return sum(left == right for left, right in zip(code, attempt, strict=False))


class Lock(Env):
    """Open the lock. Each try pays nothing until it opens; fewer tries pay no more than many."""

    max_turns = 8
    inline = True

    def tasks(self, split: str) -> list[dict[str, str]]:
        """Every seventh code is held out."""
        return [{"code": code} for i, code in enumerate(CODES) if (i % 7 == 3) == (split == "test")]

    def reset(self, task: dict[str, str]) -> str:
        """Lock it."""
        self.code = task["code"]
        self.possible = list(CODES)
        return "Open the lock: three digits, each from 1 to 4."

    @tool
    def enter(self, digits: str) -> Step:
        """Enter three digits; the lock says how many are right and in their place."""
        if digits not in CODES:
            raise ValueError(f"{digits!r} is not three digits from 1 to 4")
        right = match(self.code, digits)
        self.possible = [code for code in self.possible if match(code, digits) == right]
        if right == 3:
            return Step("open", reward=1.0, terminated=True)
        return Step(f"{right} right")

    def teacher(self, messages: Sequence[Message]) -> Message:
        """Try the first code that fits everything the lock has said. It never looks at the code itself."""
        return Message.assistant("", ToolCall(name="enter", arguments={"digits": self.possible[0]}))


async def main() -> None:
    """One episode of the teacher's, without a model."""
    from turnwise.envs.play import Play
    from turnwise.envs.registry import make

    spec = make(Lock)
    session = await spec.open(spec.limits)
    play = Play(session, spec.limits)
    for message in await play.start({"code": "342"}, seed=0):
        print(message.text)
    while play.stop is None:
        reply = await session.teacher(play.messages)
        told = await play.say(reply)
        print(f"  {reply.tool_calls[0].arguments['digits']}: {told[0].text}")
    print(f"reward {await play.reward()}, {play.turns} tries")
    await session.close()


if __name__ == "__main__":
    asyncio.run(main())
