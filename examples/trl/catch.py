"""Catch: a ball falls, a paddle goes to meet it. The environment scores itself with ``get_reward``.

python examples/trl/catch.py --max-steps 2

Or on a server, this class's or any other of OpenEnv's (the tiny policy knows this class's alone):

PYTHONPATH=examples/trl turnwise env serve examples/trl/catch.py:Catch --port 8001
python examples/trl/catch.py --env-host 127.0.0.1 --env-port 8001
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

from common import factory, flags, lesson, policy, settings
from datasets import Dataset

from turnwise import GRPOConfig, GRPOTrainer

COLUMNS, ROWS = 5, 5


class Catch:
    """One column a move, one row a move."""

    def reset(self, column: int, **row: Any) -> str:
        self.ball, self.paddle, self.left = column, COLUMNS // 2, ROWS - 1
        self.done = False
        return self._look()

    def move(self, direction: Literal["left", "stay", "right"]) -> str:
        """Move the paddle one column; the ball falls one row.

        Args:
            direction: Where to.
        """
        if self.done:
            return "over"
        self.paddle = min(max(self.paddle + {"left": -1, "stay": 0, "right": 1}[direction], 0), COLUMNS - 1)
        self.left -= 1
        self.done = self.left == 0
        return "over" if self.done else self._look()

    def get_reward(self) -> float:
        return float(self.done and self.paddle == self.ball)

    def _look(self) -> str:
        return f"ball {self.ball} paddle {self.paddle} rows {self.left}"


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": ""}], "column": i % COLUMNS} for i in range(count)]


def teacher(environment: Catch) -> Iterator[tuple[str, dict[str, Any]]]:
    """Goes to the ball, most of the time."""
    while not environment.done:
        ahead = (environment.ball > environment.paddle) - (environment.ball < environment.paddle)
        best = ("left", "stay", "right")[ahead + 1]
        yield (
            "move",
            {"direction": best if random.random() < 0.6 else random.choice(("left", "stay", "right"))},
        )


def main() -> None:
    args = flags(__doc__, "catch", servers=True)
    data = rows(200)
    trainer = GRPOTrainer(
        model=policy(args, (lesson(Catch(), row, teacher) for row in data)),
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=160,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list(data),
        environment_factory=factory(args, Catch),
    )
    trainer.train()


if __name__ == "__main__":
    main()
