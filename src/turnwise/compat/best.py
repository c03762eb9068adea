"""Which metric of an evaluation says that a model is the best: ``metric_for_best_model``.

An evaluation plays episodes and learns nothing, so that it has no loss, which is what transformers looks at
where nothing else is named. (TRL's trainers compute one: over a batch whose advantages add up to nothing, a
number about 0 that says nothing of the policy.) Here that is the reward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.trainer_utils import SaveStrategy

from turnwise.compat.rows import is_columns
from turnwise.errors import RecipeError
from turnwise.rollout.scoring import RewardFunction

log = logging.getLogger(__name__)

SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
PLAYED = (
    "reward", "reward_std", "frac_reward_zero_std", "num_tokens", "completions/clipped_ratio",
    "tools/call_frequency", "tools/failure_frequency", *SPEEDS,
    *(f"completions/{which}_{what}" for which in ("mean", "min", "max")
      for what in ("length", "terminated_length")),
)  # fmt: skip
"""What every evaluation that plays has."""


def by_reward(args: Any) -> None:
    """Let the reward say what is best, where ``load_best_model_at_end`` is asked for and no metric is named.

    Args:
        args: Changed in place, as transformers does.
    """
    derived = getattr(args, "_derived", {"metric_for_best_model": "loss"})
    if not args.load_best_model_at_end or args.metric_for_best_model != "loss":
        return
    if derived.get("metric_for_best_model") != "loss":
        return  # It was named.
    args.metric_for_best_model = "eval_reward"
    if "greater_is_better" in derived or not hasattr(args, "_derived"):
        args.greater_is_better = True
    log.warning(
        "load_best_model_at_end: metric_for_best_model is not set, and an evaluation has no loss; the best "
        "model is the one with the highest eval_reward"
    )


def check_played(args: Any, functions: Sequence[RewardFunction], *, scores: bool, datasets: Any) -> None:
    """Refuse a metric that no evaluation that plays will have.

    Args:
        args: The trainer's.
        functions: Its reward functions.
        scores: Environments may have scores of their own, under any name.
        datasets: ``eval_dataset``.

    Raises:
        RecipeError: It is none of them.
    """
    rewards = [f"rewards/{one.name}/{what}" for one in functions for what in ("mean", "std")]
    more = scores or any(_may_log(one) for one in functions)
    check_metric(args, (*PLAYED, *rewards), datasets=datasets, more=more)


def check_metric(args: Any, known: Sequence[str], *, datasets: Any, more: bool = False) -> None:
    """Refuse a metric that no evaluation will have.

    Args:
        args: The trainer's.
        known: What each has, without ``eval_`` and a data set's name.
        datasets: ``eval_dataset``; of several by name each has its own metrics.
        more: There may be others, which only shows in an evaluation; a loss is in none.

    Raises:
        RecipeError: It is none of them.
    """
    name = args.metric_for_best_model
    if name is None or not (args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST):
        return
    several = isinstance(datasets, Mapping) and not is_columns(datasets)
    prefixes = [f"eval_{one}_" for one in datasets] if several else ["eval_"]
    full = name if name.startswith("eval_") else f"eval_{name}"
    for prefix in prefixes:
        rest = full.removeprefix(prefix)
        if full.startswith(prefix) and (rest in known or (more and rest != "loss")):
            return
    raise RecipeError(
        f"metric_for_best_model is {name!r}, which an evaluation does not have (where it plays and learns "
        "nothing, there is no loss); it has: "
        + ", ".join(f"{prefix}{one}" for prefix in prefixes for one in known)
    )


def _may_log(function: RewardFunction) -> bool:
    """Whether it is given ``log_metric``."""
    parameters = inspect.signature(function.function).parameters.values()
    return any(one.name == "log_metric" or one.kind is one.VAR_KEYWORD for one in parameters)
