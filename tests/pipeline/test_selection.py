"""What a step learns from: groups without a difference, masked episodes, penalties for length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.end_to_end.tiny import play, recipe
from tests.pipeline.test_attempts import made as outages
from tests.pipeline.test_updates import episode, group
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import make_loss
from turnwise.learn.model import PolicyModel
from turnwise.learn.samples import rl_samples
from turnwise.pipeline.rl import _learn
from turnwise.pipeline.selection import OVERLONG, Selector, length_penalty
from turnwise.pipeline.updates import group_metrics, updates_of
from turnwise.store import RunDir
from turnwise.types import Message, Reward, Segment, StopReason, Trajectory, TrajectoryGroup, Turn


def selector(**changes: Any) -> Selector:
    return Selector(made(changes))


def made(changes: Mapping[str, Any]) -> Any:
    return recipe({"rl.minibatches": 1, **{f"rl.{key}": value for key, value in changes.items()}})


def ended(one: TrajectoryGroup, *reasons: StopReason) -> TrajectoryGroup:
    """The group with its siblings' ends replaced, as far as they are given."""
    reasons += tuple(sibling.stop_reason for sibling in one.trajectories[len(reasons) :])
    siblings = zip(one.trajectories, reasons, strict=True)
    return replace(one, trajectories=tuple(replace(t, stop_reason=reason) for t, reason in siblings))


CUT, TOKENS, TURNS, DONE = (
    StopReason.CUT_REPLY, StopReason.MAX_TOKENS, StopReason.MAX_TURNS, StopReason.TERMINATED,
)  # fmt: skip
APART, FLAT, LONE = group("catch", 0, 0, 1, 1), group("catch", 1, 1, 1, None), group("catch", 2, 1, None)
PLAYED = [APART, FLAT, LONE]


# -- groups -----------------------------------------------------------------------------------------------


def test_groups_without_a_difference_are_kept_or_left_out() -> None:
    kept = selector(flat_groups="keep").select(PLAYED)
    assert (list(kept.groups), kept.dropped, kept.metrics) == (PLAYED, (), {})
    dropped = selector(flat_groups="drop").select(PLAYED)
    assert (list(dropped.groups), dropped.dropped) == ([APART], (FLAT.id, LONE.id))
    assert dropped.metrics == {"dropped_groups": 2, "flat_groups": 1 / 3, "lone_groups": 1}
    refilled = selector(flat_groups="refill").select(PLAYED)
    assert refilled.groups == dropped.groups
    assert refilled.metrics == {**dropped.metrics, "missing_groups": 3}


def test_what_is_left_out_counts_in_no_weight() -> None:
    config = made({"normalise": "sequence", "flat_groups": "drop"}).rl

    def weights(groups: Any) -> list[float]:
        (update,) = updates_of(groups, config, seed=0, step=1)
        return [float(one.weights_T.max()) for one in update.samples]

    assert weights(PLAYED) == pytest.approx([1 / 12] * 3)
    assert weights(selector(flat_groups="drop").select(PLAYED).groups) == pytest.approx([1 / 6] * 3)


def test_several_rewards_set_siblings_apart_where_their_sum_does_not() -> None:
    rewards = [{"a": Reward(value=a), "b": Reward(value=b, weight=2.0)} for a, b in [(1, 0), (0, 0.5)]]
    one = group("catch", 0, 0, 0)
    siblings = zip(one.trajectories, rewards, strict=True)
    one = replace(one, trajectories=tuple(replace(t, rewards=own) for t, own in siblings))
    assert not selector(flat_groups="refill").useful(one)
    assert selector(flat_groups="refill", rewards="separately").useful(one)


def test_the_mean_reward_is_of_all_that_was_played() -> None:
    """That of the groups that siblings differ in would hover around a half, however good the policy is."""
    metrics = group_metrics(PLAYED, version=3, learned=[APART])
    assert metrics["reward/catch"] == pytest.approx(5 / 6)
    old = group("catch", 5, 1, 1, version=1)
    assert group_metrics([APART, old], version=3, learned=[APART])["staleness_max"] == 3
    assert group_metrics([APART, old], version=3, learned=[old])["staleness_max"] == 2


def learner() -> Learner:
    return Learner(
        PolicyModel(tiny_qwen3(hidden=32, layers=1)),
        tiny_tokenizer(),
        optimizer=OptimizerConfig(lr=1e-3),
        rows=BatchConfig(),
        total_steps=8,
    )


def test_a_step_of_nothing_is_an_update_of_nothing() -> None:
    config = made({"flat_groups": "drop"}).rl
    for groups in ([], [FLAT]):
        metrics = _learn(learner(), groups, config, 0, 1)
        assert (metrics["updates"], metrics["samples"]) == (0, 0)


def test_a_steps_samples_and_groups_are_counted_once_in_however_many_epochs() -> None:
    counted = ("samples", "left_out_samples", "flat_groups", "lone_groups")
    once = _learn(learner(), PLAYED, made({}).rl, 0, 1)
    often = _learn(learner(), PLAYED, made({"epochs": 3, "minibatches": 2}).rl, 0, 1)
    assert {name: often[name] for name in counted} == {name: once[name] for name in counted}
    assert once["samples"] == 3 and once["left_out_samples"] == 3
    assert often["tokens"] == 3 * once["tokens"], "what is computed is counted as often as it is"


# -- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [(None, [CUT, TOKENS]), (["max_turns"], [TURNS]), (["cut_reply", "max_turns"], [CUT, TURNS])],
)
def test_no_loss_falls_on_what_is_masked_and_siblings_are_still_compared_with_it(
    reasons: list[str] | None, expected: list[StopReason]
) -> None:
    groups = [ended(group("catch", 0, 0, 0, 1, 3), CUT, TOKENS, TURNS)]
    settings = {"overlong.mask": True, "advantage": "dr_grpo"} | (
        {"overlong.reasons": reasons} if reasons else {}
    )
    config = made(settings).rl
    (update,) = updates_of(groups, config, seed=0, step=1)
    found = {one.trajectory_id: float(one.advantages_T[-1]) for one in update.samples}
    assert found == {
        one.id: one.reward - 1.0 for one in groups[0].trajectories
        if one.stop_reason not in expected and one.reward != 1
    }  # fmt: skip
    total = sum(float(one.weights_T.sum()) for one in update.samples)
    heard = [one for one in groups[0].trajectories if one.stop_reason not in expected]
    assert total == pytest.approx(len(found) / len(heard)), "masked tokens count in no mean"
    assert selector(**settings).select(groups).metrics == {"masked/catch": len(expected) / 4}


def test_a_penalty_of_kl_does_not_fall_on_what_is_masked_either() -> None:
    groups = [ended(group("catch", 0, 0, 1, 3), CUT)]
    (update,) = updates_of(groups, made({"overlong.mask": True, "kl": 0.1}).rl, seed=0, step=1)
    assert [one.trajectory_id for one in update.samples] == ["rl/catch/0/s1", "rl/catch/0/s2"]


def test_a_group_of_which_all_are_masked_is_of_no_use() -> None:
    groups = [ended(group("catch", 0, 0, 1), CUT, TOKENS), ended(group("catch", 1, 0, 1), CUT)]
    chosen = selector(**{"flat_groups": "drop", "overlong.mask": True}).select(groups)
    assert chosen.dropped == ("rl/catch/0",) and chosen.metrics["flat_groups"] == 0
    assert selector(flat_groups="drop").select(groups).dropped == ()


REWARDS = [0.0, 1.0, 0.5, 0.25]


def grpo_trainer(path: Path, **settings: Any) -> Any:
    """TRL's, over the model that `tiny_qwen3` makes."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tiny_qwen3(hidden=32).save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    args = GRPOConfig(
        output_dir=str(path / "out"), use_cpu=True, bf16=False, report_to="none", num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, max_completion_length=12, beta=0.0,
        model_init_kwargs={"dtype": "float32"}, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(path / "model"), reward_funcs=lambda prompts, **_: REWARDS[: len(prompts)], args=args,
        train_dataset=Dataset.from_list([{"prompt": "hi"}] * 8), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.mark.parametrize(
    ("loss_type", "normalise"), [("dapo", "token"), ("grpo", "sequence"), ("dr_grpo", "constant")]
)
def test_masked_losses_equal_trls(loss_type: str, normalise: str, tmp_path: Path) -> None:
    """TRL's own masks, on the same completions: two that end, two that are cut."""
    rng = np.random.default_rng(0)
    eos = tiny_tokenizer().eos_token_id
    prompt = rng.integers(500, size=5).tolist()
    replies = [rng.integers(500, size=n).tolist() for n in (12, 6, 12, 3)]
    replies[1][-1] = replies[3][-1] = eos
    cut = [ids[-1] != eos for ids in replies]
    assert cut == [True, False, True, False]

    trainer = grpo_trainer(tmp_path, loss_type=loss_type, mask_truncated_completions=True)
    trainer._generate = lambda prompts: (
        [prompt] * 4, replies, None, ["x"] * 4, None, {}, None, [[] for _ in replies],
    )  # fmt: skip
    inputs = trainer._generate_and_score_completions([{"prompt": "hi"} for _ in range(4)])
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()

    policy = Learner(
        PolicyModel(tiny_qwen3(hidden=32)), tiny_tokenizer(), optimizer=OptimizerConfig(),
        rows=BatchConfig(row_tokens=32, micro_tokens=32), total_steps=1,
    )  # fmt: skip
    siblings = [
        said(episode("rl/catch/0", k, REWARDS[k], env="catch"), prompt, ids, CUT if is_cut else DONE, policy)
        for k, (ids, is_cut) in enumerate(zip(replies, cut, strict=True))
    ]
    groups = [TrajectoryGroup(id="rl/catch/0", env="catch", task={}, trajectories=tuple(siblings))]
    config = made({"overlong.mask": True, "normalise": normalise, "sampling": {"max_tokens": 12}}).rl
    (update,) = updates_of(groups, config, seed=0, step=1)
    loss = policy.forward_backward(update.samples, make_loss(config))["loss"]
    # Per token, masked ones are in neither denominator. Per sequence they are in TRL's alone.
    share = 1.0 if normalise == "token" else 0.5
    assert abs(theirs.item()) > 1e-3
    assert loss * share == pytest.approx(theirs.item(), abs=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in policy.model.trainable:
        torch.testing.assert_close(parameter.grad * share, gradients[name].grad, atol=1e-5, rtol=1e-4)


def said(
    one: Trajectory, prompt: list[int], ids: list[int], reason: StopReason, policy: Learner
) -> Trajectory:
    """The episode with these tokens, drawn by the learner's own weights."""

    def drawn(logprobs: list[float]) -> Trajectory:
        turn = Turn(
            message=Message.assistant("x"),
            context_ids=prompt,
            ids=ids,
            logprobs=logprobs,
            versions=[0] * len(ids),
        )
        segment = Segment(prompt=(Message.user("hi"),), turns=(turn,))
        return replace(one, segments=(segment,), stop_reason=reason)

    (sample,) = rl_samples(drawn([0.0] * len(ids)), 0.0)
    (logprobs_T,) = policy.logprobs([sample])
    return drawn(logprobs_T[len(prompt) :].tolist())


# -- penalties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "cache"), [(100, 20), (100, 100), (100, 1), (1280, 256), (7, 3)])
def test_the_penalty_is_trls(max_tokens: int, cache: int) -> None:
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=max_tokens, soft_punish_cache=cache)
    lengths = range(max_tokens + 2 * cache + 2)
    expected = theirs(completion_ids=[[0] * n for n in lengths])
    assert [length_penalty(n, max_tokens=max_tokens, cache=cache) for n in lengths] == expected
    assert min(expected) == -1 and max(expected) == 0


def long(id: str, *lengths: int, reward: float | None = 1.0) -> Trajectory:
    """An episode of replies of these lengths."""
    one = episode(id, 0, reward, env="catch")
    turns = tuple(
        Turn(
            message=Message.assistant("x"),
            context_ids=[1],
            ids=[3] * n,
            logprobs=[-1.0] * n,
            versions=[0] * n,
        )
        for n in lengths
    )
    return replace(one, segments=(replace(one.segments[0], turns=turns),))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The episode's 18 tokens against 20, of which the last 10 cost; the longest reply's 12 against 16.
        ({"overlong.penalty": {"max_tokens": 20, "cache": 10}}, -0.8),
        ({"overlong.penalty": {"of": "reply", "cache": 8}}, -0.5),
        ({"overlong.penalty": {"of": "reply", "cache": 8, "max_tokens": 10}}, -1.0),
    ],
)
def test_what_is_measured(settings: dict[str, Any], expected: float) -> None:
    one = TrajectoryGroup(id="g", env="catch", task={}, trajectories=(long("g", 12, 6), long("g", 1)))
    chosen = selector(**settings).select([one])
    first, second = chosen.groups[0].trajectories
    assert first.rewards[OVERLONG] == Reward(value=pytest.approx(expected))
    assert (first.reward, second.reward) == (pytest.approx(1 + expected), 1.0)
    assert chosen.metrics == {"overlong_penalty/catch": pytest.approx(expected / 2)}
    assert selector(flat_groups="refill", **settings).useful(one), "length is what sets them apart"
    assert not selector(flat_groups="refill").useful(one)


def test_the_limit_is_each_environments_own_where_none_is_given() -> None:
    limits = {
        "environments.catch.limits": {"max_tokens": 20},
        "environments.chain_sum.limits": {"max_tokens": 40},
    }
    weighed = Selector(recipe({**limits, "rl.overlong.penalty": {"cache": 10, "weight": 0.5}}))
    one = TrajectoryGroup(id="g", env="catch", task={}, trajectories=(long("g", 15),))
    other = replace(one, env="chain_sum", trajectories=(replace(long("g", 35), env="chain_sum"),))
    for found in weighed.select([one, other]).groups:
        assert found.trajectories[0].rewards[OVERLONG] == Reward(value=-0.5, weight=0.5)
        assert found.trajectories[0].reward == 0.75


def test_what_is_told_of_rewards_is_without_penalties(tmp_path: Path) -> None:
    short = {"steps": 1, "groups": {"outage": 2}, "group_size": 2, "sampling": {"max_tokens": 4}}
    penal = {"overlong": {"penalty": {"of": "reply", "cache": 4}}}
    play(outages(tmp_path, rl=short | penal), tmp_path / "tiny")
    (told,) = RunDir(tmp_path / "tiny").read_metrics("rl")
    assert told["truncated/outage"] == 1, "each reply ran into its limit"
    assert (told["reward/outage"], told["overlong_penalty/outage"]) == (0, -1)


def test_what_has_no_reward_gets_none_by_its_length() -> None:
    penal = selector(**{"overlong.penalty": {"max_tokens": 4, "cache": 4}})
    unscored = replace(long("g", 9), rewards={"a": Reward(value=None)})
    one = TrajectoryGroup(id="g", env="catch", task={}, trajectories=(unscored, long("g", 9, reward=None)))
    (found,) = penal.select([one]).groups
    assert found == one and found.scored == ()
    clash = replace(long("g", 9), rewards={OVERLONG: Reward(value=1.0)})
    with pytest.raises(RecipeError, match="'catch' pays a reward 'overlong'"):
        penal.useful(replace(one, trajectories=(clash,)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rl.refill_limit": 3}, "rl.refill_limit: does nothing with rl.flat_groups=keep"),
        (
            {"rl.overlong": {"reasons": ["max_turns"]}},
            "rl.overlong.reasons: does nothing with rl.overlong.mask",
        ),
        ({"rl.overlong": {"mask": True, "reasons": []}}, "reasons"),
        (
            {
                "rl.overlong": {"mask": True, "reasons": ["cut_reply"]},
                "environments.catch.limits": {"cut_reply": "continue"},
                "environments.chain_sum.limits": {"cut_reply": "continue"},
            },
            "rl.overlong.mask: does nothing: no episode ends for cut_reply",
        ),
        (
            {"rl.flat_groups": "drop", "rl.advantage": "reinforce_pp"},
            "rl.flat_groups: with rl.advantage=reinforce",
        ),
        (
            {"rl.overlong.penalty": {"cache": 4, "max_tokens": 8}, "rl.advantage": "maxrl"},
            "rl.overlong.penalty: rl.advantage=maxrl divides",
        ),
        (
            {"rl.overlong.penalty": {"cache": 4}},
            "rl.overlong.penalty.max_tokens: catch has no limit to stay below; set it, or environments.catch",
        ),
        (
            {"rl.overlong.penalty": {"of": "reply", "cache": 17}},
            "rl.overlong.penalty.cache: 17 is more than the limit of catch, which is 16",
        ),
        (
            {"rl.overlong.penalty": {"of": "reply", "cache": 4, "max_tokens": 20}},
            "max_tokens: does nothing for catch: the penalty begins after 16 tokens and rl.sampling",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        recipe(changes)
