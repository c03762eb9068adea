"""From TRL's arguments to a `Plan`: a recipe, and how its steps and updates are counted.

One step of the recipe is one generation batch of TRL: what is played under the same weights. It has
``minibatches × epochs`` updates, TRL's optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turnwise.config import EnvConfig, Recipe
from turnwise.errors import RecipeError
from turnwise.recipe_rules import problems

if TYPE_CHECKING:
    from turnwise.compat.arguments import GRPOConfig, RLOOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a trainer runs."""

    recipe: Recipe
    steps: int
    """Of the recipe."""
    updates_per_step: int
    """Optimizer steps in each of them: what ``TrainerState.global_step`` rises by."""
    max_steps: int
    """All updates: ``TrainerState.max_steps``."""
    prompts_per_step: int
    rows: int | None
    """Of the data set; None if it has none, or no known end."""
    notes: tuple[str, ...] = ()
    """What the run should say at its start: where something is done otherwise than TRL does it."""

    def epoch_of(self, step: int) -> float:
        """Passes over the data set that are done after ``step`` of the recipe's steps."""
        steps = self.steps if self.rows is None else max(1, self.rows // self.prompts_per_step)
        return step / steps


def rl_recipe(
    args: GRPOConfig | RLOOConfig,
    *,
    model_name: str,
    environments: Mapping[str, EnvConfig],
    rows: int | None,
    processes: int = 1,
) -> Plan:
    """The plan of a `GRPOTrainer` or `RLOOTrainer`.

    Args:
        args: The trainer's arguments.
        model_name: Hub name or directory; of a model that is there already, any name for it.
        environments: By name, as the trainer's environments are; the arguments' limits are put over theirs.
        rows: Rows of the training data set; None if it has none, or no known end.
        processes: That train together.

    Raises:
        RecipeError: Arguments contradict one another, or ask for what Turnwise does not do.
    """
    micro, accumulated = args.per_device_train_batch_size * processes, args.gradient_accumulation_steps
    per_generation, group_size = args.steps_per_generation or accumulated, args.num_generations or 8
    prompts = micro * per_generation // group_size
    minibatches, epochs = max(1, per_generation // accumulated), args.num_iterations
    updates = minibatches * epochs
    max_steps = args.max_steps
    if max_steps <= 0:
        if rows is None:
            raise RecipeError("max_steps is needed where the data set has no known end")
        max_steps = math.ceil(args.num_train_epochs * max(1, rows // prompts) * updates)
    steps = math.ceil(max_steps / updates)
    recipe: dict[str, Any] = {
        "name": "trl",
        "seed": args.seed,
        "model": {"name": model_name},
        "environments": {name: config.model_dump() for name, config in environments.items()},
        "rl": {
            "steps": steps,
            "groups": dict.fromkeys(environments, prompts),
            "group_size": group_size,
            "minibatches": minibatches,
            "epochs": epochs,
            "optimizer": {"lr": args.learning_rate},
            "sampling": {"max_tokens": args.max_completion_length},
        },
    }
    made = Recipe.model_validate(recipe)
    if found := problems(made):
        raise RecipeError("; ".join(found))
    return Plan(
        recipe=made, steps=steps, updates_per_step=updates, max_steps=max_steps,
        prompts_per_step=prompts, rows=rows,
    )  # fmt: skip
