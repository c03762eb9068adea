"""Say it again: one tool, and reward functions that look at the environments.

python examples/trl/echo.py --max-steps 2
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from common import factory, flags, lesson, policy, settings
from datasets import Dataset

from turnwise import GRPOConfig, GRPOTrainer

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")


class Echo:
    """Hears what is said."""

    def reset(self, text: str, **row: Any) -> None:
        self.text, self.heard = text, ""

    def echo(self, message: str) -> str:
        """Say something.

        Args:
            message: What to say.
        """
        self.heard = message
        return message


def right(environments: list[Echo], **columns: Any) -> list[float]:
    """1 for the text that was asked for."""
    return [float(one.heard == one.text) for one in environments]


def words_right(environments: list[Echo], text: list[str], **columns: Any) -> list[float]:
    """The share of its words that were said."""
    return [
        len(set(asked.split()) & set(one.heard.split())) / len(set(asked.split()))
        for one, asked in zip(environments, text, strict=True)
    ]


def rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    texts = [" ".join(rng.sample(WORDS, 2)) for _ in range(count)]
    return [{"prompt": [{"role": "user", "content": f"Echo: {text}"}], "text": text} for text in texts]


def teacher(environment: Echo) -> Iterator[tuple[str, dict[str, Any]]]:
    first, second = environment.text.split()
    yield "echo", {"message": random.choice((f"{first} {second}", f"{second} {first}", first))}


def main() -> None:
    args = flags(__doc__, "echo", servers=True)
    data = rows(200)
    trainer = GRPOTrainer(
        model=policy(args, (lesson(Echo(), row, teacher) for row in data)),
        reward_funcs=[right, words_right],
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=64,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list(data),
        environment_factory=factory(args, Echo),
    )
    trainer.train()


if __name__ == "__main__":
    main()
