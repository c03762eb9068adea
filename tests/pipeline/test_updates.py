"""From groups to updates: parts that partition, rewards that are only dealt out anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from turnwise.config import RlConfig
from turnwise.pipeline.updates import group_metrics, shuffle_rewards, updates_of
from turnwise.types import (
    STEPS,
    Failure,
    Finish,
    Message,
    Reward,
    Sampling,
    Segment,
    StopReason,
    Trajectory,
    TrajectoryGroup,
    Turn,
)


def episode(group: str, k: int, reward: float | None, *, env: str, version: int = 0) -> Trajectory:
    turn = Turn(
        message=Message.assistant("x"),
        context_ids=[1, 2],
        ids=[3, 4],
        logprobs=[-0.5, -0.5],
        versions=[version, version],
        finish=Finish.STOP,
    )
    failed = reward is None
    return Trajectory(
        id=f"{group}/s{k}",
        group_id=group,
        env=env,
        task={},
        seed=0,
        segments=(Segment(prompt=(Message.user("go"),), turns=(turn,)),),
        rewards={} if reward is None else {"own": Reward(value=reward)},
        stop_reason=StopReason.ENV_FAILED if failed else StopReason.TERMINATED,
        error=Failure(kind="E", message="lost", where="there") if failed else None,
        sampling=Sampling(),
        policy="engine",
        metrics={"tool_errors": 1.0},
    )


def group(env: str, n: int, *rewards: float | None, version: int = 0) -> TrajectoryGroup:
    name = f"rl/{env}/{n}"
    found = tuple(episode(name, k, reward, env=env, version=version) for k, reward in enumerate(rewards))
    return TrajectoryGroup(id=name, env=env, task={}, trajectories=found, version=version)


GROUPS = [group("a", n, 0.0, float(n), 1.0, 3.5) for n in range(5)] + [
    group("b", n, 0, 1, 0, 0) for n in range(4)
]


def config(**changes: object) -> RlConfig:
    return RlConfig.model_validate({"steps": 1, "groups": {"a": 5, "b": 4}, "group_size": 4, **changes})


@pytest.mark.parametrize("minibatches", [1, 2, 4, 9])
def test_minibatches_partition_the_groups_of_each_epoch(minibatches: int) -> None:
    updates = list(updates_of(GROUPS, config(minibatches=minibatches, epochs=2), seed=0, step=1))
    assert len(updates) == 2 * minibatches
    for epoch in (updates[:minibatches], updates[minibatches:]):
        seen = [one.trajectory_id for update in epoch for one in update.samples]
        assert sorted(seen) == sorted(one.id for found in GROUPS for one in found.trajectories)
        # Siblings stay together: their baseline is each other.
        parts = [{one.group_id for one in update.samples} for update in epoch]
        assert sum(len(part) for part in parts) == len(GROUPS)


@pytest.mark.parametrize("minibatches", [4, 18])
def test_episodes_may_be_dealt_out_whatever_group_they_are_of(minibatches: int) -> None:
    asked = config(minibatches=minibatches, minibatch_of="episodes")
    updates = list(updates_of(GROUPS, asked, seed=0, step=1))
    sizes = [len(update.samples) for update in updates]
    assert len(updates) == minibatches and set(sizes) == {36 // minibatches}
    seen = [one.trajectory_id for update in updates for one in update.samples]
    assert sorted(seen) == sorted(one.id for found in GROUPS for one in found.trajectories)
    assert any(len({one.group_id for one in update.samples}) > 1 for update in updates)
    # They are compared with all of their siblings, wherever those are.
    assert advantages(GROUPS, asked) == advantages(GROUPS, config())


def longer(one: Trajectory, tokens: int) -> Trajectory:
    (segment,) = one.segments
    (turn,) = segment.turns
    turn = replace(turn, ids=[3] * tokens, logprobs=[-0.5] * tokens, versions=[0] * tokens)
    return replace(one, segments=(replace(segment, turns=(turn,)),))


def test_weights_over_the_step() -> None:
    """Two updates of 4 and 12 tokens: with means over the step, each token moves the policy alike."""
    made = [group("a", n, 0.0, 1.0) for n in range(2)]
    made[1] = replace(made[1], trajectories=tuple(longer(one, 6) for one in made[1].trajectories))

    def weights(over: str, normalise: str) -> dict[float, float]:
        asked = config(minibatches=2, normalise_over=over, normalise=normalise)
        updates = updates_of(made, asked, seed=0, step=1)
        return {
            float(one.loss_mask_T.sum()): float(one.weights_T.max())
            for update in updates
            for one in update.samples
        }

    assert weights("update", "token") == {2: pytest.approx(1 / 4), 6: pytest.approx(1 / 12)}
    assert weights("step", "token") == {2: pytest.approx(2 / 16), 6: pytest.approx(2 / 16)}
    assert weights("update", "sequence") == weights("step", "sequence")


def test_the_same_step_is_parted_alike_again_and_another_one_otherwise() -> None:
    def parts(seed: int, step: int) -> list[list[str]]:
        found = updates_of(GROUPS, config(minibatches=3), seed=seed, step=step)
        return [[one.trajectory_id for one in update.samples] for update in found]

    assert parts(0, 1) == parts(0, 1)
    assert parts(0, 1) != parts(0, 2) and parts(0, 1) != parts(1, 1)


def test_rows_without_advantage_are_left_out_and_change_no_weight() -> None:
    flat = group("a", 9, 1.0, 1.0)
    (alone,) = updates_of([GROUPS[0]], config(normalise="sequence"), seed=0, step=1)
    (both,) = updates_of([GROUPS[0], flat], config(normalise="sequence"), seed=0, step=1)
    assert (both.left_out, both.credit["flat_groups"]) == (2, 0.5)
    assert [one.trajectory_id for one in both.samples] == [one.trajectory_id for one in alone.samples]
    assert alone.samples[0].weights_T.tolist() == pytest.approx([0, 0, 1 / 8, 1 / 8])
    assert both.samples[0].weights_T.tolist() == pytest.approx([0, 0, 1 / 12, 1 / 12])
    # The KL term and the entropy bonus have a gradient everywhere.
    for term in ({"kl": 0.1}, {"entropy": 0.1}):
        (with_term,) = updates_of([GROUPS[0], flat], config(**term), seed=0, step=1)
        assert (len(with_term.samples), with_term.left_out) == (6, 0)


def advantages(groups: Sequence[TrajectoryGroup], asked: RlConfig) -> dict[str, float]:
    """Of every trajectory, whichever update it fell into."""
    updates = updates_of(groups, asked, seed=0, step=1)
    return {one.trajectory_id: float(one.advantages_T[-1]) for update in updates for one in update.samples}


@pytest.mark.parametrize("minibatches", [2, 5])
@pytest.mark.parametrize(
    "changes",
    [{"scale": "batch"}, {"advantage": "reinforce_pp"}, {"rewards": "separately"}],
    ids=lambda changes: " ".join(changes.values()),
)
def test_minibatches_do_not_change_what_is_over_the_whole_step(
    minibatches: int, changes: dict[str, str]
) -> None:
    whole = advantages(GROUPS, config(**changes))
    assert len(whole) == 36 and advantages(GROUPS, config(minibatches=minibatches, **changes)) == whole


def test_a_control_run_gives_away_nothing_of_what_turns_were_paid() -> None:
    """Pay by turn is shuffled with the rest: without that credit by turn would still learn."""
    paid = []
    for k in range(4):
        one = episode("rl/a/0", k, 0.0, env="a")
        (segment,) = one.segments
        turns = tuple(replace(segment.turns[0], reward=pay) for pay in (float(k), 0.0))
        rewards = {STEPS: Reward(value=float(k))}
        paid.append(replace(one, segments=(replace(segment, turns=turns),), rewards=rewards))
    step = [TrajectoryGroup(id="rl/a/0", env="a", task={}, trajectories=tuple(paid))]
    by_turn = {"credit": {"kind": "mt_grpo"}, "advantage": "dr_grpo"}
    (update,) = updates_of(step, config(**by_turn), seed=0, step=1)
    firsts = {one.trajectory_id: one.advantages_T[2] for one in update.samples}
    assert firsts == {f"rl/a/0/s{k}": k - 1.5 for k in range(4)}
    (control,) = updates_of(step, config(**by_turn, control="shuffled_rewards"), seed=0, step=1)
    rows = {one.trajectory_id: one.advantages_T for one in control.samples}
    assert sorted(row[2] for row in rows.values()) == [-1.5, -0.5, 0.5, 1.5]
    assert all(row[2] == row[-1] for row in rows.values()), "dealt out whole, to the last turn"
    assert {id: row[2] for id, row in rows.items()} != firsts


def test_failed_siblings_are_in_no_baseline() -> None:
    (update,) = updates_of([group("a", 0, 1.0, None, 0.0)], config(advantage="dr_grpo"), seed=0, step=1)
    advantages = {one.trajectory_id: one.advantages_T[-1] for one in update.samples}
    assert advantages == {"rl/a/0/s0": 0.5, "rl/a/0/s2": -0.5}


def test_shuffled_rewards_are_the_same_rewards_within_each_environment() -> None:
    groups = [*GROUPS, group("a", 7, 5.0, None)]
    dealt = shuffle_rewards(groups, np.random.default_rng(0))

    def rewards(of: list[TrajectoryGroup], env: str) -> Counter[float | None]:
        return Counter(one.reward for found in of if found.env == env for one in found.trajectories)

    assert [one.id for found in dealt for one in found.trajectories] == [
        one.id for found in groups for one in found.trajectories
    ]
    for env in ("a", "b"):
        assert rewards(dealt, env) == rewards(groups, env)
    assert [one.reward for one in dealt[3].trajectories] != [one.reward for one in groups[3].trajectories]
    # Every place gets every reward equally often: nothing is left to learn.
    places = np.zeros(4)
    for seed in range(400):
        made = shuffle_rewards([group("b", n, 1, 0, 0, 0) for n in range(2)], np.random.default_rng(seed))
        places += [float(one.reward or 0) for one in made[0].trajectories]
    assert np.allclose(places / 400, 0.25, atol=0.07)


def test_what_a_step_was_like() -> None:
    metrics = group_metrics(
        [group("a", 0, 1.0, 0.0, version=3), group("b", 0, 2.0, None, version=2)], version=3
    )
    assert metrics["reward/a"] == 0.5 and metrics["reward_std/a"] == 0.5
    assert metrics["reward/b"] == 2.0 and metrics["failed/b"] == 0.5
    assert metrics["tool_errors/a"] == 1.0
    assert (metrics["staleness_max"], metrics["staleness_mean"]) == (1.0, 0.5)
    assert (metrics["episodes"], metrics["sampled_tokens"]) == (4.0, 8.0)
