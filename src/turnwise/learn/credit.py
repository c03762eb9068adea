"""Credit: what each turn of an episode deserves of its rewards.

Two siblings of two turns, paid [1, 0] and [0, 0], compared by ``r - mean``. Only the first turn mattered, and
the second had nothing to do with it:

    trajectory   [ .5, .5]  [-.5, -.5]   all turns alike
    returns      [ .5,  0]  [-.5,   0]   what came after each turn, compared with the sibling's same turn
    mt_grpo      [ .5,  0]  [-.5,   0]   what each was paid itself, beside the outcome, which is 0 for both
    gigpo        [1.0, .5]  [-1., -.5]   all turns alike, beside what came after each, compared in the same
                                         state: both began in one, and were in another by the second turn

Advantages are over the whole step, before it is parted into updates, so that no minibatch changes them; and
over each environment apart, because one's rewards say nothing of the scale of another's.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from turnwise.config import RlConfig
from turnwise.errors import LearnError
from turnwise.learn.advantages import COMPARISONS, Comparison, Groups, Rewards, gdpo
from turnwise.types import STEPS, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)


def paid_by_turn(trajectory: Trajectory) -> Rewards:
    """What each turn was paid: adds up to the trajectory's reward, over all of its segments.

    What a step paid is its turn's, at the weight of the reward ``steps``. Everything else was paid for the
    whole episode when it was over, which makes it the last turn's.

    Raises:
        LearnError: The turns' pay is not what the reward ``steps`` says it is.
    """
    turns = trajectory.turns
    paid_T = np.zeros(len(turns))
    steps = trajectory.rewards.get(STEPS)
    if steps is not None and steps.value is not None:
        paid_T += [turn.reward or 0.0 for turn in turns]
        if not math.isclose(paid_T.sum(), steps.value, rel_tol=1e-9, abs_tol=1e-9):
            raise LearnError(
                f"trajectory {trajectory.id}: its turns were paid {paid_T.sum():g}, and its reward "
                f"'{STEPS}' is {steps.value:g}: something was paid twice, or a turn is missing"
            )
        paid_T *= steps.weight
    if turns:
        paid_T[-1] += sum(
            one.weight * one.value
            for name, one in trajectory.rewards.items()
            if name != STEPS and one.value is not None
        )
    return paid_T


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One environment's step, flat: N turns of M scored trajectories. Of two, with two turns and one:

    rewards_M      = [1.5, 0]
    groups_M       = [  0, 0]        # siblings
    paid_N         = [.5, 1, 0]
    trajectories_N = [ 0, 0, 1]
    numbers_N      = [ 0, 1, 0]
    states_N       = ["start", "door", "start"]
    """

    rewards_M: Rewards
    groups_M: Groups
    paid_N: Rewards
    trajectories_N: npt.NDArray[np.int64]
    numbers_N: npt.NDArray[np.int64]
    states_N: tuple[str | None, ...]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Self:
        """Flatten scored trajectories."""
        turns = [one.turns for one in trajectories]
        return cls(
            rewards_M=np.array([one.reward for one in trajectories], dtype=np.float64),
            groups_M=_numbered(one.group_id for one in trajectories),
            paid_N=np.concatenate([paid_by_turn(one) for one in trajectories]),
            trajectories_N=np.repeat(np.arange(len(turns)), [len(own) for own in turns]),
            numbers_N=np.concatenate([np.arange(len(own)) for own in turns]),
            states_N=tuple(turn.state_key for own in turns for turn in own),
        )

    @property
    def last_N(self) -> npt.NDArray[np.bool_]:
        """Whether a turn is its trajectory's last."""
        return np.append(self.trajectories_N[1:] != self.trajectories_N[:-1], True)[: len(self.paid_N)]

    def sets(self, keys_N: Iterable[Hashable]) -> Groups:
        """A number for each turn, equal for turns of siblings with equal keys."""
        return _numbered(zip(self.groups_M[self.trajectories_N], keys_N, strict=True))


def whole(turns: Turns, compare: Comparison) -> Rewards:
    """``A_t = A(R)``: the trajectory's reward, compared with its siblings', for each of its turns."""
    return compare(turns.rewards_M, turns.groups_M)[turns.trajectories_N]


def discounted(turns: Turns, gamma: float) -> Rewards:
    """``G_t = r_t + γ · G_{t+1}``: what a turn and those after it were paid."""
    returns_N, later = turns.paid_N.copy(), 0.0
    for n, last in reversed(list(enumerate(turns.last_N))):
        returns_N[n] += 0.0 if last else gamma * later
        later = returns_N[n]
    return returns_N


def returns(turns: Turns, compare: Comparison, *, gamma: float) -> Rewards:
    """``A_t = A(G_t)`` among the siblings' t-th turns: no turn is praised for what was paid before it.

    A baseline of each turn's own: early turns have more pay ahead of them than late ones, whatever is done. A
    turn that only one sibling came to has nothing to be compared with.

    Source: G(PO)MDP with a baseline for each time step, Peters & Schaal, Reinforcement learning of motor
    skills with policy gradients, Neural Networks 21 (2008), with the discount on later pay alone.
    """
    return compare(discounted(turns, gamma), turns.sets(turns.numbers_N))


def mt_grpo(turns: Turns, compare: Comparison, *, weight: float) -> Rewards:
    """``A_t = A(r_T) + λ · A(r_t)``, and ``A_T = A(r_T)`` for the last turn T.

    ``r_T`` is the outcome, all that the last turn was paid; ``r_t`` what turn t was paid itself, compared
    with the siblings' t-th turns. Later turns' pay is no merit of an earlier one's, save for the outcome.

    Source: MT-GRPO, arXiv:2505.11821v1 (two turns; here any number of them, each with its own pay).
    """
    last_N = turns.last_N
    outcomes_M = turns.rewards_M.copy()  # Of those without a turn.
    outcomes_M[turns.trajectories_N[last_N]] = turns.paid_N[last_N]
    own_N = np.zeros_like(turns.paid_N)
    own_N[~last_N] = compare(turns.paid_N[~last_N], turns.sets(turns.numbers_N)[~last_N])
    return compare(outcomes_M, turns.groups_M)[turns.trajectories_N] + weight * own_N


def gigpo(turns: Turns, compare: Comparison, *, gamma: float, weight: float) -> Rewards:
    """``A_t = A(R) + ω · A(G_t)``, the latter among all of the siblings' turns that began in the same state.

    A trajectory may come by a state more than once. A turn without a key, or in a state that no other turn
    began in, has its episode's advantage alone.

    Source: GiGPO, arXiv:2505.10978; its F_norm is the deviation with ``rl.advantage`` grpo, 1 with
    dr_grpo.
    """
    anchored_N = anchored(turns)
    own_N = np.zeros_like(turns.paid_N)
    own_N[anchored_N] = compare(discounted(turns, gamma)[anchored_N], turns.sets(turns.states_N)[anchored_N])
    return whole(turns, compare) + weight * own_N


def anchored(turns: Turns) -> npt.NDArray[np.bool_]:
    """Which turns have a state to be compared in."""
    return np.array([state is not None for state in turns.states_N], dtype=np.bool_)


# -- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Advantages of a step's trajectories."""

    by_id: dict[str, tuple[float, ...]]
    """Of each scored trajectory, one for each of its turns; failed ones are absent."""
    metrics: dict[str, float]
    """``flat_groups``: share of the scored groups whose siblings, two or more, nothing sets apart, so that
    nothing is learned from them; ``lone_groups``: how many have a single scored sibling. With credit by turn,
    for each environment: ``own_credit``, the share of turns whose advantage is not their trajectory's mean;
    for gigpo ``anchored``, the share of turns in a state that another began in too, and ``anchor_size``,
    turns to a state.
    """


def credit(groups: Sequence[TrajectoryGroup], config: RlConfig) -> Credit:
    """Advantages of every turn of every scored trajectory.

    Args:
        groups: The whole step's.
        config: Its ``advantage``, ``scale``, ``rewards`` and ``credit``.

    Raises:
        LearnError: The rewards do not suit the advantage, or turns are to be compared by a ``state_key``, and
            none of an environment's has one.
    """
    by_id: dict[str, tuple[float, ...]] = {}
    metrics: dict[str, float] = {}
    by_env: dict[str, list[Trajectory]] = defaultdict(list)
    for group in groups:
        by_env[group.env] += group.scored
    for env, trajectories in by_env.items():
        if not trajectories:
            continue
        turns = Turns.of(trajectories)
        _check(env, turns, config)
        advantages_N = _advantages(trajectories, turns, config)
        ends = np.cumsum([len(one.turns) for one in trajectories])[:-1]
        for one, advantages_T in zip(trajectories, np.split(advantages_N, ends), strict=True):
            by_id[one.id] = tuple(advantages_T.tolist())
        if config.credit.kind != "trajectory" and len(advantages_N):
            metrics |= {
                f"{name}/{env}": value for name, value in _by_turn(turns, advantages_N, config).items()
            }
    scored = [group for group in groups if group.scored]
    compared = [group for group in scored if len(group.scored) > 1]
    flat = sum(not any(any(by_id[one.id]) for one in group.scored) for group in compared)
    metrics["flat_groups"] = flat / len(scored) if scored else 0.0
    metrics["lone_groups"] = float(len(scored) - len(compared))
    return Credit(by_id=by_id, metrics=metrics)


def teaches(group: TrajectoryGroup, config: RlConfig) -> bool:
    """Whether anything may be learned from a group: with a baseline of its own, if any of its turns has an
    advantage; that of `reinforce_pp` is the batch's.
    """
    if not group.scored:
        return False
    return config.advantage == "reinforce_pp" or bool(
        _advantages(group.scored, Turns.of(group.scored), config).any()
    )


def _check(env: str, turns: Turns, config: RlConfig) -> None:
    """Refuse credit by turn for which an environment lacks what it is made of, unless it has single turns."""
    before_N = ~turns.last_N
    if not before_N.any():
        return
    if config.credit.kind == "gigpo" and not anchored(turns).any():
        raise LearnError(
            f"rl.credit.kind=gigpo compares turns in the same state, and environment {env} names none; "
            "define `state_key(self) -> str` on it, or use rl.credit.kind=returns"
        )
    if config.credit.kind == "mt_grpo" and not turns.paid_N[before_N].any():
        # Pay may be rare: that there is none in one step does not mean that there never is.
        log.warning(
            "environment %s: no turn before the last was paid in this step, so that rl.credit.kind=mt_grpo "
            "is the same as trajectory; pay turns by `Step(reward=…)`, or use another kind",
            env,
        )


def _advantages(trajectories: Sequence[Trajectory], turns: Turns, config: RlConfig) -> Rewards:
    """Of all turns of one environment."""
    if config.rewards == "separately":
        return gdpo(*_by_name(trajectories), turns.groups_M)[turns.trajectories_N]
    compare, by_turn = COMPARISONS[config.advantage, config.scale], config.credit
    match by_turn.kind:
        case "trajectory":
            return whole(turns, compare)
        case "returns":
            return returns(turns, compare, gamma=by_turn.gamma)
        case "mt_grpo":
            return mt_grpo(turns, compare, weight=by_turn.weight)
        case "gigpo":
            return gigpo(turns, compare, gamma=by_turn.gamma, weight=by_turn.weight)


def _by_name(trajectories: Sequence[Trajectory]) -> tuple[Rewards, Rewards]:
    """One environment's rewards, trajectories × names, NaN where one did not apply; and the names' weights.

    A name that is not there at all was worth 0, as in a sum. Such are those of an environment that could not
    be asked because the policy broke it: not to be compared by them would be better than to have lost.
    """
    weights = {name: reward.weight for one in trajectories for name, reward in one.rewards.items()}
    rewards_MK = np.zeros((len(trajectories), len(weights)))
    for m, one in enumerate(trajectories):
        for k, name in enumerate(weights):
            if name in one.rewards:
                value = one.rewards[name].value
                rewards_MK[m, k] = np.nan if value is None else value
    return rewards_MK, np.array(list(weights.values()))


def _by_turn(turns: Turns, advantages_N: Rewards, config: RlConfig) -> dict[str, float]:
    """What telling turns apart came to."""
    counts_M = np.bincount(turns.trajectories_N, minlength=len(turns.rewards_M))
    means_M = np.bincount(turns.trajectories_N, advantages_N, minlength=len(counts_M)) / np.maximum(
        counts_M, 1
    )
    found = {
        "own_credit": float(np.mean(~np.isclose(advantages_N, means_M[turns.trajectories_N], atol=1e-9)))
    }
    if config.credit.kind == "gigpo":
        sizes = np.unique(turns.sets(turns.states_N)[anchored(turns)], return_counts=True)[1]
        found["anchored"] = float(sizes[sizes > 1].sum() / len(advantages_N))
        if len(sizes):
            found["anchor_size"] = float(sizes.mean())
    return found


def _numbered(keys: Iterable[Hashable]) -> Groups:
    """Equal numbers for equal keys."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
