"""`log_history`: what TRL writes down, Turnwise writes down under the same name and with the same number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.compat.referee.packages import ENDED, PackageName, Run, agree
from tests.compat.referee.scripts import (
    GAME_ROWS,
    SUM_ROWS,
    games,
    short,
    slowly,
    sometimes,
    sums,
    uneven,
)

Both = Callable[[Callable[[PackageName, Path], Run]], tuple[Run, Run]]


def test_a_reward_function(both: Both) -> None:
    theirs, ours = both(sums)
    assert len(theirs.steps) == 2 and theirs.steps[0]["reward"] != theirs.steps[1]["reward"]
    agree(theirs.log, ours.log)
    assert [line["step"] for line in theirs.log] == [line["step"] for line in ours.log]


def test_several_functions_of_which_some_do_not_apply(both: Both) -> None:
    """Sync and async, weights, a function that is None for some rows, metrics from inside a function."""
    functions = [uneven, sometimes, slowly, short]
    theirs, ours = both(
        lambda package, out: sums(package, out, functions, reward_weights=[1.0, 0.5, 2.0, 0.0])
    )
    assert theirs.steps[0]["texts"] == 0.5
    assert theirs.steps[0]["rewards/sometimes/mean"] > 0
    agree(theirs.log, ours.log)


def test_a_metric_that_applies_to_nothing_is_none(both: Both) -> None:
    """A function that is None for every row of a step: null in JSON, where NaN would be none."""
    odd = [row for row in SUM_ROWS if row["answer"] % 2]
    theirs, ours = both(lambda package, out: sums(package, out, [uneven, sometimes], rows=odd))
    assert theirs.steps[0]["rewards/sometimes/mean"] is None
    agree(theirs.log, ours.log)


def test_an_environment_with_tools(both: Both) -> None:
    theirs, ours = both(games)
    line = theirs.steps[0]
    assert line["tools/call_frequency"] == pytest.approx(1.2)
    assert line["tools/failure_frequency"] == pytest.approx(1 / 6)
    assert (line["rewards/Counter/mean"], line["completions/clipped_ratio"]) == (pytest.approx(0.6), 0)
    agree(theirs.log, ours.log)


def test_an_environment_that_owns_its_reward(both: Both) -> None:
    """No function at all: every group is flat, there is nothing to learn, and no pass that says more."""
    theirs, ours = both(lambda package, out: games(package, out, None, rows=GAME_ROWS[:2], max_steps=1,
                                                   per_device_train_batch_size=4))  # fmt: skip
    assert theirs.steps[0]["frac_reward_zero_std"] == 1.0
    unread = [key for key in theirs.steps[0] if key == "entropy" or key.startswith("clip_ratio/")]
    agree(theirs.log, ours.log, apart=unread)
    assert {ours.steps[0][key] for key in unread} == {None}


def test_evaluations(both: Both) -> None:
    theirs, ours = both(
        lambda package, out: sums(
            package, out, [uneven, slowly], eval_rows=SUM_ROWS[2:6], eval_strategy="steps", eval_steps=1,
            num_generations_eval=2,
        )
    )  # fmt: skip
    assert len(theirs.evaluations) == 2
    agree(theirs.log, ours.log)


ARITHMETIC: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3},
    "two updates of a batch": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
        "max_steps": 4,
    },
    "two updates of two": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "max_steps": 3,
    },
    "iterations": {"num_iterations": 2, "max_steps": 4},
    "iterations of a batch in parts": {
        "per_device_train_batch_size": 4, "num_iterations": 2, "steps_per_generation": 2, "max_steps": 5,
    },
    "generation batch": {
        "per_device_train_batch_size": 4, "generation_batch_size": 16, "gradient_accumulation_steps": 2,
        "max_steps": 3,
    },
    "epochs": {"num_train_epochs": 2, "max_steps": -1},
    "epochs of a data set that leaves a rest": {"num_train_epochs": 3, "max_steps": -1, "rows": SUM_ROWS[:5]},
    "part of an epoch": {"num_train_epochs": 0.5, "max_steps": -1},
    "more steps than an epoch has": {"max_steps": 5},
    "epochs with accumulation": {
        "num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
    "every second step": {"logging_steps": 2, "max_steps": 5},
    "every second step and the first": {"logging_steps": 2, "max_steps": 5, "logging_first_step": True},
    "a share of the steps": {"logging_steps": 0.5, "max_steps": 4},
    "once an epoch": {"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
    "never": {"logging_strategy": "no", "max_steps": 2},
    "a cosine": {"learning_rate": 1e-9, "lr_scheduler_type": "cosine", "max_steps": 5},
    "a cosine with a floor": {
        "learning_rate": 1e-9, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_steps": 4,
    },
    "a constant rate": {"lr_scheduler_type": "constant", "max_steps": 3},
}  # fmt: skip
FAST = ("accumulation", "every second step")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARITHMETIC]
)
def test_batch_arithmetic(name: str, both: Both) -> None:
    """Which prompts are played when, when is an epoch over, at which steps is something logged."""
    settings = ARITHMETIC[name]
    played: dict[str, list[int]] = {"trl": [], "turnwise": []}

    def script(package: PackageName, out: Path) -> Run:
        def watched(prompts: list[Any], answer: list[int], **columns: Any) -> list[float]:
            played[package] += sorted(answer)
            return uneven(prompts, answer, **columns)

        watched.__name__ = "watched"
        return sums(package, out, watched, **settings)

    theirs, ours = both(script)
    assert [line["step"] for line in theirs.log] == [line["step"] for line in ours.log]
    apart = []
    if ours.trainer.plan.updates_per_step > settings.get("num_iterations", 1):
        # Which episodes go into which update is drawn at random, by each package from its own generator.
        apart += ["loss", "train_loss", "grad_norm"]
    if len(theirs.steps) < theirs.trainer.state.global_step:
        apart += ENDED  # A mean over steps, in which TRL has those without any end as a length of 0.
    agree(theirs.log, ours.log, apart=apart)
    assert theirs.trainer.state.global_step == ours.trainer.state.global_step
    assert theirs.trainer.state.max_steps == ours.trainer.state.max_steps
    assert sorted(played["trl"]) == sorted(played["turnwise"])
