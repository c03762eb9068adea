"""What stands beside a policy in every table: play by chance, and the same reply every time.

An environment may define, beside the methods of `Env`:

    def random_reply(self, rng: random.Random) -> Message   # a legal action, or some training answer
    def constant_reply(self) -> Message                     # the reply that is right most often

Neither looks at the episode: they are asked on an instance of their own, which is never reset.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from turnwise.types import Message

Baseline = Callable[[random.Random], Message]
"""From a generator to the next reply; the constant baseline draws nothing from it."""


def baselines(env: object) -> dict[str, Baseline]:
    """The baselines of an instance by name, ``random`` and ``constant``; empty where it defines neither.

    The instance is made and closed by the caller, and serves for as long as the replies are asked for:

        spec = make("catch")
        message = baselines(spec.env_class(**spec.args))["random"](random.Random(0))
    """
    found: dict[str, Baseline] = {}
    by_chance: Any = getattr(env, "random_reply", None)
    if callable(by_chance):
        found["random"] = by_chance
    always: Any = getattr(env, "constant_reply", None)
    if callable(always):
        found["constant"] = lambda rng: always()
    return found
