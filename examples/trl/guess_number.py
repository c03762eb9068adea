"""Guess a number from what the environment says of each guess. Two updates on each batch.

python examples/trl/guess_number.py --max-steps 2
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from common import factory, flags, lesson, policy, settings
from datasets import Dataset

from turnwise import GRPOConfig, GRPOTrainer

HIGH, GUESSES = 9, 4


class GuessNumber:
    """Has a number from 1 to ``HIGH``."""

    def reset(self, secret: int, **row: Any) -> str:
        self.secret, self.left, self.found = secret, GUESSES, False
        self.low, self.high = 1, HIGH  # what the teacher knows
        return f"Guess a number from 1 to {HIGH}."

    def guess(self, number: int) -> str:
        """Guess.

        Args:
            number: The guess.
        """
        if self.found or not self.left:
            raise ValueError("the game is over")
        self.left -= 1
        self.found = number == self.secret
        if self.found:
            return "correct"
        if number < self.secret:
            self.low = max(self.low, number + 1)
            return "higher" if self.left else "over"
        self.high = min(self.high, number - 1)
        return "lower" if self.left else "over"

    def get_reward(self) -> float:
        return (self.left + 1) / GUESSES if self.found else 0.0


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": ""}], "secret": 1 + i % HIGH} for i in range(count)]


def teacher(environment: GuessNumber) -> Iterator[tuple[str, dict[str, Any]]]:
    """Any number that is still possible."""
    while environment.left and not environment.found:
        yield "guess", {"number": random.randint(environment.low, environment.high)}


def main() -> None:
    args = flags(__doc__, "guess-number", servers=True)
    data = rows(180)
    trainer = GRPOTrainer(
        model=policy(args, (lesson(GuessNumber(), row, teacher) for row in data)),
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_generations=8,
            num_iterations=2,
            max_completion_length=160,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list(data),
        environment_factory=factory(args, GuessNumber),
    )
    trainer.train()


if __name__ == "__main__":
    main()
