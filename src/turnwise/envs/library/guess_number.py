"""Guess a number that the environment keeps to itself: higher, lower, correct.

turnwise env play guess_number --arg high=16
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from turnwise.envs.base import Env, tool
from turnwise.envs.library.splits import TEST, checked, place
from turnwise.types import Message, Step, Task, ToolCall


class GuessNumber(Env):
    """Find the secret number with as few guesses as possible.

    A row is ``{"secret": 42}``. ``test_share`` of the numbers are held out: they are never the secret in
    training.

    Args:
        low: The smallest secret.
        high: The largest secret.
        guesses: How many guesses there are; after the last wrong one the environment ends the episode. (More
            than 20 need a higher ``max_turns``.)
        discount: The k-th guess, when right, pays ``discount ** (k - 1)``; 1 pays every success alike.
        test_share: Share of the numbers that are held out (at least one is, and one is not).
        error: The teacher's probability of an error at each guess: any number in range but the right one to
            try.
    """

    inline = True
    max_turns = 20

    def __init__(
        self,
        low: int = 1,
        high: int = 100,
        *,
        guesses: int = 10,
        discount: float = 1.0,
        test_share: float = 0.2,
        error: float = 0.0,
    ) -> None:
        if high <= low:
            raise ValueError(f"low={low}, high={high}: at least two numbers are needed")
        if guesses < 1:
            raise ValueError(f"guesses={guesses}: at least one is needed")
        if not (0 < discount <= 1 and 0 < test_share < 1 and 0 <= error <= 1):
            raise ValueError(
                "discount must be in (0, 1], test_share in (0, 1) and error in [0, 1]; "
                f"found discount={discount}, test_share={test_share}, error={error}"
            )
        self.low, self.high = low, high
        self.guesses, self.discount = guesses, discount
        self.test_share, self.error = test_share, error

    def tasks(self, split: str) -> Iterator[Task]:
        """One row for each number of the split, in an order that is shuffled once for all."""
        split = checked(split, "guess_number")
        order = sorted(range(self.low, self.high + 1), key=lambda number: place(str(number)))
        held_out = min(max(round(self.test_share * len(order)), 1), len(order) - 1)
        for secret in order[:held_out] if split == TEST else order[held_out:]:
            yield {"secret": secret}

    def reset(self, task: Task) -> str:
        """Say the range."""
        self.secret = task["secret"]
        if not self.low <= self.secret <= self.high:
            raise ValueError(f"the task's secret {self.secret} is not between {self.low} and {self.high}")
        self.tries = 0
        self.possible = (self.low, self.high)
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        return f"Guess a number from {self.low} to {self.high}."

    @tool
    def guess(self, number: int) -> Step:
        """Guess the number; the answer is higher, lower or correct."""
        self.tries += 1
        if number == self.secret:
            return Step("correct", reward=self.discount ** (self.tries - 1), terminated=True)
        low, high = self.possible
        answer: Literal["higher", "lower"]
        if number < self.secret:
            answer, self.possible = "higher", (max(low, number + 1), high)
        else:
            answer, self.possible = "lower", (low, min(high, number - 1))
        if self.tries >= self.guesses:
            return Step(f"{answer}; that was the last guess", reward=0.0, truncated=True)
        return Step(answer)

    def teacher(self, messages: Sequence[Message]) -> Message:
        """Bisect what is still possible (without a look at the secret), erring as it was told to."""
        low, high = self.possible
        best = (low + high) // 2
        if self.teacher_rng.random() >= self.error:
            return _say(best)
        wrong = self.teacher_rng.randrange(self.low, self.high)
        return _say(wrong if wrong < best else wrong + 1)

    def state_key(self) -> str:
        """What is still possible, and how many guesses are left."""
        return f"{self.possible[0]}-{self.possible[1]}/{self.guesses - self.tries}"

    def random_reply(self, rng: random.Random) -> Message:
        """Any number in range."""
        return _say(rng.randint(self.low, self.high))

    def constant_reply(self) -> Message:
        """The middle of the range, again and again."""
        return _say((self.low + self.high) // 2)


def _say(number: int) -> Message:
    return Message.assistant("", ToolCall(name="guess", arguments={"number": number}))
