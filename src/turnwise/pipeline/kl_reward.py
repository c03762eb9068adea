"""The KL divergence as a part of the reward: what a policy has moved from where it began is taken off.

With ``rl.kl_in: reward``, ``rl.kl`` times the sum over an episode's tokens of ``sampled - reference`` is
taken off its reward before siblings are compared. A token then answers for the divergence of those after it,
too; a term of the loss only knows its own. No stored reward is changed.

Source: RLOO, arXiv:2402.14740, equation 3; as in TRL 1.16's `RLOOTrainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from turnwise.config import RlConfig
from turnwise.learn.learner import Learner
from turnwise.learn.samples import rl_samples
from turnwise.types import Reward, Trajectory, TrajectoryGroup

KL = "kl"
"""The reward's name."""


def with_kl_reward(
    learner: Learner, groups: Sequence[TrajectoryGroup], config: RlConfig
) -> tuple[list[TrajectoryGroup], dict[str, float]]:
    """The groups with the reward `KL` on each scored sibling; and ``kl_reference``, the mean over tokens.

    Args:
        learner: With a reference model.
        groups: A step's.
        config: The recipe's.
    """
    scored = [one for group in groups for one in group.scored if one.reward is not None]
    samples = {one.id: rl_samples(one, 0.0, allow_cuts=config.correction.allows_cuts) for one in scored}
    flat = [sample for found in samples.values() for sample in found]
    reference = iter(learner.logprobs(flat, reference=True))
    sums: dict[str, float] = {}
    tokens = 0
    for name, found in samples.items():
        sums[name] = 0.0
        for sample in found:
            apart_T = np.where(sample.loss_mask_T, sample.logprobs_T - next(reference), 0.0)
            sums[name] += float(apart_T.sum(dtype=np.float64))
            tokens += int(sample.loss_mask_T.sum())

    def paid(one: Trajectory) -> Trajectory:
        if one.id not in sums:
            return one
        return replace(one, rewards={**one.rewards, KL: Reward(value=-sums[one.id], weight=config.kl)})

    paying = [replace(group, trajectories=tuple(paid(one) for one in group.trajectories)) for group in groups]
    return paying, {"kl_reference": sum(sums.values()) / tokens} if tokens else {}
