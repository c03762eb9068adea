"""Selection: which of the groups that a step played are learned from, and what being too long costs.

    played ──> length penalties ──> groups without a difference left out ──> updates ──> masked episodes' loss
               (rl.overlong.penalty)       (rl.flat_groups)                                 (rl.overlong.mask)

All of it follows from the episodes alone, so that a step which is redone from disk selects what it did
before. Stored rewards are never changed: a penalty is something to learn from, no part of the score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from turnwise.config import Recipe, RlConfig
from turnwise.errors import RecipeError
from turnwise.learn.credit import teaches
from turnwise.types import Reward, Sample, Trajectory, TrajectoryGroup

OVERLONG = "overlong"
"""Name of the reward that is the length penalty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What one step learns from."""

    groups: tuple[TrajectoryGroup, ...]
    """With length penalties among the rewards."""
    dropped: tuple[str, ...]
    """Ids of the groups that are left out."""
    metrics: dict[str, float]
    """``dropped_groups``; ``missing_groups``, places that refilling left empty; ``flat_groups`` and
    ``lone_groups`` over all that was played; for each environment ``overlong_penalty`` and ``masked``, the
    mean penalty and the share of episodes without loss. Only what the recipe asks for is there."""


class Selector:
    """Selects what each step learns from.

    Args:
        recipe: With a section ``rl``.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.rl is not None
        self._config = recipe.rl
        self._limits = {env: _length_limit(recipe, recipe.rl, env) for env in recipe.rl.groups}

    def useful(self, group: TrajectoryGroup) -> bool:
        """Whether an update can learn anything from a group, as it was played.

        Raises:
            LearnError: Its rewards do not suit the advantage.
            RecipeError: An environment pays a reward of the penalty's name.
        """
        return self._useful(self._penalised(group))

    def select(self, played: Sequence[TrajectoryGroup]) -> Selection:
        """Select from everything that a step used up.

        Raises:
            LearnError, RecipeError: As for `useful`.
        """
        groups = [self._penalised(group) for group in played]
        metrics = self._length_metrics(groups)
        if self._config.flat_groups == "keep":
            return Selection(groups=tuple(groups), dropped=(), metrics=metrics)
        kept = [group for group in groups if self._useful(group)]
        known = {group.id for group in kept}
        dropped = [group for group in groups if group.id not in known]
        lone = sum(len(group.scored) == 1 for group in dropped)
        flat = sum(len(group.scored) > 1 and not teaches(group, self._config) for group in dropped)
        metrics |= {
            "dropped_groups": float(len(dropped)),
            "flat_groups": flat / len(groups) if groups else 0.0,
            "lone_groups": float(lone),
        }
        if self._config.flat_groups == "refill":
            metrics["missing_groups"] = float(sum(self._config.groups.values()) - len(kept))
        return Selection(groups=tuple(kept), dropped=tuple(group.id for group in dropped), metrics=metrics)

    def _useful(self, group: TrajectoryGroup) -> bool:
        """Of a group with its penalties: something sets siblings apart, and not all of them are masked."""
        heard = any(not masked(one, self._config) for one in group.scored)
        return heard and teaches(group, self._config)

    def _penalised(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """The group with the reward `OVERLONG` on each scored sibling, where the recipe has a penalty."""
        penalty = self._config.overlong.penalty
        if penalty is None:
            return group

        def penalised(one: Trajectory) -> Trajectory:
            if one.reward is None:
                return one
            if OVERLONG in one.rewards:
                raise RecipeError(
                    f"environment '{one.env}' pays a reward '{OVERLONG}', which is the name of "
                    "rl.overlong.penalty; rename the environment's, or remove the penalty"
                )
            lengths = [len(turn.ids or ()) for turn in one.turns]
            tokens = sum(lengths) if penalty.of == "episode" else max(lengths, default=0)
            value = length_penalty(tokens, max_tokens=self._limits[one.env], cache=penalty.cache)
            return replace(one, rewards={**one.rewards, OVERLONG: Reward(value=value, weight=penalty.weight)})

        return replace(group, trajectories=tuple(penalised(one) for one in group.trajectories))

    def _length_metrics(self, groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
        scored: dict[str, list[Trajectory]] = defaultdict(list)
        for group in groups:
            scored[group.env] += group.scored
        metrics: dict[str, float] = {}
        for env, own in scored.items():
            if own and self._config.overlong.penalty is not None:
                metrics[f"overlong_penalty/{env}"] = float(
                    np.mean([one.rewards[OVERLONG].value for one in own])
                )
            if own and self._config.overlong.mask:
                metrics[f"masked/{env}"] = float(np.mean([masked(one, self._config) for one in own]))
        return metrics


def length_penalty(tokens: int, *, max_tokens: int, cache: int) -> float:
    """0 up to ``max_tokens - cache``, from there in a straight line to -1 at ``max_tokens``, and -1 above.

    Source: DAPO's soft overlong punishment, arXiv:2503.14476, equation 13.
    """
    return max(-1.0, min(0.0, (max_tokens - cache - tokens) / cache))


def masked(trajectory: Trajectory, config: RlConfig) -> bool:
    """Whether no loss falls on an episode, because it ran into a limit.

    Source: DAPO's overlong filtering, arXiv:2503.14476, §3.4.
    """
    return config.overlong.mask and trajectory.stop_reason.value in config.overlong.reasons


def without_loss(sample: Sample) -> Sample:
    """A masked episode's sample: no loss, and so no part in any normalisation."""
    return replace(
        sample,
        loss_mask_T=np.zeros_like(sample.loss_mask_T),
        advantages_T=np.zeros_like(sample.advantages_T),
    )


def _length_limit(recipe: Recipe, rl: RlConfig, env: str) -> int:
    """Where the length penalty is full; 0 where there is none."""
    penalty = rl.overlong.penalty
    if penalty is None:
        return 0
    own = rl.sampling.max_tokens if penalty.of == "reply" else recipe.environments[env].limits.max_tokens
    limit = penalty.max_tokens or own
    assert limit is not None, "turnwise.recipe_rules_selection refuses a penalty without a limit"
    return limit
