"""Sums of reasoning-gym, answered through a tool and scored by the package itself.

python examples/trl/reasoning_gym_sums.py --max-steps 2          # pip install -e '.[reasoning-gym]'
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import reasoning_gym
from common import factory, flags, lesson, policy, settings
from datasets import Dataset

from turnwise import GRPOConfig, GRPOTrainer

SUMS = reasoning_gym.create_dataset(
    "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=400, seed=0
)


class Sum:
    """One question, one answer."""

    def reset(self, index: int, **row: Any) -> str:
        self.entry, self.said = SUMS[index], None
        return str(self.entry["metadata"]["expression"])

    def answer(self, value: str) -> str:
        """Answer the question, once.

        Args:
            value: The number.
        """
        if self.said is not None:
            raise ValueError("it was answered")
        self.said = value
        return "thanks"

    def get_reward(self) -> float:
        return float(SUMS.score_answer(self.said, self.entry))


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": ""}], "index": i} for i in range(count)]


def teacher(environment: Sum) -> Iterator[tuple[str, dict[str, Any]]]:
    """Right, or one too many."""
    yield "answer", {"value": str(int(environment.entry["answer"]) + random.choice((0, 1)))}


def main() -> None:
    args = flags(__doc__, "reasoning-gym", servers=True)
    data = rows(400)
    trainer = GRPOTrainer(
        model=policy(args, (lesson(Sum(), row, teacher) for row in data)),
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=48,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list(data),
        environment_factory=factory(args, Sum),
    )
    trainer.train()


if __name__ == "__main__":
    main()
