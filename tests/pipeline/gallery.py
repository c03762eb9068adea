"""Environments that show images, for runs to name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from turnwise import Env, Step
from turnwise.types import Task

COLORS = ("red", "green", "blue")


def square(color: str | tuple[int, ...], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


class Mirror(Env):
    """Shows a colour, then what each reply looks like; pays for letters."""

    max_turns = 3
    inline = True

    def tasks(self, split: str) -> Iterator[Task]:
        yield from ({"picture": square(color), "n": n} for n, color in enumerate(COLORS))

    def reset(self, task: Task) -> list[Any]:
        self.seen = ""
        return ["What is it?", task["picture"], square("white", (24, 8))]

    def step(self, reply: str) -> Step:
        self.seen += reply
        # No two replies look alike, so that no other episode stores the same image.
        looks = hashlib.sha256(reply.encode()).digest()[:3]
        return Step([square(tuple(looks)), f"{len(reply)} letters.", square(tuple(looks[::-1]), (8, 24))])

    def reward(self) -> float:
        return sum(letter in "aeiou" for letter in self.seen) / 10


class Painting:
    """As TRL's scripts write an environment: a look shows the square, an answer ends the episode."""

    def reset(self, color: str, **row: Any) -> None:
        self.color, self.done, self.paid = color, False, 0.0

    def look(self, closer: bool) -> list[dict[str, Any]]:
        """Look at the square.

        Args:
            closer: From near by.
        """
        size = (16, 16) if closer else (8, 8)
        return [{"type": "text", "text": "Here:"}, {"type": "image", "image": square(self.color, size)}]

    def answer(self, color: str) -> str:
        """Say its colour.

        Args:
            color: One word.
        """
        self.done, self.paid = True, float(color == self.color)
        return "Thank you."

    def get_reward(self) -> float:
        return self.paid


def colored(completions: list[list[dict[str, Any]]], color: list[str], **columns: Any) -> list[float]:
    """What a reward function sees of the first tool result: TRL's blocks, with a PIL image."""
    scores = []
    for completion, wanted in zip(completions, color, strict=True):
        shown = next(message["content"] for message in completion if message["role"] == "tool")
        assert [part["type"] for part in shown] == ["text", "image"]
        pixel = shown[1]["image"].convert("RGB").getpixel((3, 3))
        scores.append(float(pixel == square(wanted).getpixel((0, 0))))
    return scores


def pictured(prompts: list[list[dict[str, Any]]], picture: list[Any], **columns: Any) -> list[float]:
    """A row's image, as TRL hands columns on, and the same in the prompt."""
    found = [message["content"][1]["image"] for (message,) in prompts]
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, picture, strict=True))
    return [0.0] * len(prompts)
