"""What stands beside a policy in every table: play by chance, and the same reply every time.

An environment may define, beside the methods of `Env`:

    def random_reply(self, rng: random.Random) -> Message   # a legal action, or some training answer
    def constant_reply(self) -> Message                     # the reply that is right most often

Neither looks at the episode: they are asked on an instance of their own, which is never reset.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from turnwise.envs.session import EnvSpec
from turnwise.envs.spec import ClassSpec
from turnwise.errors import EnvError, boundary
from turnwise.types import Message

Baseline = Callable[[random.Random], Message]
"""From a generator to the next reply; the constant baseline draws nothing from it."""


@contextmanager
def baselines(spec: EnvSpec) -> Iterator[dict[str, Baseline]]:
    """The baselines of an environment by name, ``random`` and ``constant``; none where it defines neither.

        with baselines(make("catch")) as replies:
            message = replies["random"](random.Random(0))

    Raises:
        EnvError: The environment's constructor raised, or its close.
    """
    env_class: Any = spec.env_class if isinstance(spec, ClassSpec) else None
    names = [name for name in ("random", "constant") if callable(getattr(env_class, f"{name}_reply", None))]
    if not isinstance(spec, ClassSpec) or not names:
        yield {}
        return
    with boundary(EnvError, f"environment {spec.name}: constructor"):
        env: Any = spec.env_class(**spec.args)
    found: dict[str, Baseline] = {}
    if "random" in names:
        found["random"] = env.random_reply
    if "constant" in names:
        found["constant"] = lambda rng: env.constant_reply()
    try:
        yield found
    finally:
        with boundary(EnvError, f"environment {spec.name}: close"):
            closing = env.close()
        if inspect.iscoroutine(closing):
            closing.close()  # Never started: an instance that was not reset holds nothing that a loop opened.
