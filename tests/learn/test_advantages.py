import numpy as np
import pytest
from tests.support.trajectories import trajectory

from turnwise.learn.advantages import ADVANTAGES, credit, dr_grpo, grpo, rloo
from turnwise.types import StopReason, TrajectoryGroup

REWARDS = np.array([0.0, 1.0, 1.0, 0.25])


def test_values_by_hand() -> None:
    mean = 0.5625
    std = np.sqrt(((REWARDS - mean) ** 2).sum() / 3)
    np.testing.assert_allclose(grpo(REWARDS), (REWARDS - mean) / (std + 1e-4), rtol=1e-12)
    np.testing.assert_allclose(dr_grpo(REWARDS), [-0.5625, 0.4375, 0.4375, -0.3125], rtol=1e-12)
    np.testing.assert_allclose(rloo(REWARDS), [-0.75, 7 / 12, 7 / 12, -5 / 12], rtol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_they_sum_to_zero_and_a_lone_sibling_gets_none(name: str) -> None:
    advantage = ADVANTAGES[name]  # type: ignore[index]
    assert abs(advantage(REWARDS).sum()) < 1e-12
    assert advantage(np.array([3.0])).tolist() == [0.0]


def group(name: str, rewards: list[float | None]) -> TrajectoryGroup:
    return TrajectoryGroup(
        id=name,
        env="catch",
        task={},
        trajectories=tuple(
            trajectory(f"{name}/s{i}", reward=reward)
            if reward is not None
            else trajectory(f"{name}/s{i}", reward=None, stop_reason=StopReason.ENV_FAILED)
            for i, reward in enumerate(rewards)
        ),
    )


def test_failed_siblings_are_absent_from_the_baseline() -> None:
    groups = [
        group("a", [1.0, None, 0.0]),
        group("b", [None, 1.0]),
        group("c", [0.1, 0.1, 0.1]),
        group("d", [None, None]),
    ]
    found = credit(groups, "dr_grpo")
    assert found.by_id == {
        "a/s0": 0.5, "a/s2": -0.5, "b/s1": 0.0, "c/s0": 0.0, "c/s1": 0.0, "c/s2": 0.0,
    }  # fmt: skip
    assert (found.groups, found.lone, found.flat) == (3, 1, 1)
