"""Advantages: from the rewards of a group's siblings to how much better each was than the others.

Each is a pure function ``rewards_G -> advantages_G``. Siblings that failed have no reward and are simply not
in ``rewards_G``; a lone scored sibling has nothing to be compared with, so its advantage is 0, and it is
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from turnwise.types import TrajectoryGroup

Rewards = npt.NDArray[np.float64]
AdvantageName = Literal["grpo", "dr_grpo", "rloo"]

STD_EPS = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def grpo(rewards_G: Rewards) -> Rewards:
    """``(r - mean) / (std + 1e-4)`` with the unbiased standard deviation (over G - 1).

    Source: DeepSeekMath, arXiv:2402.03300, §4.1; deviation and epsilon as in TRL's
    ``scale_rewards="group"``.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    scaled_G: Rewards = centred_G / (rewards_G.std(ddof=1) + STD_EPS)
    return scaled_G


def dr_grpo(rewards_G: Rewards) -> Rewards:
    """``r - mean``: without the division, which weighs up tasks that are almost always or almost never
    solved.

    Source: Understanding R1-Zero-Like Training, arXiv:2503.20783, §3.
    """
    return rewards_G - rewards_G.mean() if len(rewards_G) > 1 else np.zeros_like(rewards_G)


def rloo(rewards_G: Rewards) -> Rewards:
    """``r - mean of the others``, which is ``G / (G - 1) · (r - mean)``: an unbiased baseline.

    Source: Back to Basics, arXiv:2402.14740.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    others_G: Rewards = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    advantages_G: Rewards = rewards_G - others_G
    return advantages_G


ADVANTAGES: dict[AdvantageName, Callable[[Rewards], Rewards]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Advantages of a step's trajectories, by id."""

    by_id: dict[str, float]
    """Of each scored trajectory; failed ones are absent."""
    groups: int
    """Groups with at least one scored sibling."""
    lone: int
    """Groups of which a single sibling was scored: nothing can be learned from them."""
    flat: int
    """Groups of two or more whose siblings all got the same reward: all advantages are 0."""


def credit(groups: Sequence[TrajectoryGroup], name: AdvantageName) -> Credit:
    """Advantages within each group, over its scored siblings."""
    by_id: dict[str, float] = {}
    scored_groups = lone = flat = 0
    for group in groups:
        scored = group.scored
        if not scored:
            continue
        rewards_G = np.array([trajectory.reward for trajectory in scored], dtype=np.float64)
        same = bool(rewards_G.max() == rewards_G.min())
        scored_groups += 1
        lone += len(scored) == 1
        flat += len(scored) > 1 and same
        # Rounding of the mean would make tiny advantages of equal rewards, and dropping zero rows miss them.
        advantages_G = np.zeros_like(rewards_G) if same else ADVANTAGES[name](rewards_G)
        for trajectory, advantage in zip(scored, advantages_G, strict=True):
            by_id[trajectory.id] = float(advantage)
    return Credit(by_id=by_id, groups=scored_groups, lone=lone, flat=flat)
