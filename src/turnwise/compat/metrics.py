"""What is logged, under TRL's names: of a generation batch's episodes, and of each update.

Means are over what TRL takes them of; where it invents a number (a length of 0 where no episode ended by
itself) the metric is None. Lengths count the tokens that the policy sampled, as TRL's do where tools answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from turnwise.types import STEPS, Trajectory, TrajectoryGroup

Metrics = dict[str, float | None]

CLIPPED = ("ppo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "rloo")
"""Losses with a clip on both sides."""
CLIP_RATIOS = tuple(
    f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
)
OWN = ("loss", "grad_norm", "lr", "tokens", "entropy", "kl_reference")
"""Metrics of a step that TRL has too: told once, by its names."""


class Ledger:
    """Collects values by name until the next log takes their means, as TRL's trainers do."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | None]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float | None]) -> None:
        """Take one more value of each."""
        for name, value in metrics.items():
            self._values[name].append(None if value is None or not math.isfinite(value) else value)

    def put(self, name: str, value: float) -> None:
        """Take a value in place of those before."""
        self._values[name] = [value]

    def take(self) -> Metrics:
        """The mean of each since the last time; None where it applied to nothing."""
        taken, self._values = self._values, defaultdict(list)
        return {name: mean(values) for name, values in taken.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None of nothing."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation (n - 1); None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def tokens_of(groups: Sequence[TrajectoryGroup]) -> int:
    """Tokens of prompts and of what was sampled, over all episodes: what ``num_tokens`` counts. What tools
    answered is in neither.
    """
    return sum(
        len(one.turns[0].context_ids or ()) + one.sampled_tokens
        for group in groups
        for one in group.trajectories
        if one.turns
    )


def episode_metrics(groups: Sequence[TrajectoryGroup], *, tools: bool, by_batch: bool = False) -> Metrics:
    """What a generation batch's episodes were like.

    Args:
        groups: All that was played, siblings side by side.
        tools: There are tools to call.
        by_batch: Rewards are divided by the deviation of the whole batch (``scale_rewards="batch"``).
    """
    episodes = [one for group in groups for one in group.trajectories if not one.stop_reason.failed]
    return {
        **_lengths(episodes),
        **(_tools(episodes) if tools else {}),
        **_rewards(groups, episodes, by_batch=by_batch),
    }


def _lengths(episodes: Sequence[Trajectory]) -> Metrics:
    metrics: Metrics = {}
    ended = [one for one in episodes if not one.stop_reason.truncated]
    for suffix, own in (("length", episodes), ("terminated_length", ended)):
        lengths = [one.sampled_tokens for one in own]
        metrics[f"completions/mean_{suffix}"] = mean(lengths)
        metrics[f"completions/min_{suffix}"] = float(min(lengths)) if lengths else None
        metrics[f"completions/max_{suffix}"] = float(max(lengths)) if lengths else None
    cut = [float(one.stop_reason.truncated) for one in episodes]
    return {**metrics, "completions/clipped_ratio": mean(cut)}


def _tools(episodes: Sequence[Trajectory]) -> Metrics:
    results = [result for one in episodes for turn in one.turns for result in turn.tool_results]
    return {
        "tools/call_frequency": len(results) / len(episodes) if episodes else None,
        "tools/failure_frequency": mean([float(one.error is not None) for one in results]),
    }


def _rewards(groups: Sequence[TrajectoryGroup], episodes: Sequence[Trajectory], *, by_batch: bool) -> Metrics:
    metrics: Metrics = {}
    for name in dict.fromkeys(name for one in episodes for name in one.rewards):
        values = [
            value
            for one in episodes
            if name in one.rewards and (value := one.rewards[name].value) is not None
        ]
        if name == STEPS and not any(turn.reward is not None for one in episodes for turn in one.turns):
            continue  # It stands for the 0 of an episode that nobody could score any more: no step paid it.
        metrics[f"rewards/{name}/mean"] = mean(values)
        metrics[f"rewards/{name}/std"] = deviation(values)
    totals = [reward for one in episodes if (reward := one.reward) is not None]
    metrics["reward"], metrics["reward_std"] = mean(totals), deviation(totals)
    flat = [
        float(np.isclose(np.std(totals if by_batch else own), 0.0))
        for group in groups
        if (own := [reward for one in group.scored if (reward := one.reward) is not None])
        for _ in group.trajectories
    ]
    return {**metrics, "frac_reward_zero_std": mean(flat)}


def update_metrics(learned: Mapping[str, float], *, loss: str, correction: bool) -> Metrics:
    """What one update reports; None where it had nothing to learn from.

    Args:
        learned: From the learner.
        loss: ``rl.loss`` of the recipe, which decides what its own metrics are called.
        correction: Tokens are weighed by how the sampler drew them.
    """
    metrics: Metrics = {"entropy": learned.get("entropy")}
    if "kl_reference" in learned:
        metrics["kl"] = learned["kl_reference"]
    if loss == "cispo":
        metrics["cispo_clip_ratio"] = learned.get("clip_high")
    elif loss in CLIPPED:
        metrics |= dict.fromkeys(CLIP_RATIOS)
        if "clip_low" in learned:  # Low only where A < 0, high only where A > 0.
            low, high = learned["clip_low"], learned["clip_high"]
            least, most = 1 - learned["spared_low_max"], learned["clip_high_max"]
            metrics |= dict(zip(CLIP_RATIOS, (low, high, low + high, least, most), strict=True))
    if loss == "vespo":
        metrics["vespo/phi_seq_mean"] = learned.get("gate")
    if correction:
        cut = learned.get("correction_cut_max")
        metrics |= {
            "sampling/sampling_logp_difference/mean": learned.get("mismatch"),
            "sampling/sampling_logp_difference/max": learned.get("mismatch_max"),
            "sampling/importance_sampling_ratio/min": None if cut is None else 1 - cut,
            "sampling/importance_sampling_ratio/mean": learned.get("correction"),
            "sampling/importance_sampling_ratio/max": learned.get("correction_max"),
        }
    return metrics
