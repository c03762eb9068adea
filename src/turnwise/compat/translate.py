"""From TRL's arguments to a `Plan`: a recipe, and how its steps and updates are counted.

One step of the recipe is one generation batch of TRL: what is played under the same weights. It has
``minibatches × epochs`` updates, TRL's optimizer steps. Where TRL plays several generation batches before an
update (``steps_per_generation`` below ``gradient_accumulation_steps``), they are one step here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from turnwise.compat.fields import check, told
from turnwise.compat.translate_engine import engine_settings, sampling_settings
from turnwise.compat.translate_loss import Settings, grpo_settings, rloo_settings
from turnwise.config import BatchConfig, EnvConfig, Recipe
from turnwise.errors import RecipeError
from turnwise.recipe_rules import problems

if TYPE_CHECKING:
    from turnwise.compat.arguments import GRPOConfig, RLOOConfig, SFTConfig

Rows = int | Mapping[str, int]
"""How many rows a data set has, or has of each environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a trainer runs."""

    recipe: Recipe
    steps: int
    """Of the recipe."""
    updates_per_step: int
    """Optimizer steps in each of them: what ``TrainerState.global_step`` rises by."""
    max_steps: int
    """All updates: ``TrainerState.max_steps``. The last step may have more of them, which are not made."""
    prompts_per_step: int
    """SFT: rows of an update."""
    rows: int | None
    """Of the data set; None if it has none, or no known end."""
    notes: tuple[str, ...] = ()
    """What the run should say at its start: arguments that do nothing, or are done otherwise than in TRL."""

    def of_plain_text(self) -> Plan:
        """For prompts that are given to the model as they are, without a chat template."""
        model = self.recipe.model.model_copy(update={"prompt": "text"})
        return replace(self, recipe=self.recipe.model_copy(update={"model": model}))

    def epoch_of(self, step: int) -> float:
        """Passes over the data set that are done after ``step`` of the recipe's steps."""
        steps = self.steps if self.rows is None else max(1, self.rows // self.prompts_per_step)
        return step / steps


def rl_recipe(
    args: GRPOConfig | RLOOConfig,
    *,
    model_name: str,
    environments: Mapping[str, EnvConfig],
    rows: Rows | None,
    processes: int = 1,
    context: int | None = None,
) -> Plan:
    """The plan of a `GRPOTrainer` or `RLOOTrainer`.

    Args:
        args: The trainer's arguments.
        model_name: Hub name or directory; of a model that is there already, any name for it.
        environments: By name, as the trainer's environments are; the arguments' limits are put over theirs.
        rows: Rows of the training data set, in all or of each environment; None if it has none, or no known
            end. Of each environment, they say how many of a step's prompts are its own.
        processes: That train together.
        context: The longest context that the model itself allows.

    Raises:
        RecipeError: Arguments contradict one another, or ask for what Turnwise does not do.
    """
    check(args)
    notes = told(args)
    made = _step_of(args, processes)
    total = sum(rows.values()) if isinstance(rows, Mapping) else rows
    max_steps = args.max_steps
    if max_steps <= 0:
        if total is None:
            raise RecipeError("max_steps is needed where the number of rows is not known: set it above 0")
        max_steps = math.ceil(args.num_train_epochs * max(1, total // made.prompts) * made.updates)
    steps = math.ceil(max_steps / made.updates)
    sampling, cuts = sampling_settings(args)
    settings_of = rloo_settings if hasattr(args, "normalize_advantages") else grpo_settings
    rl: Settings = {
        "steps": steps,
        "groups": _dealt(made.prompts, environments, rows),
        "group_size": made.group_size,
        **_parted(args, made),
        **settings_of(args, notes, cuts=cuts),
        "overlong": {"mask": args.mask_truncated_completions},
        "sampling": sampling,
        "optimizer": _optimizer(args, max_steps, notes),
        "rows": _rows(args),
        # Checkpoints are made when a callback or the arguments ask for one.
        "checkpoint_every": steps,
    }
    recipe = {
        **_common(args, model_name),
        "engine": engine_settings(args, notes, episodes=made.prompts * made.group_size, context=context),
        "environments": {name: _limited(args, config) for name, config in environments.items()},
        "rl": rl,
    }
    return Plan(
        recipe=_checked(recipe, notes),
        steps=steps,
        updates_per_step=made.updates,
        max_steps=max_steps,
        prompts_per_step=made.prompts,
        rows=total,
        notes=tuple(notes),
    )


def sft_recipe(
    args: SFTConfig,
    *,
    model_name: str,
    environments: Mapping[str, EnvConfig],
    rows: Rows | None,
    sources: list[str],
    processes: int = 1,
) -> Plan:
    """The plan of an `SFTTrainer`: ``rows`` are conversations, written as trajectories to ``sources``.

    Args:
        args: The trainer's arguments.
        model_name: Hub name or directory; of a model that is there already, any name for it.
        environments: Whose trajectories they are.
        rows: As of `rl_recipe`.
        sources: Files with trajectories.
        processes: That train together.

    Raises:
        RecipeError: Arguments contradict one another, or ask for what Turnwise does not do.
    """
    check(args)
    notes = told(args)
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise RecipeError(
            f"train_sampling_strategy is random or sequential; found {args.train_sampling_strategy!r}: rows "
            "are packed, so lengths need no grouping"
        )
    micro = args.per_device_train_batch_size * processes
    batch = micro * args.gradient_accumulation_steps
    total = sum(rows.values()) if isinstance(rows, Mapping) else rows
    max_steps = args.max_steps
    if max_steps <= 0:
        if total is None:
            raise RecipeError("max_steps is needed where the number of rows is not known: set it above 0")
        # An epoch's last update takes what is left.
        max_steps = math.ceil(args.num_train_epochs * max(1, math.ceil(total / batch)))
    recipe = {
        **_common(args, model_name),
        "environments": {
            name: config.model_dump(exclude_unset=True) for name, config in environments.items()
        },
        "sft": {
            "steps": max_steps,
            "batch": _dealt(batch, environments, rows),
            "sources": sources,
            "optimizer": _optimizer(args, max_steps, notes),
            "rows": _rows(args),
            "checkpoint_every": max_steps,
        },
    }
    return Plan(
        recipe=_checked(recipe, notes),
        steps=max_steps,
        updates_per_step=1,
        max_steps=max_steps,
        prompts_per_step=batch,
        rows=total,
        notes=tuple(notes),
    )


# -- counting -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one step of the recipe is made of."""

    prompts: int
    group_size: int
    minibatches: int
    epochs: int

    @property
    def updates(self) -> int:
        return self.minibatches * self.epochs


def _step_of(args: GRPOConfig | RLOOConfig, processes: int) -> _Step:
    """TRL's buffer of micro-batches, between two generations, as updates.

    Raises:
        RecipeError: An update would mix what was played under different weights.
    """
    accumulated, iterations, size = (
        args.gradient_accumulation_steps,
        args.num_iterations,
        args.num_generations,
    )
    buffered = args.steps_per_generation
    assert buffered is not None and size is not None, "made in __post_init__"
    episodes = args.per_device_train_batch_size * processes * buffered
    if episodes % size:
        raise RecipeError(
            f"{episodes} episodes are played at once (per_device_train_batch_size × processes × "
            f"steps_per_generation), and that must be a multiple of num_generations, {size}"
        )
    times = 1
    if buffered % accumulated == 0:
        minibatches, epochs = buffered // accumulated, iterations
    elif accumulated % buffered == 0 and iterations % (passes := accumulated // buffered) == 0:
        # So many passes over the same episodes are one update, whose gradient is that of a single pass.
        minibatches, epochs = 1, iterations // passes
    elif accumulated % (buffered * iterations) == 0:
        minibatches, epochs, times = 1, 1, accumulated // (buffered * iterations)
    else:
        raise RecipeError(
            f"steps_per_generation={buffered} and gradient_accumulation_steps={accumulated}: an update would "
            "begin in one generation batch and end in the next. Make the one a multiple of the other"
        )
    return _Step(prompts=episodes // size * times, group_size=size, minibatches=minibatches, epochs=epochs)


def _parted(args: GRPOConfig | RLOOConfig, made: _Step) -> Settings:
    """Updates of a step: TRL shuffles episodes, not groups, and divides by what was played at once."""
    settings: Settings = {"epochs": made.epochs}
    if made.minibatches > 1:
        per_micro_batch = getattr(args, "loss_type", None) == "bnpo"
        settings |= {
            "minibatches": made.minibatches,
            "minibatch_of": "episodes",
            "normalise_over": "update" if per_micro_batch else "step",
        }
    return settings


def _dealt(count: int, environments: Mapping[str, EnvConfig], rows: Rows | None) -> dict[str, int]:
    """So many prompts of each environment, in proportion to its rows, and at least one.

    Raises:
        RecipeError: There are fewer prompts than environments.
    """
    if count < len(environments):
        raise RecipeError(
            f"a step has {count} prompts, and there are {len(environments)} environments, each with "
            "one at least: raise per_device_train_batch_size or steps_per_generation"
        )
    weights = {name: rows[name] if isinstance(rows, Mapping) else 1 for name in environments}
    dealt = dict.fromkeys(environments, 1)
    total = sum(weights.values())
    for _ in range(count - len(environments)):
        furthest = max(environments, key=lambda name: weights[name] * count / total - dealt[name])
        dealt[furthest] += 1
    return dealt


# -- sections -----------------------------------------------------------------------------------------


def _common(args: Any, model_name: str) -> Settings:
    """What every recipe has."""
    model: Settings = {"name": model_name, "dtype": "bfloat16" if args.bf16 else "float32"}
    if args.use_cpu:
        model["device"] = "cpu"
    if getattr(args, "chat_template_kwargs", None):
        model["chat_template_kwargs"] = args.chat_template_kwargs
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", Path(args.output_dir).resolve().name) or "run",
        "seed": args.seed,
        "model": model,
        "parallel": {"kind": "fsdp" if args.fsdp else "ddp", "timeout": float(args.ddp_timeout)},
    }


NO_DEADLINE = 366 * 86_400.0
"""Seconds: more than a run lasts."""


def _limited(args: GRPOConfig | RLOOConfig, config: EnvConfig) -> Settings:
    """An environment with the arguments' limits: TRL's budget counts all that comes after the prompt."""
    limits = {
        "max_completion": args.max_completion_length,
        "max_tool_turns": getattr(args, "max_tool_calling_iterations", None),
        # TRL's own config has no deadlines.
        "call_seconds": _deadline(getattr(args, "tool_timeout", 300.0)),
        "seconds": _deadline(getattr(args, "episode_timeout", 3600.0)),
    }
    settings = config.model_dump(exclude_unset=True)
    own = settings.get("limits", {})
    return settings | {"limits": own | {name: value for name, value in limits.items() if value is not None}}


def _deadline(seconds: float | None) -> float:
    return NO_DEADLINE if seconds is None else seconds


SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "cosine_with_min_lr": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
"""By ``lr_scheduler_type``."""


def _optimizer(args: Any, updates: int, notes: list[str]) -> Settings:
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in SCHEDULES:
        raise RecipeError(f"lr_scheduler_type is one of {', '.join(SCHEDULES)}; found {kind}")
    warmup = args.get_warmup_steps(updates)
    if kind == "constant" and warmup:
        notes.append("warmup_steps does nothing with lr_scheduler_type='constant'; see constant_with_warmup")
        warmup = 0
    settings: Settings = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm or None,
        "schedule": SCHEDULES[kind],
        "warmup_steps": warmup,
    }
    left = dict(args.lr_scheduler_kwargs or {})
    if kind == "cosine_with_min_lr":
        floor = left.pop("min_lr_rate", None)
        lowest = left.pop("min_lr", None)
        if (floor is None) == (lowest is None):
            raise RecipeError(
                "lr_scheduler_type='cosine_with_min_lr' takes one of min_lr and min_lr_rate in "
                f"lr_scheduler_kwargs; found {args.lr_scheduler_kwargs}"
            )
        settings["floor"] = lowest / args.learning_rate if floor is None else floor
    if left:
        raise RecipeError(f"lr_scheduler_kwargs: {kind} takes no {', '.join(left)} here; leave it out")
    return settings


def _rows(args: Any) -> Settings:
    """Micro-batches of about as many tokens as theirs; it changes no update."""
    longest = getattr(args, "max_completion_length", None) or getattr(args, "max_length", None)
    usual: int = BatchConfig().micro_tokens
    # A prompt may be as long as its completion.
    tokens = usual if longest is None else min(usual, 2 * longest * args.per_device_train_batch_size)
    return {"micro_tokens": max(tokens, 8), "gradient_checkpointing": bool(args.activation_checkpointing)}


def _checked(settings: Settings, notes: list[str]) -> Recipe:
    """The recipe, with what is wrong with it in one error.

    Raises:
        RecipeError: A value is out of bounds, or settings contradict one another.
    """
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}; found {detail['input']!r}"
            for detail in error.errors(include_url=False)
        ]
        raise RecipeError("the arguments make no recipe: " + "; ".join(found)) from None
    found = problems(recipe)
    rising = [one for one in found if ".optimizer.warmup_steps: " in one]
    if rising:  # A short try of a long run's settings; said, and done as asked.
        notes.append("the learning rate rises to the end: warmup_steps are as many as all updates, or more")
    if left := [one for one in found if one not in rising]:
        raise RecipeError("the arguments make a recipe that contradicts itself: " + "; ".join(left))
    return recipe
