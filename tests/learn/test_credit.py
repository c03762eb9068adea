"""Credit by turn: against the papers' formulas in loops, against TRL's gradient, on real episodes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learn.test_trl import compare, grpo_trainer
from tests.support.models import tiny_qwen3
from tests.support.rollouts import arena, call, calls
from tests.support.tokenizers import tiny_tokenizer
from tests.support.trajectories import trajectory

from turnwise.config import RlConfig
from turnwise.envs.base import Env, tool
from turnwise.errors import LearnError
from turnwise.learn.credit import Credit, credit, paid_by_turn, teaches
from turnwise.learn.samples import rl_samples
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import (
    STEPS,
    Message,
    Reward,
    Sampling,
    Segment,
    Step,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

GAMMA, WEIGHT = 0.9, 0.7


def config(kind: str = "trajectory", *, advantage: str = "dr_grpo", **changes: Any) -> RlConfig:
    by_turn: dict[str, Any] = {"kind": kind}
    if kind in ("returns", "gigpo"):
        by_turn["gamma"] = changes.pop("gamma", GAMMA)
    if kind in ("mt_grpo", "gigpo"):
        by_turn["weight"] = changes.pop("weight", WEIGHT)
    asked = {"steps": 1, "groups": {"e": 1}, "advantage": advantage, "credit": by_turn, **changes}
    return RlConfig.model_validate(asked)


def played(
    id: str,
    paid: Sequence[float | None],
    *,
    final: float | None = None,
    states: Sequence[str | None] | None = None,
    weight: float = 1.0,
    failed: bool = False,
    env: str = "e",
) -> Trajectory:
    """An episode whose turns were paid ``paid`` by steps, and ``final`` when it was over."""
    turns = tuple(
        Turn(
            message=Message.assistant("x"), context_ids=[1], ids=[2, 3], logprobs=[-0.5, -0.5],
            versions=[0, 0], reward=pay, state_key=state,
        )
        for pay, state in zip(paid, states or [None] * len(paid), strict=True)
    )  # fmt: skip
    steps = [pay for pay in paid if pay is not None]
    rewards = {STEPS: Reward(value=sum(steps), weight=weight)} if steps else {}
    if final is not None:
        rewards["final"] = Reward(value=final)
    if not rewards:
        rewards[STEPS] = Reward(value=0.0)
    return replace(
        trajectory(id, env=env),
        segments=(Segment(prompt=(Message.user("q"),), turns=turns),),
        rewards={} if failed else rewards,
        stop_reason=StopReason.ENV_FAILED if failed else StopReason.TERMINATED,
    )


def group(*siblings: Trajectory) -> TrajectoryGroup:
    first = siblings[0]
    return TrajectoryGroup(id=first.group_id, env=first.env, task={}, trajectories=siblings)


# -- what each turn was paid --------------------------------------------------------------------------------


def test_a_reward_is_dealt_out_to_turns_once() -> None:
    assert paid_by_turn(played("g/s0", [0.5, None, 0.25])).tolist() == [0.5, 0, 0.25]
    assert paid_by_turn(played("g/s0", [0.5, None, 0.25], final=2.0)).tolist() == [0.5, 0, 2.25]
    assert paid_by_turn(played("g/s0", [0.5, None], final=2.0, weight=10)).tolist() == [5, 2]
    assert paid_by_turn(played("g/s0", [None, None], final=2.0)).tolist() == [0, 2]
    assert paid_by_turn(played("g/s0", [], final=2.0)).tolist() == []


def test_pay_that_is_no_part_of_the_reward_is_nobodys() -> None:
    """As with shuffled rewards, which must not give away what the steps had paid."""
    shuffled = replace(played("g/s0", [0.5, 1.0]), rewards={"shuffled": Reward(value=3.0)})
    assert paid_by_turn(shuffled).tolist() == [0, 3]


@pytest.mark.parametrize("wrong", [0.75, 3.0])
def test_turns_that_were_paid_otherwise_than_the_episode_are_refused(wrong: float) -> None:
    broken = replace(played("g/s0", [0.5, 1.0]), rewards={STEPS: Reward(value=wrong)})
    with pytest.raises(LearnError, match=f"turns were paid 1.5, and its reward 'steps' is {wrong:g}"):
        paid_by_turn(broken)


class Corridor(Env):
    """Three doors in a row; each that is passed pays, and arriving pays once more at the end."""

    inline = True

    def reset(self, task: Task) -> str:
        self.at = 0
        return "Walk."

    @tool
    def walk(self, right: bool) -> Step:
        """Go one door to the right, or stay."""
        self.at += right
        return Step(f"door {self.at}", reward=0.25 if right else None, terminated=self.at == 3)

    def reward(self) -> dict[str, float | None]:
        return {"arrived": float(self.at == 3), "unused": None}

    def state_key(self) -> str:
        return f"door {self.at}"


def brevity(trajectory: Trajectory) -> float:
    return -len(trajectory.turns)


def walked(ways: Sequence[str]) -> TrajectoryGroup:
    """Real episodes, one for each string of r(ight) and s(tay)."""
    where = arena(
        Corridor,
        name="e",
        reward_weight=2.0,
        functions=[RewardFunction(function=brevity, name="brevity", weight=0.1)],
        limits={"max_turns": 4},
    )
    policy = ScriptedPolicy(
        lambda context: calls(call("walk", right=ways[int(context.session[-1])][context.turn] == "r"))
    )

    async def main() -> TrajectoryGroup:
        order = GroupOrder(id="t/0", env="e", task={}, seed=0, size=len(ways))
        try:
            return await play_group(
                order, arena=where, policy=policy, sampling=Sampling(), sink=lambda _: None
            )
        finally:
            await where.aclose()

    return asyncio.run(main())


def test_real_episodes_pay_each_turn_once_and_know_its_state() -> None:
    ways = ["rrr", "srrs", "rsrr"]
    made = walked(ways)
    for way, one in zip(ways, made.trajectories, strict=True):
        paid_T = paid_by_turn(one)
        doors = [2 * 0.25 * (step == "r") for step in way]
        assert paid_T.tolist() == pytest.approx(
            [*doors[:-1], doors[-1] + 2.0 * (way.count("r") == 3) - 0.1 * len(way)]
        )
        assert paid_T.sum() == pytest.approx(one.reward)
        before = [f"door {way[:t].count('r')}" for t in range(len(way))]
        assert [turn.state_key for turn in one.turns] == before, "the state that the reply was made in"
    found = credit([made], config("gigpo"))
    paid = [paid_by_turn(one).tolist() for one in made.trajectories]
    states = [[str(turn.state_key) for turn in one.turns] for one in made.trajectories]
    wanted = formula_gigpo(paid, states, centred, GAMMA, WEIGHT)
    assert [list(found.by_id[f"t/0/s{i}"]) for i in range(3)] == [pytest.approx(own) for own in wanted]
    # Eleven turns began at one of three doors, none of them at a door of its own.
    assert found.metrics["anchor_size/e"] == pytest.approx(11 / 3)
    assert found.metrics["anchored/e"] == pytest.approx(1.0)


# -- the papers' formulas, in loops -------------------------------------------------------------------------

Compare = Callable[[list[float]], list[float]]
Paid = list[list[float]]


def centred(values: list[float]) -> list[float]:
    return [value - fmean(values) for value in values]


def scaled(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [0.0] * len(values)
    return [(value - fmean(values)) / (stdev(values) + 1e-4) for value in values]


def leave_one_out(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [0.0] * len(values)
    return [one - fmean(values[:i] + values[i + 1 :]) for i, one in enumerate(values)]


COMPARE: dict[str, Compare] = {"dr_grpo": centred, "grpo": scaled, "rloo": leave_one_out}


def to_go(paid: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (k - t) * paid[k] for k in range(t, len(paid))) for t in range(len(paid))]


def formula_returns(paid: Paid, compare: Compare, gamma: float) -> Paid:
    found = [[0.0] * len(own) for own in paid]
    for t in range(max(map(len, paid))):
        here = [i for i, own in enumerate(paid) if len(own) > t]
        for i, advantage in zip(here, compare([to_go(paid[i], gamma)[t] for i in here]), strict=True):
            found[i][t] = advantage
    return found


def formula_mt_grpo(paid: Paid, compare: Compare, weight: float) -> Paid:
    outcome = compare([own[-1] for own in paid])
    found = [[advantage] * len(own) for advantage, own in zip(outcome, paid, strict=True)]
    for t in range(max(map(len, paid))):
        here = [i for i, own in enumerate(paid) if len(own) - 1 > t]
        for i, advantage in zip(here, compare([paid[i][t] for i in here]), strict=True):
            found[i][t] += weight * advantage
    return found


def formula_gigpo(paid: Paid, states: list[list[str]], compare: Compare, gamma: float, weight: float) -> Paid:
    episode = compare([sum(own) for own in paid])
    found = [[advantage] * len(own) for advantage, own in zip(episode, paid, strict=True)]
    for state in {one for own in states for one in own}:
        here = [(i, t) for i, own in enumerate(states) for t, one in enumerate(own) if one == state]
        steps = compare([to_go(paid[i], gamma)[t] for i, t in here])
        for (i, t), advantage in zip(here, steps, strict=True):
            found[i][t] += weight * advantage
    return found


pay = st.integers(-8, 8).map(lambda value: value / 4)
turn = st.tuples(pay, st.sampled_from("abc"))
siblings = st.lists(st.lists(turn, min_size=1, max_size=5), min_size=1, max_size=5)


@pytest.mark.parametrize("advantage", COMPARE)
@pytest.mark.parametrize("kind", ["trajectory", "returns", "mt_grpo", "gigpo"])
@settings(deadline=None)
@given(episodes=siblings, others=siblings, order=st.randoms(use_true_random=False))
def test_formulas_in_float64(kind: str, advantage: str, episodes: Any, others: Any, order: Any) -> None:
    """With another group beside it, a failed sibling, siblings in any order, and turns in other segments."""
    paid, states = ([[one[k] for one in own] for own in episodes] for k in (0, 1))
    made = [
        played(f"g/0/s{i}", paid[i], states=states[i], weight=2.0) if i % 2 else
        replace(played(f"g/0/s{i}", paid[i], states=states[i]), segments=parted(paid[i], states[i]))
        for i in range(len(paid))
    ]  # fmt: skip
    paid = [[2 * one for one in own] if i % 2 else own for i, own in enumerate(paid)]
    made.append(played("g/0/s9", [9.0], states=["a"], failed=True))
    order.shuffle(made)
    beside = [
        played(f"g/1/s{i}", [one[0] for one in own], states=[one[1] for one in own])
        for i, own in enumerate(others)
    ]
    found = credit([group(*made), group(*beside)], config(kind, advantage=advantage)).by_id
    compare = COMPARE[advantage]
    wanted = {
        "trajectory": lambda: [
            [one] * len(own) for one, own in zip(compare([sum(own) for own in paid]), paid, strict=True)
        ],
        "returns": lambda: formula_returns(paid, compare, GAMMA),
        "mt_grpo": lambda: formula_mt_grpo(paid, compare, WEIGHT),
        "gigpo": lambda: formula_gigpo(paid, states, compare, GAMMA, WEIGHT),
    }[kind]()
    assert "g/0/s9" not in found
    for i, own in enumerate(wanted):
        np.testing.assert_allclose(found[f"g/0/s{i}"], own, atol=1e-9)


def parted(paid: list[float], states: list[str]) -> tuple[Segment, ...]:
    """The same turns, each in a segment of its own."""
    (segment,) = played("g/0/s0", paid, states=states).segments
    return tuple(replace(segment, turns=(one,)) for one in segment.turns)


def test_the_example_of_the_module() -> None:
    """As its docstring has it."""
    both = group(
        played("g/0/s0", [1.0, 0.0], states=["s", "x"]), played("g/0/s1", [0.0, 0.0], states=["s", "y"])
    )
    reads = {"trajectory": (), "returns": ("gamma",), "mt_grpo": ("weight",), "gigpo": ("gamma", "weight")}
    wanted = {
        "trajectory": ([0.5, 0.5], [-0.5, -0.5]),
        "returns": ([0.5, 0], [-0.5, 0]),
        "mt_grpo": ([0.5, 0], [-0.5, 0]),
        "gigpo": ([1.0, 0.5], [-1.0, -0.5]),
    }
    for kind, rows in wanted.items():
        found = credit([both], config(kind, **dict.fromkeys(reads[kind], 1.0))).by_id
        assert (list(found["g/0/s0"]), list(found["g/0/s1"])) == rows, kind


def test_batch_deviations_are_over_one_environments_step() -> None:
    """Rewards of another environment, a thousand times as large, change nothing; those of other groups do."""
    small = [group(*(played(f"a/{g}/s{i}", [(g + 1.0) * i]) for i in range(3))) for g in range(2)]
    large = group(*(played(f"b/0/s{i}", [1000.0 * i], env="other") for i in range(3)))
    asked = config(advantage="grpo", scale="batch")
    alone, beside = credit(small, asked).by_id, credit([*small, large], asked).by_id
    assert all(beside[id] == own for id, own in alone.items())
    std = stdev([0, 1, 2, 0, 2, 4])
    assert alone["a/1/s2"][0] == pytest.approx(2 / (std + 1e-4))
    assert credit(small[1:], asked).by_id["a/1/s2"][0] == pytest.approx(2 / (2 + 1e-4))


# -- several rewards ----------------------------------------------------------------------------------------


def test_each_reward_is_compared_among_those_it_applies_to() -> None:
    def named(id: str, right: float, short: float | None) -> Trajectory:
        rewards = {"right": Reward(value=right), "short": Reward(value=short, weight=0.5)}
        return replace(played(id, [None, None]), rewards=rewards)

    made = group(
        named("g/0/s0", 1.0, None), named("g/0/s1", 0.0, 4.0), named("g/0/s2", 0.0, 2.0),
        played("g/0/s3", [5.0], failed=True),
    )  # fmt: skip
    found = credit([made], config(advantage="grpo", rewards="separately")).by_id
    right, short = scaled([1.0, 0, 0]), scaled([4.0, 2.0])
    summed = [right[0], right[1] + 0.5 * short[0], right[2] + 0.5 * short[1]]
    for i, value in enumerate(summed):
        assert found[f"g/0/s{i}"] == pytest.approx([value / (stdev(summed) + 1e-4)] * 2)


# -- what is told and refused -------------------------------------------------------------------------------


def test_groups_that_teach_nothing_are_told() -> None:
    def siblings(g: int, rewards: list[float | None]) -> TrajectoryGroup:
        return group(
            *(
                played(f"g/{g}/s{i}", [one or 0.0], failed=one is None, states=["a"])
                for i, one in enumerate(rewards)
            )
        )

    groups = [
        siblings(0, [1.0, None, 0.0]), siblings(1, [None, 1.0]),
        siblings(2, [0.1, 0.1, 0.1]), siblings(3, [None, None]),
    ]  # fmt: skip
    found = credit(groups, config())
    assert found.by_id == {
        "g/0/s0": (0.5,), "g/0/s2": (-0.5,), "g/1/s1": (0.0,),
        "g/2/s0": (0.0,), "g/2/s1": (0.0,), "g/2/s2": (0.0,),
    }  # fmt: skip
    assert found.metrics == {"flat_groups": 1 / 3, "lone_groups": 1.0}
    assert [teaches(one, config()) for one in groups] == [True, False, False, False]
    # Whoever is compared with the whole batch learns from equal siblings too.
    everyone = config(advantage="reinforce_pp")
    assert [teaches(one, everyone) for one in groups] == [True, True, True, False]
    assert all(own[0] for own in credit(groups, everyone).by_id.values())


def test_equal_sums_teach_where_turns_differ() -> None:
    same = group(played("g/0/s0", [1.0, 0.0]), played("g/0/s1", [0.0, 1.0]))
    assert not teaches(same, config())
    assert credit([same], config()).metrics["flat_groups"] == 1
    for kind in ("returns", "mt_grpo"):
        assert teaches(same, config(kind)), kind
        assert credit([same], config(kind)).metrics["flat_groups"] == 0


def test_gigpo_needs_states() -> None:
    mute = group(played("g/0/s0", [1.0]), played("g/0/s1", [0.0, 0.0]))
    with pytest.raises(LearnError, match=r"environment e names none; define `state_key\(self\)"):
        credit([mute], config("gigpo"))
    # One state is enough to see that the environment names them; the other turn has its episode's advantage.
    half = group(played("g/0/s0", [1.0, 0.0], states=["a", None]), played("g/0/s1", [0.0], states=["a"]))
    found = credit([half], config("gigpo"))
    assert found.by_id["g/0/s0"] == pytest.approx((0.5 + WEIGHT * 0.5, 0.5))
    assert found.metrics["anchored/e"] == pytest.approx(2 / 3)
    assert found.metrics["anchor_size/e"] == 2
    # Where there is a single turn there is nothing to tell apart: it may play beside others.
    single = credit([group(played("g/0/s0", [1.0]), played("g/0/s1", [0.0]))], config("gigpo"))
    assert single.by_id == {"g/0/s0": (0.5,), "g/0/s1": (-0.5,)} and single.metrics["anchored/e"] == 0
    assert credit([group(played("g/0/s0", [], final=1.0))], config("gigpo")).by_id == {"g/0/s0": ()}


def test_mt_grpo_without_pay_on_the_way_is_told(caplog: pytest.LogCaptureFixture) -> None:
    unpaid = group(played("g/0/s0", [None, 1.0]), played("g/0/s1", [None, None], final=0.0))
    with caplog.at_level(logging.WARNING):
        found = credit([unpaid], config("mt_grpo"))
    assert "environment e: no turn before the last was paid" in caplog.text
    assert found.by_id == credit([unpaid], config()).by_id
    assert found.metrics["own_credit/e"] == 0
    caplog.clear()
    paid = group(played("g/0/s0", [0.5, 1.0]), played("g/0/s1", [None, None], final=0.0))
    assert credit([paid], config("mt_grpo")).metrics["own_credit/e"] == 1 and not caplog.text


# -- what it is good for ------------------------------------------------------------------------------------

UP, DOWN = 0.6, 0.3
"""Chances of doing well in the first and in the second turn."""


def gradients(asked: RlConfig, pays: Callable[[int, int], tuple[float, float]]) -> tuple[Any, Any]:
    """Exact mean and variance of the gradient of both turns' logits, over all that three siblings may do."""
    means, squares = np.zeros(2), np.zeros(2)
    for acts in itertools.product(itertools.product((0, 1), (0, 1)), repeat=3):
        made = [
            played(f"g/0/s{i}", pays(*act), states=["start", f"did {act[0]}"]) for i, act in enumerate(acts)
        ]
        chance = 1.0
        gradient = np.zeros(2)
        found: Credit = credit([group(*made)], asked)
        for i, act in enumerate(acts):
            for t, (did, p) in enumerate(zip(act, (UP, DOWN), strict=True)):
                chance *= p if did else 1 - p
                gradient[t] += found.by_id[f"g/0/s{i}"][t] * (did - p) / 3
        means += chance * gradient
        squares += chance * gradient**2
    return means, squares - means**2


def test_each_turn_learns_from_its_own_doing_with_less_noise() -> None:
    """Two turns that are paid for what they do themselves. All credit is right on average; that by turn is
    quieter where earlier pay was noise."""

    def each(first: int, second: int) -> tuple[float, float]:
        return float(first), float(second)

    true = np.array([UP * (1 - UP), DOWN * (1 - DOWN)]) * (1 - 1 / 3)
    whole, noise = gradients(config(), each)
    np.testing.assert_allclose(whole, true, rtol=1e-12)
    for asked in (config("returns", gamma=1.0), config("mt_grpo", weight=1.0)):
        by_turn, quiet = gradients(asked, each)
        np.testing.assert_allclose(by_turn, true, rtol=1e-12)
        assert quiet[1] < 0.6 * noise[1] and quiet[0] == pytest.approx(noise[0])
    anchored, _ = gradients(config("gigpo", gamma=1.0, weight=1.0), each)
    assert (anchored > true).all(), "the same direction, with the states' own share on top"


def test_a_turn_that_does_not_matter_is_left_alone() -> None:
    def only_first(first: int, second: int) -> tuple[float, float]:
        return float(first), 0.0

    _, noise = gradients(config(), only_first)
    assert noise[1] > 0.01
    for kind in ("returns", "mt_grpo"):
        means, quiet = gradients(config(kind), only_first)
        assert means[0] > 0 and means[1] == quiet[1] == 0


# -- TRL's gradient with an advantage for each token --------------------------------------------------------


def test_samples_carry_each_turns_advantage_over_segments() -> None:
    made = played("g/0/s0", [0.0, 0.0, 0.0])
    apart = replace(made, segments=parted([0.0] * 3, ["a"] * 3))
    (row,) = rl_samples(made, (0.5, -1.0, 2.0))
    assert row.advantages_T.tolist() == [0, 0.5, 0.5, 0, -1, -1, 0, 2, 2]
    assert [one.advantages_T.tolist() for one in rl_samples(apart, (0.5, -1.0, 2.0))] == [
        [0, 0.5, 0.5], [0, -1, -1], [0, 2, 2],
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="2 advantages for 3 turns"):
        rl_samples(made, (0.5, -1.0))


@pytest.mark.parametrize("kind", ["returns", "mt_grpo", "gigpo"])
def test_loss_and_gradients_equal_trls(kind: str, tmp_path: Path) -> None:
    """From trajectories to gradients, with the formulas' advantages in TRL's own loss, one for each token."""
    from datasets import Dataset

    tiny_qwen3(hidden=32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    paid = rng.normal(size=(4, 2))
    states = [["a", "b"], ["a", "a"], ["b", "b"], ["a", "b"]]
    ids = rng.integers(500, size=(4, 17))  # Prompt 5, reply 4, bridge 3, reply 5.
    with torch.no_grad():
        logits = tiny_qwen3(hidden=32)(torch.from_numpy(ids)).logits[:, :-1].log_softmax(-1)
        now = logits.gather(-1, torch.from_numpy(ids[:, 1:, None]))[..., 0].numpy()
    old = np.concatenate([np.zeros((4, 1)), now + rng.normal(0, 0.2, size=now.shape)], axis=1)
    own = np.zeros((4, 17), dtype=bool)
    own[:, 5:9] = own[:, 12:] = True

    def turn(i: int, t: int) -> Turn:
        context, reply = ((0, 5), (5, 9)) if t == 0 else ((9, 12), (12, 17))
        return Turn(
            message=Message.assistant("x"), context_ids=ids[i, slice(*context)].tolist(),
            ids=ids[i, slice(*reply)].tolist(), logprobs=old[i, slice(*reply)].tolist(),
            versions=[0] * (reply[1] - reply[0]), reward=float(paid[i, t]), state_key=states[i][t],
        )  # fmt: skip

    made = [
        replace(
            played(f"g/0/s{i}", paid[i].tolist()),
            segments=(Segment(prompt=(Message.user("q"),), turns=(turn(i, 0), turn(i, 1))),),
            sampling=Sampling(),
        )
        for i in range(4)
    ]
    found = credit([group(*made)], config(kind, advantage="grpo")).by_id
    samples = [sample for one in made for sample in rl_samples(one, found[one.id])]

    rows = paid.tolist()
    wanted = np.array(
        {
            "returns": lambda: formula_returns(rows, scaled, GAMMA),
            "mt_grpo": lambda: formula_mt_grpo(rows, scaled, WEIGHT),
            "gigpo": lambda: formula_gigpo(rows, states, scaled, GAMMA, WEIGHT),
        }[kind]()
    )
    advantages = np.zeros((4, 17), dtype=np.float32)
    advantages[:, 5:9], advantages[:, 12:] = wanted[:, :1], wanted[:, 1:]
    inputs = {
        "prompt_ids": torch.from_numpy(ids[:, :5]),
        "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": torch.from_numpy(ids[:, 5:]),
        "completion_mask": torch.ones(4, 12, dtype=torch.long),
        "tool_mask": torch.from_numpy(own[:, 5:]).long(),
        "advantages": torch.from_numpy(advantages[:, 5:]),
        "old_per_token_logps": torch.from_numpy(old[:, 5:].astype(np.float32)),
        "num_items_in_batch": torch.tensor(float(own.sum())),
    }
    trainer = grpo_trainer(
        tmp_path, Dataset.from_list([{"prompt": "hi"}] * 8), tmp_path, loss_type="dapo", beta=0.0
    )
    compare(trainer, inputs, samples, {"loss": "ppo"})
