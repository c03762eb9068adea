"""Reward functions under TRL's contract: what they are called with, what they may say, where it ends up."""

from __future__ import annotations

import asyncio
import functools
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.compat.playing import ROW, arena_of, play
from tests.support.rollouts import call, calls, model, renderer
from turnwise.compat.rewards import Board, name_of, reward_functions
from turnwise.engines.scripted import ScriptedEngine
from turnwise.errors import RecipeError
from turnwise.rollout.policies import ModelPolicy, ScriptedPolicy
from turnwise.types import Message, Reward, StopReason, ToolCall


class Counter:
    """As in TRL's documentation."""

    def reset(self, target: int, **row: Any) -> str:
        self.target, self.value, self.reward = target, 0, 0.0
        return f" To {target}."

    def add(self, n: int) -> str:
        """Add to the counter.

        Args:
            n: How much.
        """
        self.value += n
        self.reward = float(self.value == self.target)
        return str(self.value)


ADD = calls(call("add", n=3))


# -- what a function is called with -------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, Counter, {"counter": Counter}])
def test_the_keywords_are_those_of_the_installed_trl(factory):
    """The referee is ``GRPOTrainer._calculate_rewards`` itself, asked about the episodes that were played."""
    from trl import GRPOTrainer

    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}

    def watch(seen):
        def reward(prompts, completions, completion_ids, **columns):
            seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            return [1.0] * len(prompts)

        return reward

    board = Board()
    board.trainer_state = SimpleNamespace(global_step=7)
    name = "counter" if isinstance(factory, dict) else None
    row = {**ROW, "completion": "not this one", "extra": "x"}
    where = arena_of(factory, watch(ours), board=board, name=name, processing=renderer().tokenizer)
    policy = model("three") if factory is None else model(ADD, "three")
    [group] = play(where, policy, [row])

    inputs = [{**row, **({"environment": "counter"} if name else {})}] * 2
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        state=board.trainer_state,
        reward_funcs=[watch(theirs)],
        reward_processing_classes=[None],
        reward_func_names=["watch"],
        environments=ours.get("environments"),
        _log_completion_extra=print,
        _log_metric=print,
    )
    GRPOTrainer._calculate_rewards(
        trainer, inputs, ours["prompts"], ours["completions"], ours["completion_ids"]
    )
    logs = {"log_extra", "log_metric"}
    assert ours.keys() == theirs.keys()
    assert {key: ours[key] for key in ours.keys() - logs} == {
        key: theirs[key] for key in theirs.keys() - logs
    }
    assert ("environments" in ours) == (factory is not None)
    told = " To 3." if factory else ""
    assert ours["prompts"] == [[{"role": "user", "content": f"Count.{told}"}]] * 2
    roles = ["assistant"] if factory is None else ["assistant", "tool", "assistant"]
    assert [[one["role"] for one in messages] for messages in ours["completions"]] == [roles] * 2
    assert [one.rewards["reward"] for one in group.trajectories] == [Reward(value=1.0)] * 2


def test_environments_are_as_their_own_episodes_left_them():
    seen = []

    def reward(environments, completions, **_):
        seen.append([(one, one.value) for one in environments])
        return [one.reward for one in environments]

    policy = ScriptedPolicy(
        lambda context: calls(call("add", n=int(context.session[-1]))) if context.turn == 0 else "done"
    )
    where = arena_of(Counter, reward)
    groups = play(where, policy, [ROW, ROW, ROW], size=4)
    assert [[value for _, value in made] for made in seen] == [[0, 1, 2, 3]] * 3
    assert all(len({id(one) for one, _ in made}) == 4 for made in seen), "an instance for each sibling"
    for group in groups:
        # The attribute `reward` is the functions' to read, as in TRL, and not paid a second time.
        assert [one.reward for one in group.trajectories] == [0.0, 0.0, 0.0, 1.0]
        assert [list(one.rewards) for one in group.trajectories] == [["reward"]] * 4


def test_async_functions_see_all_of_it_too():
    async def later(environments, trainer_state, **columns):
        await asyncio.sleep(0)
        return [one.value + trainer_state for one in environments]

    board = Board()
    board.trainer_state = 0.5
    [group] = play(arena_of(Counter, later, board=board), model(ADD, "done"))
    assert [one.rewards["later"].value for one in group.trajectories] == [3.5, 3.5]


def test_siblings_of_an_earlier_run_have_no_environment_and_are_not_shown():
    shown = []

    def reward(environments, completions, **_):
        shown.append(len(environments))
        assert None not in environments
        return [one.reward for one in environments]

    [first] = play(arena_of(Counter, reward), model(ADD, "done"))
    kept = first.trajectories[0]
    [again] = play(arena_of(Counter, reward), model(ADD, "done"), finished=[kept])
    assert again.trajectories[0] is kept and shown == [2, 1]
    assert again.trajectories[1].reward == 1.0


def test_without_tools_a_completion_is_the_text_that_was_written_thinking_too():
    """TRL decodes it, and functions such as its `think_format_reward` look for the tags in it."""
    from trl.rewards import think_format_reward

    said = "<think>\nHm.\n</think>\nThree."
    ids = renderer().tokenizer(said)["input_ids"]
    asked = []

    def watch(completions, **_):
        asked.extend(completions)
        return [0.0] * len(completions)

    policy = ModelPolicy(ScriptedEngine(lambda made: [*ids, renderer().stop_ids[0]]), renderer())
    where = arena_of(None, [think_format_reward, watch], processing=renderer().tokenizer)
    [group] = play(where, policy)
    assert asked == [[{"role": "assistant", "content": said}]] * 2
    assert [one.rewards["think_format_reward"].value for one in group.trajectories] == [1.0, 1.0]


def test_with_tools_it_is_parsed_and_a_malformed_call_is_text():
    asked = []

    def watch(completions, **_):
        asked.extend(completions)
        return [0.0] * len(completions)

    bad = ToolCall(name="add", arguments={}, error="no JSON", raw='<tool_call>\n{"name": "add"\n</tool_call>')
    reply = Message.assistant("So:", call("add", n=1), bad, reasoning="Hm.")
    play(arena_of(Counter, watch), ScriptedPolicy([reply, "done"]), size=1)
    [[first, *_]] = asked
    assert first == {
        "role": "assistant",
        "reasoning_content": "Hm.",
        "content": f"So:\n{bad.raw}",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}],
    }
    # It was told that it is malformed, and went on.
    assert [one["role"] for one in asked[0]] == ["assistant", "tool", "tool", "assistant"]


def test_plain_prompts_and_their_completions_are_text():
    asked = {}

    def watch(**columns):
        asked.update(columns)
        return [None, 1.0]

    row = {"prompt": "Once upon", "answer": "a time"}
    where = arena_of(None, watch, form="text", processing=renderer().tokenizer)
    [group] = play(where, model("a time"), [row])
    assert asked["prompts"] == ["Once upon"] * 2 and asked["completions"] == ["a time"] * 2
    assert asked["answer"] == ["a time"] * 2
    assert [one.reward for one in group.trajectories] == [None, 1.0], "None does not apply"


# -- what it may answer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        [1, None, 0.5],
        (1.0, float("nan"), 0.5),
        np.array([1.0, np.nan, 0.5], dtype=np.float32),
        torch.tensor([1.0, float("nan"), 0.5]),
        [torch.tensor(1.0), np.float32("nan"), True / 2],
        iter([1.0, None, 0.5]),
    ],
    ids=["list", "tuple", "array", "tensor", "scalars", "iterator"],
)
def test_numbers_of_any_kind_and_nan_for_none(answer):
    [group] = play(arena_of(None, lambda completions, **_: answer), model("three"), size=3)
    assert [one.rewards["<lambda>"].value for one in group.trajectories] == [1.0, None, 0.5]
    assert {one.stop_reason for one in group.trajectories} == {StopReason.ANSWERED}


def test_a_function_that_raises_costs_the_completion_that_broke_it_and_no_run():
    def picky(completions, **_):
        return [1.0 / (len(one[0]["content"]) - 1) for one in completions]

    policy = ScriptedPolicy(lambda context: "ab" if context.session.endswith("s0") else "a")
    [group] = play(arena_of(None, [picky, lambda completions, **_: [5.0] * len(completions)]), policy)
    good, bad = group.trajectories
    assert good.stop_reason is StopReason.ANSWERED and good.reward == 6.0
    assert bad.stop_reason is StopReason.SCORING_FAILED and "ZeroDivisionError" in bad.error.message
    assert bad.reward is None and "picky" not in bad.rewards, "left out, and worth nothing rather than 0"


# -- what it logs --------------------------------------------------------------------------------------


def test_columns_stay_with_their_episodes_though_groups_end_in_any_order():
    board = Board()

    async def reward(completions, delay, log_extra, log_metric, **_):
        await asyncio.sleep(delay[0])
        log_extra("said", [one[0]["content"] for one in completions])
        for one in completions:  # Bit by bit is as well, as TRL extends.
            log_extra("length", [len(one[0]["content"])])
        log_metric("delay", delay[0])
        return [0.0] * len(completions)

    rows = [{**ROW, "delay": delay} for delay in (0.06, 0.0, 0.03)]
    policy = ScriptedPolicy(lambda context: context.session)
    groups = play(arena_of(None, reward, board=board), policy, rows)
    ids = [one.id for group in groups for one in group.trajectories]
    assert board.take_columns(ids[:2]) == {"said": ids[:2], "length": [6, 6]}
    assert board.take_columns(["t/9/s0", *reversed(ids[2:])]) == {
        "said": [None, *reversed(ids[2:])],
        "length": [None, 6, 6, 6, 6],
    }
    assert board.take_columns(ids) == {}, "given once"
    assert board.take_metrics() == {"delay": pytest.approx(0.03)} and board.take_metrics() == {}


def test_a_column_with_too_many_values_is_told_of_and_does_not_spill_over(caplog):
    board = Board()

    def reward(completions, log_extra, **_):
        log_extra("n", range(len(completions) + 1))
        return [0.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        groups = play(arena_of(None, reward, board=board), model("x"), [ROW, ROW])
    ids = [one.id for group in groups for one in group.trajectories]
    assert board.take_columns(ids) == {"n": [0, 1, 0, 1]}
    assert caplog.text.count("was given 3 values for 2 completions") == 1


def test_what_nobody_takes_is_not_kept_without_end(monkeypatch):
    monkeypatch.setattr("turnwise.compat.rewards.KEPT", 3)
    board = Board()
    for number in range(5):
        board.log_extra([f"e{number}"])("n", [number])
    assert board.take_columns([f"e{number}" for number in range(5)]) == {"n": [None, None, 2, 3, 4]}


# -- names, weights, mistakes --------------------------------------------------------------------------


class Judge:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)


def accuracy(completions, scale=1.0, **_):
    return [scale] * len(completions)


def test_names_are_those_that_trl_logs():
    from trl.trainer.utils import get_callable_name

    for function in (accuracy, functools.partial(functools.partial(accuracy), scale=2.0), Judge(), len):
        assert name_of(function) == get_callable_name(function)
    assert name_of("org/reward-model") == "reward-model" and name_of("/models/judge/") == "judge"


def test_weights_and_functions_of_one_name(caplog):
    board = Board()
    twice = [accuracy, functools.partial(accuracy, scale=2.0), Judge()]
    first, second, third = reward_functions(twice, weights=[1.0, 0.5, 2], board=board)
    assert [one.name for one in (first, second, third)] == ["accuracy", "accuracy_2", "Judge"]
    assert [one.weight for one in (first, second, third)] == [1.0, 0.5, 2.0]
    assert "accuracy_2" in caplog.text
    assert reward_functions(None, weights=None, board=board) == ()
    assert len(reward_functions(accuracy, weights=None, board=board)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, "reward_weights has 1 entries for 2 reward functions"),
        ({"weights": None, "reward_processing": [None]}, "reward_processing_classes has 1 entries"),
        ({"weights": None, "reward_funcs": [3, accuracy]}, "found int"),
        ({"weights": None, "reward_funcs": [lambda x: x]}, "it must take"),
    ],
)
def test_mistakes_are_told_before_anything_is_played(arguments, message):
    functions = arguments.pop("reward_funcs", [accuracy, accuracy])
    with pytest.raises(RecipeError, match=message):
        reward_functions(functions, board=Board(), **arguments)


def test_the_harness_changes_with_a_function():
    def reward(completions, **_):
        return [0.0] * len(completions)

    other = arena_of(None, accuracy).harness
    assert arena_of(None, reward).harness != other == arena_of(None, accuracy).harness
