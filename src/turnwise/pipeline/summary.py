"""From evaluation episodes to the run's summary: environment → stage → mean, interval, pass@k, gain.

{"catch": {"sft": {"mean": 0.56, "low": 0.50, "high": 0.62, "n": 256, "greedy": 0.24, …},
           "rl":  {"mean": 0.94, …, "gain": {"over": "sft", "mean": 0.38, "low": 0.31, "high": 0.44}},
           "random": {"mean": 0.20, …}}}
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from turnwise.pipeline.stats import bootstrap_mean, paired_gain, pass_at_k
from turnwise.rollout.record import episode_of
from turnwise.types import Trajectory

MODEL_STAGES = ("untrained", "sft", "rl")
"""In the order in which each is compared with the one before it."""
BASELINES = ("random", "constant")
GREEDY = "greedy"
"""What the id of a task's episode at temperature 0 ends with, where the others end with ``s0``, ``s1``, …"""

Rewards = dict[str, list[float]]


def summarise(episodes: Iterable[tuple[str, Trajectory]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Make the summary.

    Args:
        episodes: (stage, trajectory) of everything that was played for evaluation. A task is the same in
            every stage when its group id ends alike: ``evaluate/sft/catch/17`` and ``evaluate/rl/catch/17``.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        A mapping ready for JSON. ``mean``, ``low``, ``high`` and ``pass_at`` are over sampled play,
        ``greedy`` is the mean at temperature 0. Of several attempts at an episode the last counts. Failed
        episodes are in no mean, and are counted in ``failed``. A stage none of whose episodes was scored has
        ``mean`` null.
    """
    last: dict[tuple[str, str], dict[str, tuple[str, float | None]]] = defaultdict(dict)
    for stage, trajectory in episodes:
        task = trajectory.group_id.rsplit("/", 1)[-1]
        last[trajectory.env, stage][episode_of(trajectory.id)] = task, trajectory.reward

    sampled: dict[tuple[str, str], Rewards] = defaultdict(lambda: defaultdict(list))
    greedy: dict[tuple[str, str], Rewards] = defaultdict(lambda: defaultdict(list))
    failed: Counter[tuple[str, str]] = Counter()
    for key, played in last.items():
        # Not in the order in which they ended: the bootstrap draws tasks by their places.
        for episode, (task, reward) in sorted(played.items()):
            if reward is None:
                failed[key] += 1
            else:
                (greedy if is_greedy(episode) else sampled)[key][task].append(reward)

    summary: dict[str, Any] = {}
    for env in sorted({env for env, _ in last}):
        stages = [stage for stage in (*MODEL_STAGES, *BASELINES) if (env, stage) in last]
        summary[env] = {
            stage: _record(
                sampled[env, stage],
                greedy[env, stage],
                failed[env, stage],
                resamples,
                seed,
            )
            for stage in stages
        }
        learned = [stage for stage in stages if stage in MODEL_STAGES]
        for before, after in pairwise(learned):
            summary[env][after]["gain"] = _gain(
                before, sampled[env, before], sampled[env, after], resamples, seed
            )
    return summary


def is_greedy(trajectory_id: str) -> bool:
    """Whether this is a task's greedy episode; sampling at temperature 0 may be what the recipe asks for."""
    return episode_of(trajectory_id).endswith(f"/{GREEDY}")


def _record(sampled: Rewards, greedy: Rewards, failed: int, resamples: int, seed: int) -> dict[str, Any]:
    interval = bootstrap_mean(sampled, resamples=resamples, seed=seed) if sampled else None
    tries = min((len(values) for values in sampled.values()), default=0)
    return {
        "mean": interval and interval.mean,
        "low": interval and interval.low,
        "high": interval and interval.high,
        "n": sum(len(values) for values in sampled.values()),
        "greedy": bootstrap_mean(greedy, resamples=100, seed=seed).mean if greedy else None,
        "pass_at": {str(k): pass_at_k(sampled, k) for k in _tries(tries)},
        "failed": failed,
    }


def _gain(over: str, before: Rewards, after: Rewards, resamples: int, seed: int) -> dict[str, Any] | None:
    gain = paired_gain(before, after, resamples=resamples, seed=seed)
    if gain is None:
        return None
    return {"over": over, "mean": gain.mean, "low": gain.low, "high": gain.high}


def _tries(most: int) -> Sequence[int]:
    """1, 2, 4, … and the most itself."""
    return sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most} | ({most} if most else set()))
