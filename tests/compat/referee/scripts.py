"""The scripts that both packages run: what is asked, said and paid in them is fixed."""

from __future__ import annotations

import asyncio
from collections import Counter as Count
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.compat.referee.packages import PackageName, Run, train
from tests.compat.referee.scripted import Messages, answers, calls, says, scripted_model, user
from transformers import Qwen3ForCausalLM

# -- one reply ----------------------------------------------------------------------------------------------

SUMS: list[Messages] = [
    [user(f"What is {n} plus 1?"), says(f"It is {n + 1}." + " Sure." * n)] for n in range(8)
]
"""Replies of 7 to 28 tokens, of which the long ones run into a budget of 16."""

SUM_ROWS: list[dict[str, Any]] = [
    {"prompt": list(messages[:1]), "answer": n} for n, messages in enumerate(SUMS)
]


@cache
def _model(name: str) -> Qwen3ForCausalLM:
    return scripted_model(SUMS) if name == "sums" else scripted_model(GAMES, [Counter.increment])


def model(name: str) -> Qwen3ForCausalLM:
    """A copy of a scripted model: trainers train what they are given."""
    from copy import deepcopy

    return deepcopy(_model(name))


def place(prompts: Sequence[Any]) -> list[int]:
    """Which sibling each of them is, counted from 0, however many groups a function is called with."""
    seen: Count[str] = Count()
    places = []
    for prompt in prompts:
        places.append(seen[str(prompt)])
        seen[str(prompt)] += 1
    return places


def uneven(prompts: list[Any], answer: list[int], **_: Any) -> list[float]:
    """Siblings that say the same are paid differently, and each prompt's differently."""
    return [
        0.25 * sibling + 0.1 * number * (sibling == 2)
        for sibling, number in zip(place(prompts), answer, strict=True)
    ]


def short(completions: list[Any], **_: Any) -> list[float]:
    """The same for all siblings: nothing to learn."""
    return [1.0 - 0.01 * len(one[-1]["content"]) for one in completions]


def sometimes(prompts: list[Any], answer: list[int], **_: Any) -> list[float | None]:
    """Applies to even answers only, and there not to the second sibling."""
    return [
        None if number % 2 or sibling == 1 else float(sibling)
        for sibling, number in zip(place(prompts), answer, strict=True)
    ]


async def slowly(completions: list[Any], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    log_metric("texts", 0.5)
    return [float("Sure" in one[0]["content"]) for one in completions]


def sums(package: PackageName, out: Path, /, functions: Any = uneven, **settings: Any) -> Run:
    """A reward function or several over a data set."""
    given = {"reward_funcs": functions, **settings.pop("given", {})}
    settings = {"rows": SUM_ROWS, "max_steps": 2, **settings}
    return train(package, model("sums"), out, given=given, **settings)


# -- an environment with a tool -----------------------------------------------------------------------------


class Counter:
    """Counts up to a target; a step too far is an error."""

    def reset(self, target: int, **row: Any) -> str:
        self.target, self.value = target, 0
        return f" Reach {target}."

    def increment(self, step: int) -> str:
        """Add to the counter.

        Args:
            step: How much.
        """
        if self.value + step > self.target:
            raise ValueError("too far")
        self.value += step
        return str(self.value)

    def get_reward(self) -> float:
        return float(self.value == self.target)


def _game(target: int, *said: dict[str, Any]) -> Messages:
    return [user(f"Count. Reach {target}."), *said]


def _step(step: int) -> dict[str, Any]:
    return calls(("increment", {"step": step}))


TOO_FAR = ("{'error': 'too far'}", "increment failed: ValueError: too far")
"""What a tool that raised answers: in TRL's words and in ours."""

GAMES: list[Messages] = [
    _game(1, _step(1), answers("increment", "1"), says("Done.")),
    _game(3, _step(1), answers("increment", "1"), _step(2), answers("increment", "3"), says("It is done.")),
    _game(0, says("Nothing to do.")),
    *(_game(2, _step(5), answers("increment", error), says("I am sorry.")) for error in TOO_FAR),
    _game(
        4, calls(("increment", {"step": 1}), ("increment", {"step": 2})),
        answers("increment", "1"), answers("increment", "3"), says("Not quite."),
    ),
]  # fmt: skip

GAME_ROWS: list[dict[str, Any]] = [
    {"prompt": [user("Count.")], "target": target, "answer": target} for target in (1, 3, 0, 2, 4)
]


def games(package: PackageName, out: Path, /, functions: Any = uneven, **settings: Any) -> Run:
    """An environment class with a tool, and perhaps reward functions beside its own reward."""
    given = {"reward_funcs": functions, "environment_factory": Counter, **settings.pop("given", {})}
    settings = {
        "rows": GAME_ROWS, "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 10,
        "max_completion_length": 200, **settings,
    }  # fmt: skip
    return train(package, model("games"), out, given=given, **settings)
