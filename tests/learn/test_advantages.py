"""Advantages against the papers' formulas in float64, against TRL's own trainers, and by what must hold."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer
from tests.support.trajectories import trajectory

from turnwise.config import RlConfig
from turnwise.config.credit import SCALES, AdvantageName
from turnwise.errors import LearnError
from turnwise.learn.advantages import COMPARISONS, dr_grpo, gdpo, grpo, maxrl, rloo
from turnwise.learn.credit import credit
from turnwise.types import Reward, StopReason, TrajectoryGroup

REWARDS = np.array([0.0, 1.0, 1.0, 0.25])
WITHIN_GROUPS = [(name, scale) for name, scale in COMPARISONS if name != "reinforce_pp"]


def test_values_by_hand() -> None:
    mean = 0.5625
    std = np.sqrt(((REWARDS - mean) ** 2).sum() / 3)
    np.testing.assert_allclose(grpo(REWARDS), (REWARDS - mean) / (std + 1e-4), rtol=1e-12)
    np.testing.assert_allclose(dr_grpo(REWARDS), [-0.5625, 0.4375, 0.4375, -0.3125], rtol=1e-12)
    np.testing.assert_allclose(rloo(REWARDS), [-0.75, 7 / 12, 7 / 12, -5 / 12], rtol=1e-12)
    np.testing.assert_allclose(maxrl(REWARDS), [-1, 7 / 9, 7 / 9, -5 / 9], rtol=1e-12)


# -- the papers' formulas, without numpy --------------------------------------------------------------------

Groups = list[list[float]]


def per_group(formula: Callable[[list[float]], list[float]]) -> Callable[[Groups], list[float]]:
    return lambda groups: [one for group in groups for one in (formula(group) if len(group) > 1 else [0.0])]


def centred(rewards: list[float]) -> list[float]:
    return [reward - statistics.fmean(rewards) for reward in rewards]


def leave_one_out(rewards: list[float]) -> list[float]:
    return [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


def over_std(groups: Groups, formula: Callable[[list[float]], list[float]]) -> list[float]:
    """Whitened over the batch; lone siblings are 0 and outside of the deviation."""
    compared = [one for group in groups if len(group) > 1 for one in formula(group)]
    mean, std = statistics.fmean(compared), statistics.stdev(compared)
    white = iter([(one - mean) / (std + 1e-4) for one in compared])
    return [next(white) if len(group) > 1 else 0.0 for group in groups for _ in group]


def all_of(groups: Groups) -> list[float]:
    return [reward for group in groups for reward in group]


FORMULAS: dict[tuple[str, str | None], Callable[[Groups], list[float]]] = {
    ("grpo", "group"): per_group(lambda r: [one / (statistics.stdev(r) + 1e-4) for one in centred(r)]),
    ("grpo", "batch"): lambda groups: [
        one / (statistics.stdev(all_of(groups)) + 1e-4) for one in per_group(centred)(groups)
    ],
    ("grpo", "none"): per_group(centred),
    ("dr_grpo", None): per_group(centred),
    ("rloo", None): per_group(leave_one_out),
    ("rloo", "none"): per_group(leave_one_out),
    ("rloo", "batch"): lambda groups: over_std(groups, leave_one_out),
    ("maxrl", None): per_group(lambda r: [one / statistics.fmean(r) for one in centred(r)]),
    ("reinforce_pp", None): lambda groups: [
        one / (statistics.stdev(all_of(groups)) + 1e-4) for one in centred(all_of(groups))
    ],
    ("reinforce_pp_baseline", None): lambda groups: over_std(groups, centred),
}
FORMULAS["grpo", None] = FORMULAS["grpo", "group"]


def compared(method: tuple[Any, Any], groups: Groups) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By Turnwise, with the groups' members shuffled among one another."""
    rewards_N = np.array(all_of(groups))
    groups_N = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.random.default_rng(0).permutation(len(rewards_N))
    advantages_N = np.empty_like(rewards_N)
    advantages_N[order] = COMPARISONS[method](rewards_N[order], groups_N[order])
    return advantages_N


def test_what_recipes_may_choose_is_there_and_has_a_formula() -> None:
    choices = {(name, scale) for name in get_args(AdvantageName) for scale in (None, *SCALES.get(name, ()))}
    assert choices == COMPARISONS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("method", COMPARISONS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_formulas_in_float64(method: tuple[Any, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [rng.uniform(0, 3, size=size).tolist() for size in (4, 1, 2, 7, 4)]
    np.testing.assert_allclose(compared(method, groups), FORMULAS[method](groups), atol=1e-12)


# -- what must hold -----------------------------------------------------------------------------------------

rewards = st.floats(0, 8, allow_nan=False).map(lambda value: round(value, 3))
some_groups = st.lists(st.lists(rewards, min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("method", WITHIN_GROUPS, ids=str)
@settings(deadline=None)
@given(groups=some_groups)
def test_siblings_sum_to_zero_in_the_order_of_their_rewards(method: Any, groups: Groups) -> None:
    advantages = iter(compared(method, groups))
    for group in groups:
        own = np.array([next(advantages) for _ in group])
        assert abs(own.sum()) < 1e-9 * (1 + abs(own).max())
        if len(set(group)) == 1:
            assert own.tolist() == [0.0] * len(group)
        else:
            assert (own[np.argmax(group)] > 0 > own[np.argmin(group)]) and own.argmax() == np.argmax(group)


@pytest.mark.parametrize("method", [one for one in COMPARISONS if one[0] != "maxrl"], ids=str)
@settings(deadline=None)
@given(groups=some_groups, shift=st.integers(-50, 50))
def test_a_constant_on_every_reward_changes_nothing(method: Any, groups: Groups, shift: int) -> None:
    shifted = [[reward + shift for reward in group] for group in groups]
    np.testing.assert_allclose(compared(method, shifted), compared(method, groups), atol=1e-7)


@settings(deadline=None)
@given(groups=some_groups, factor=st.floats(0.1, 20))
def test_maxrl_does_not_see_the_unit_of_rewards(groups: Groups, factor: float) -> None:
    scaled = [[reward * factor for reward in group] for group in groups]
    method = ("maxrl", None)
    np.testing.assert_allclose(compared(method, scaled), compared(method, groups), atol=1e-9)


@pytest.mark.parametrize("method", COMPARISONS, ids=str)
def test_rewards_that_differ_by_rounding_alone_are_equal(method: Any) -> None:
    assert 0.1 + 0.2 != 0.3
    assert compared(method, [[0.1 + 0.2, 0.3, 0.3]]).tolist() == [0, 0, 0]


def expected_gradient(advantage: Callable[[Any], Any], siblings: int, chance: float) -> float:
    """d/dp of what is maximised, over all outcomes of siblings that succeed with chance p. Exact."""
    total = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=siblings):
        scores = [1 / chance if success else -1 / (1 - chance) for success in outcome]
        weight = math.prod(chance if success else 1 - chance for success in outcome)
        total += weight * float(np.mean(advantage(np.array(outcome)) * scores))
    return total


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("siblings", [2, 5, 8])
def test_what_the_gradients_are_of(siblings: int, chance: float) -> None:
    """RLOO's is that of p; a group mean shrinks it by 1 - 1/G; MaxRL's is log p's, expanded in 1 - p."""
    assert expected_gradient(rloo, siblings, chance) == pytest.approx(1)
    assert expected_gradient(dr_grpo, siblings, chance) == pytest.approx(1 - 1 / siblings)
    terms = sum((1 - chance) ** k for k in range(siblings - 1))
    assert expected_gradient(maxrl, siblings, chance) == pytest.approx(terms)
    assert terms == pytest.approx(1 / chance, rel=(1 - chance) ** (siblings - 1) + 1e-12)


def test_maxrl_refuses_what_it_cannot_divide_by() -> None:
    with pytest.raises(LearnError, match=r"must not be negative; found -0.5\. Pay between 0 and 1"):
        maxrl(np.array([1.0, -0.5]))


def test_gdpo_tells_apart_what_a_sum_makes_equal() -> None:
    """[1, 0] and [0, 1] both sum up to 1; by itself the rarer reward counts more."""
    rewards_NK = np.array([[1.0, 0], [0, 1], [0, 1], [0, 0]])
    advantages_N = gdpo(rewards_NK, np.ones(2), np.zeros(4, dtype=np.int64))
    assert advantages_N[0] > advantages_N[1] == advantages_N[2] > 0 > advantages_N[3]
    assert grpo(rewards_NK.sum(1))[0] == grpo(rewards_NK.sum(1))[1]
    assert gdpo(np.ones((3, 2)), np.ones(2), np.zeros(3, dtype=np.int64)).tolist() == [0, 0, 0]


def test_a_lone_sibling_is_in_no_deviation_of_advantages() -> None:
    """Its own is 0 by definition, and would shrink the deviation of the others."""
    rewards_N, groups_N = np.array([1.0, 0, 0, 1, 7]), np.array([0, 0, 0, 0, 1])
    for compare in (
        COMPARISONS["rloo", "batch"],
        COMPARISONS["reinforce_pp_baseline", None],
        lambda rewards_N, groups_N: gdpo(rewards_N[:, None], np.ones(1), groups_N),
    ):
        wanted_N = compare(rewards_N[:4], groups_N[:4])
        np.testing.assert_allclose(compare(rewards_N, groups_N), [*wanted_N, 0])


# -- TRL's own ----------------------------------------------------------------------------------------------

G, GROUPS = 4, 3
FIRST = [0.0, 1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 0.0, 3.0, None, 0.5]
SECOND = [0.3, 0.1, None, 0.1, 0.2, 0.2, 0.2, 0.2, 0.7, None, None, 0.4]
"""The second group is flat; in the third one sibling has no reward at all."""
WEIGHTS = [1.0, 0.25]


def first(prompts: list[str], **_: Any) -> list[float | None]:
    return FIRST[: len(prompts)]


def second(prompts: list[str], **_: Any) -> list[float | None]:
    return SECOND[: len(prompts)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(hidden=32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def trl_advantages(model_dir: Path, out: Path, trainer: str, **settings: Any) -> list[float]:
    import trl
    from datasets import Dataset

    args = getattr(trl, f"{trainer}Config")(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", num_generations=G, beta=0.0,
        per_device_train_batch_size=G * GROUPS, max_completion_length=2, reward_weights=WEIGHTS,
        model_init_kwargs={"dtype": "float32"}, **settings,
    )  # fmt: skip
    made = getattr(trl, f"{trainer}Trainer")(
        str(model_dir), reward_funcs=[first, second], args=args, processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "hi"}] * G * GROUPS),
    )  # fmt: skip
    made.model.train()
    rows = [{"prompt": "hi"} for _ in range(G * GROUPS)]
    return list(made._generate_and_score_completions(rows)["advantages"].tolist())


def groups_of(first: list[float | None], second: list[float | None]) -> list[TrajectoryGroup]:
    """The same siblings; one whose rewards are all None is in no baseline."""
    made = []
    for g in range(GROUPS):
        siblings = []
        for i in range(g * G, (g + 1) * G):
            values = {"first": first[i], "second": second[i]}
            named = {
                name: Reward(value=value, weight=weight)
                for (name, value), weight in zip(values.items(), WEIGHTS, strict=True)
            }
            siblings.append(with_rewards(f"rl/0/catch/{g}/s{i}", named))
        made.append(TrajectoryGroup(id=f"rl/0/catch/{g}", env="catch", task={}, trajectories=tuple(siblings)))
    return made


def with_rewards(id: str, named: dict[str, Reward]) -> Any:
    from dataclasses import replace

    return replace(trajectory(id), rewards=named, stop_reason=StopReason.TERMINATED)


@pytest.mark.parametrize(
    ("trainer", "theirs", "ours"),
    [
        ("GRPO", {"scale_rewards": "group"}, {"advantage": "grpo"}),
        ("GRPO", {"scale_rewards": "batch"}, {"advantage": "grpo", "scale": "batch"}),
        ("GRPO", {"scale_rewards": "none"}, {"advantage": "dr_grpo"}),
        ("GRPO", {"multi_objective_aggregation": "normalize_then_sum"}, {"rewards": "separately"}),
        ("RLOO", {}, {"advantage": "rloo"}),
        ("RLOO", {"normalize_advantages": True}, {"advantage": "rloo", "scale": "batch"}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) or "plain" if isinstance(value, dict) else value,
)
def test_advantages_equal_trls(
    trainer: str, theirs: dict[str, Any], ours: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    wanted = trl_advantages(model_dir, tmp_path, trainer, **theirs)
    config = RlConfig.model_validate({"steps": 1, "groups": {"catch": GROUPS}, **ours})
    found = credit(groups_of(FIRST, SECOND), config).by_id
    for i, advantage in enumerate(wanted):
        own = found.get(f"rl/0/catch/{i // G}/s{i}", (0.0,))
        assert own[0] == pytest.approx(advantage, abs=1e-5), i
    assert [own for id, own in found.items() if id.startswith("rl/0/catch/1")] == [(0.0, 0.0)] * G
