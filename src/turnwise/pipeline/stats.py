"""Statistics of an evaluation: means with intervals, pass@k, paired comparisons, as pure functions.

The unit of chance is the task, not the episode: k episodes of one task are alike, so resampling draws
whole tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

Rewards = Mapping[str, Sequence[float]]
"""Task key → the rewards of its episodes. Failed episodes are absent, not zero."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(rewards: Rewards, *, resamples: int, seed: int) -> Interval:
    """Mean over tasks of each task's mean reward; tasks are resampled with replacement.

    Args:
        rewards: At least one task with at least one episode.
        resamples: How many times to draw.
        seed: Of the draws.

    Raises:
        ValueError: There is nothing to average.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
    """
    return _percentiles(_task_means(rewards), resamples, seed)


def paired_gain(before: Rewards, after: Rewards, *, resamples: int, seed: int) -> Interval | None:
    """Mean over the tasks that both played of ``after`` − ``before``; None where no task was played by both.

    Pairing by task takes the tasks' own difficulty out of the comparison.
    """
    shared = [task for task in before if after.get(task) and before[task]]
    if not shared:
        return None
    gains = np.array([np.mean(after[task]) - np.mean(before[task]) for task in shared])
    return _percentiles(gains, resamples, seed)


def pass_at_k(rewards: Rewards, k: int, *, success: float = 1.0) -> float | None:
    """Chance that at least one of ``k`` episodes of a task succeeds; None where no task has ``k`` episodes.

    The unbiased estimator 1 − C(n−c, k) / C(n, k) for n episodes with c successes, averaged over tasks.

    Args:
        rewards: By task.
        k: How many tries.
        success: The least reward that counts as success.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (2021), eq. 1.
    """
    chances = []
    for values in rewards.values():
        n, c = len(values), sum(value >= success for value in values)
        if n >= k:
            chances.append(1.0 - comb(n - c, k) / comb(n, k))
    return float(np.mean(chances)) if chances else None


def _task_means(rewards: Rewards) -> np.ndarray:
    means = [float(np.mean(values)) for values in rewards.values() if values]
    if not means:
        raise ValueError("no scored episode to average; look at the failures in the run's trajectories")
    return np.array(means)


def _percentiles(values: np.ndarray, resamples: int, seed: int) -> Interval:
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
