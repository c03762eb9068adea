"""From a step's groups to its updates: advantages, samples, weights. And what a step's groups were like."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from turnwise.config import RlConfig
from turnwise.learn.credit import Credit, credit
from turnwise.learn.normalise import weigh
from turnwise.learn.samples import rl_samples
from turnwise.pipeline.selection import masked, without_loss
from turnwise.types import Reward, Sample, StopReason, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one update learns from."""

    samples: tuple[Sample, ...]
    """Weighed; those that would add nothing are left out, which changes no other's weight."""
    left_out: int
    credit: Mapping[str, float]
    """Metrics of the whole step's advantages, the same in each of its updates."""


def updates_of(
    groups: Sequence[TrajectoryGroup], config: RlConfig, *, seed: int, step: int
) -> Iterator[Update]:
    """The updates of one step: ``epochs`` passes over the step, each in ``minibatches`` parts.

    Args:
        groups: The step's.
        config: The recipe's.
        seed: The recipe's; with ``step`` it fixes what falls into which part.
        step: Counted from 1.
    """
    rng = np.random.default_rng([seed, 0xE9, step])
    if config.control == "shuffled_rewards":
        groups = shuffle_rewards(groups, rng)
    credits = credit(groups, config)
    samples = _samples(groups, credits, config)
    if config.normalise_over == "step":
        # As if there were one update, and each of them were to move as far as that.
        weighed = iter(_weighed([one for unit in samples for one in unit], config, config.minibatches))
        samples = [[next(weighed) for _ in unit] for unit in samples]
    for _ in range(config.epochs):
        order = rng.permutation(len(samples))
        for part in range(config.minibatches):
            own = [one for i in sorted(order[part :: config.minibatches]) for one in samples[i]]
            yield _update(own if config.normalise_over == "step" else _weighed(own, config), credits, config)


def _samples(groups: Sequence[TrajectoryGroup], credits: Credit, config: RlConfig) -> list[list[Sample]]:
    """The samples of each unit that is dealt out to updates whole: a group, or an episode."""
    units: list[list[Sample]] = []
    for group in groups:
        if config.minibatch_of == "groups":
            units.append([])
        for trajectory in group.scored:
            if config.minibatch_of == "episodes":
                units.append([])
            found = rl_samples(
                trajectory, credits.by_id[trajectory.id], allow_cuts=config.correction.allows_cuts
            )
            units[-1] += [without_loss(one) if masked(trajectory, config) else one for one in found]
    return units


def _weighed(samples: Sequence[Sample], config: RlConfig, times: int = 1) -> list[Sample]:
    """The samples with the recipe's weights, each so many times as large."""
    weighed = weigh(
        samples,
        config.normalise,
        max_tokens=config.sampling.max_tokens if config.normalise == "constant" else None,
        by_env=config.normalise_by_env,
    )
    if times == 1:
        return weighed
    return [replace(one, weights_T=one.weights_T * np.float32(times)) for one in weighed]


def _update(weighed: Sequence[Sample], credits: Credit, config: RlConfig) -> Update:
    # Without a KL term or an entropy bonus a row whose advantage is zero has no gradient.
    every = (config.kl > 0 and config.kl_in == "loss") or config.entropy > 0
    useful = [
        sample for sample in weighed if sample.loss_mask_T.any() and (every or sample.advantages_T.any())
    ]
    return Update(
        samples=tuple(useful),
        left_out=len(weighed) - len(useful),
        credit=credits.metrics,
    )


def shuffle_rewards(groups: Sequence[TrajectoryGroup], rng: np.random.Generator) -> list[TrajectoryGroup]:
    """The same groups with their trajectories' rewards dealt out anew within each environment."""
    pools: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        pools[group.env] += [reward for one in group.scored if (reward := one.reward) is not None]
    for pool in pools.values():
        rng.shuffle(pool)

    def dealt(trajectory: Trajectory) -> Trajectory:
        if trajectory.reward is None:
            return trajectory
        return replace(trajectory, rewards={"shuffled": Reward(value=pools[trajectory.env].pop())})

    return [replace(group, trajectories=tuple(dealt(one) for one in group.trajectories)) for group in groups]


def group_metrics(
    groups: Sequence[TrajectoryGroup], *, version: int, learned: Sequence[TrajectoryGroup] | None = None
) -> dict[str, float]:
    """What a step's episodes were like: rewards, lengths, ends; and how stale what was learned from.

    ``failed/<env>`` is the share that is excluded. Groups that failed whole are in no step: the scheduler
    counts those that were played again.

    Args:
        groups: All that the step played: what was dropped for its rewards would be missing in their mean.
        version: The weights that were current before the step's updates.
        learned: The groups that its updates are made of; all if None.
    """
    episodes = [one for group in groups for one in group.trajectories]
    metrics: dict[str, float] = {}
    for env in sorted({one.env for one in episodes}):
        own = [one for one in episodes if one.env == env]
        rewards = [reward for one in own if (reward := one.reward) is not None]
        if rewards:
            metrics[f"reward/{env}"] = float(np.mean(rewards))
            metrics[f"reward_std/{env}"] = float(np.std(rewards))
        metrics[f"turns/{env}"] = float(np.mean([len(one.turns) for one in own]))
        metrics[f"sampled_tokens/{env}"] = float(np.mean([one.sampled_tokens for one in own]))
        metrics[f"truncated/{env}"] = float(np.mean([one.stop_reason.truncated for one in own]))
        metrics[f"failed/{env}"] = float(np.mean([one.stop_reason.failed for one in own]))
        metrics[f"forfeited/{env}"] = float(np.mean([one.stop_reason is StopReason.FORFEITED for one in own]))
        counts: Counter[str] = Counter()
        for one in own:
            counts.update(one.metrics)
        for name in ("malformed_calls", "tool_errors", "cut_replies", "new_segments"):
            metrics[f"{name}/{env}"] = counts[name] / len(own)
    ages = [
        version - one
        for group in (groups if learned is None else learned)
        for trajectory in group.trajectories
        for turn in trajectory.turns
        for one in turn.versions or ()
    ]
    if ages:
        metrics["staleness_mean"] = float(np.mean(ages))
        metrics["staleness_max"] = float(np.max(ages))
    metrics["episodes"] = float(len(episodes))
    metrics["sampled_tokens"] = float(sum(one.sampled_tokens for one in episodes))
    return metrics
