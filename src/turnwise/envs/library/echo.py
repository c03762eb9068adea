"""Echo: say again what the task says. The smallest environment without tools; for tests and first runs.

turnwise env play echo --arg words=2
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from turnwise.envs.base import Env
from turnwise.envs.library.splits import checked, split_of
from turnwise.types import Message, Step, Task

WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron",
    "inlet", "jetty", "kelp", "lagoon", "maple", "north", "otter", "pebble",
    "quartz", "river", "slate", "tundra", "umber", "valley", "willow", "zephyr",
)  # fmt: skip


class Echo(Env):
    """Repeat a few words exactly; one reply, 1 or 0.

    A row is ``{"text": "cedar otter slate"}``. Train and test share the words and no text.

    Args:
        words: How many words a text has.
        size: Rows per split, at most; fewer where there are not as many texts.
        test_share: Share of all texts that are held out.
        error: The teacher's probability of leaving out the last word.
    """

    inline = True
    max_turns = 1

    def __init__(
        self, words: int = 3, *, size: int = 500, test_share: float = 0.2, error: float = 0.0
    ) -> None:
        if words < 1:
            raise ValueError(f"words={words}: at least one is needed")
        if not (0 < test_share < 1 and 0 <= error <= 1):
            raise ValueError(
                f"test_share must be in (0, 1), error in [0, 1]; found test_share={test_share}, error={error}"
            )
        self.words, self.size, self.test_share, self.error = words, size, test_share, error

    def tasks(self, split: str) -> Iterator[Task]:
        """Distinct texts, in an order that is the same every time."""
        split = checked(split, "echo")
        space = len(WORDS) ** self.words
        made = 0
        # A step that shares no factor with the number of texts (2^3w · 3^w) visits each of them once.
        for index in range(space):
            number = (index * 1_000_003 + 17) % space
            text = self._text(number)
            if split_of(text, self.test_share) == split:
                yield {"text": text}
                made += 1
                if made == self.size:
                    return

    def reset(self, task: Task) -> str:
        """Say what to repeat."""
        self.text: str = task["text"]
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        return f"Repeat exactly: {self.text}"

    def step(self, reply: str) -> Step:
        """Pay 1 if the reply is the text, blanks around it aside."""
        right = reply.strip() == self.text
        return Step("right" if right else "wrong", reward=float(right), terminated=True)

    def teacher(self, messages: Sequence[Message]) -> str:
        """The text, or all of it but the last word."""
        if self.teacher_rng.random() >= self.error:
            return self.text
        return " ".join(self.text.split(" ")[:-1])

    def random_reply(self, rng: random.Random) -> Message:
        """Any text of as many words."""
        return Message.assistant(self._text(rng.randrange(len(WORDS) ** self.words)))

    def constant_reply(self) -> Message:
        """The first of all texts."""
        return Message.assistant(self._text(0))

    def _text(self, number: int) -> str:
        """The text with this number, its words as digits."""
        words = []
        for _ in range(self.words):
            number, digit = divmod(number, len(WORDS))
            words.append(WORDS[digit])
        return " ".join(words)
