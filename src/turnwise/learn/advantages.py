"""Advantages: from rewards to how much better each was than what it is compared with.

Two kinds of pure functions. Of one group, ``rewards_G -> advantages_G``:

    grpo([0, 1, 1, 0])  = [-.87, .87, .87, -.87]
    maxrl([0, 1, 0, 0]) = [-1, 3, -1, -1]

and of a batch, ``rewards_N, groups_N -> advantages_N``, where equal numbers in ``groups_N`` are compared with
one another and deviations are over all N. What is compared is mostly a group's siblings, but
`turnwise.learn.credit` compares turns by the same functions.

Siblings that failed have no reward and are simply not there. What is alone or equal to all that it is
compared with has an advantage of exactly 0: rounding of a mean would make tiny ones, which scaling would blow
up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from turnwise.config.credit import AdvantageName, Scale
from turnwise.errors import LearnError

Rewards = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
Advantage = Callable[[Rewards], Rewards]
Comparison = Callable[[Rewards, Groups], Rewards]

STD_EPS = 1e-4
"""Added to every standard deviation that is divided by, as TRL does."""
_ROUNDING = 1e-12
"""Sums of the same rewards in another order differ by less than this, relatively."""


def flat(rewards_G: Rewards) -> bool:
    """Whether nothing sets these apart: they are equal up to rounding, or there is only one."""
    return len(rewards_G) < 2 or bool(np.ptp(rewards_G) <= _ROUNDING * np.abs(rewards_G).max())


# -- of one group -------------------------------------------------------------------------------------------


def grpo(rewards_G: Rewards) -> Rewards:
    """``(r - mean) / (std + 1e-4)`` with the unbiased standard deviation (over G - 1).

    Source: DeepSeekMath, arXiv:2402.03300, §4.1; deviation and epsilon as in TRL's
    ``scale_rewards="group"``.
    """
    if flat(rewards_G):
        return np.zeros_like(rewards_G)
    advantages_G: Rewards = (rewards_G - rewards_G.mean()) / (_std(rewards_G) + STD_EPS)
    return advantages_G


def dr_grpo(rewards_G: Rewards) -> Rewards:
    """``r - mean``: without the division, which weighs up tasks that are almost always or almost never
    solved.

    Source: Understanding R1-Zero-Like Training, arXiv:2503.20783, §3.
    """
    advantages_G: Rewards = np.zeros_like(rewards_G) if flat(rewards_G) else rewards_G - rewards_G.mean()
    return advantages_G


def rloo(rewards_G: Rewards) -> Rewards:
    """``r - mean of the others``, which is ``G / (G - 1) · (r - mean)``: an unbiased baseline.

    Source: Back to Basics, arXiv:2402.14740.
    """
    if flat(rewards_G):
        return np.zeros_like(rewards_G)
    others_G: Rewards = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return rewards_G - others_G


def maxrl(rewards_G: Rewards) -> Rewards:
    """``(r - mean) / mean``; 0 for a group without any success. With rewards of 0 and 1 its gradient is that
    of the log of the chance p to succeed, its expansion in 1 - p to the G - 1st term: tasks that are rarely
    solved weigh more, by 1 / p in the limit.

    Source: Maximum Likelihood Reinforcement Learning, arXiv:2602.02710.

    Raises:
        LearnError: A reward is negative: what is divided by is no longer a chance, and its sign may turn.
    """
    if rewards_G.min() < 0:
        raise LearnError(
            "rl.advantage=maxrl divides by the mean of a group's rewards, which must not be negative; found "
            f"{rewards_G.min():g}. Pay between 0 and 1, or use rl.advantage=grpo"
        )
    advantages_G: Rewards = np.zeros_like(rewards_G) if flat(rewards_G) else rewards_G / rewards_G.mean() - 1
    return advantages_G


# -- of a batch ---------------------------------------------------------------------------------------------


def per_group(advantage: Advantage) -> Comparison:
    """``advantage`` within each group."""

    def compare(rewards_N: Rewards, groups_N: Groups) -> Rewards:
        advantages_N = np.zeros_like(rewards_N)
        order_N = np.argsort(groups_N, kind="stable")
        for members_G in np.split(order_N, np.flatnonzero(np.diff(groups_N[order_N])) + 1):
            if len(members_G):
                advantages_N[members_G] = advantage(rewards_N[members_G])
        return advantages_N

    return compare


def grpo_batch(rewards_N: Rewards, groups_N: Groups) -> Rewards:
    """``(r - group mean) / (std of all rewards + 1e-4)``: no task weighs more because its siblings agree.

    Source: Tricks or Traps, arXiv:2508.08221; as TRL's ``scale_rewards="batch"``.
    """
    return per_group(dr_grpo)(rewards_N, groups_N) / (_std(rewards_N) + STD_EPS)


def rloo_batch(rewards_N: Rewards, groups_N: Groups) -> Rewards:
    """``a / (std of all a + 1e-4)`` with a of `rloo`; the mean of all a is 0. Lone siblings are in no
    deviation.

    Source: TRL's ``RLOOTrainer`` with ``normalize_advantages``.
    """
    return _whitened(per_group(rloo)(rewards_N, groups_N), groups_N)


def reinforce_pp(rewards_N: Rewards, groups_N: Groups) -> Rewards:
    """``(r - mean of all) / (std of all + 1e-4)``: one baseline for all tasks, so that siblings are not
    needed.

    Source: REINFORCE++, arXiv:2501.03262, over trajectories and without its KL in the reward.
    """
    if flat(rewards_N):
        return np.zeros_like(rewards_N)
    advantages_N: Rewards = (rewards_N - rewards_N.mean()) / (_std(rewards_N) + STD_EPS)
    return advantages_N


def reinforce_pp_baseline(rewards_N: Rewards, groups_N: Groups) -> Rewards:
    """``a / (std of all a + 1e-4)`` with ``a = r - group mean``; the mean of all a is 0.

    Source: REINFORCE++ with baseline, arXiv:2501.03262, over trajectories.
    """
    return _whitened(per_group(dr_grpo)(rewards_N, groups_N), groups_N)


def gdpo(rewards_NK: Rewards, weights_K: Rewards, groups_N: Groups) -> Rewards:
    """``a / (std of all a + 1e-4)`` with ``a = Σ_k w_k · grpo(r_k)``, each reward compared by itself.

    A sum lets rewards of a wide range drown the others, and makes siblings equal that are so for different
    reasons. The mean of all a is 0. Lone siblings are in no deviation.

    Args:
        rewards_NK: Of N trajectories by K names; NaN where a reward did not apply: it is then outside of
            that reward's baseline.
        weights_K: Of each name.
        groups_N: Which trajectories are siblings.

    Source: GDPO, arXiv:2601.05242; as TRL's ``multi_objective_aggregation="normalize_then_sum"``.
    """
    advantages_N = np.zeros(len(groups_N))
    for rewards_N, weight in zip(rewards_NK.T, weights_K, strict=True):
        applies_N = ~np.isnan(rewards_N)
        advantages_N[applies_N] += weight * per_group(grpo)(rewards_N[applies_N], groups_N[applies_N])
    return _whitened(advantages_N, groups_N)


def _std(values_N: Rewards) -> float:
    return float(values_N.std(ddof=1)) if len(values_N) > 1 else 0.0


def _whitened(advantages_N: Rewards, groups_N: Groups) -> Rewards:
    _, group_N, sizes = np.unique(groups_N, return_inverse=True, return_counts=True)
    return advantages_N / (_std(advantages_N[sizes[group_N] > 1]) + STD_EPS)


COMPARISONS: dict[tuple[AdvantageName, Scale | None], Comparison] = {
    ("grpo", None): per_group(grpo),
    ("grpo", "group"): per_group(grpo),
    ("grpo", "batch"): grpo_batch,
    ("grpo", "none"): per_group(dr_grpo),
    ("dr_grpo", None): per_group(dr_grpo),
    ("rloo", None): per_group(rloo),
    ("rloo", "none"): per_group(rloo),
    ("rloo", "batch"): rloo_batch,
    ("maxrl", None): per_group(maxrl),
    ("reinforce_pp", None): reinforce_pp,
    ("reinforce_pp_baseline", None): reinforce_pp_baseline,
}
"""By ``rl.advantage`` and ``rl.scale``."""
