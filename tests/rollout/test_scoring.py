"""Reward functions: TRL's contract, one trajectory at a time, and what happens when they fail (promise 4)."""

from __future__ import annotations

import asyncio
import linecache
import threading
import time

import numpy as np
import pytest
from tests.support.rollouts import Answer, arena, call, calls, model

from turnwise.errors import RecipeError
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Reward, Sampling, StopReason


def one(function, **options) -> RewardFunction:
    return RewardFunction(function=function, name=options.pop("name", function.__name__), **options)


def group(functions, policy=None, *, size=3, task=None, **options):
    """A group's trajectories, and what the sink got."""
    where, seen = arena(Answer, functions=functions, **options), []
    order = GroupOrder(id="t/0", env="answer", task=task or {"item": "tea", "prompt": "x"}, seed=1, size=size)

    async def main():
        try:
            return await play_group(
                order,
                arena=where,
                policy=policy or ScriptedPolicy(lambda context: f"answer {context.session[-1]}"),
                sampling=Sampling(),
                sink=seen.append,
            )
        finally:
            await where.aclose()

    played = asyncio.run(main())
    assert sorted(one.id for one in seen) == [f"t/0/s{k}" for k in range(size)]
    assert {one.id: one for one in seen} == {one.id: one for one in played.trajectories}
    return played.trajectories


def test_trls_keyword_contract_once_per_group():
    asked = []

    def length(prompts, completions, completion_ids, item, **rest):
        asked.append((prompts, completions, completion_ids, item, rest))
        return [len(completion[0]["content"]) for completion in completions]

    played = group([one(length, weight=2.0)])
    [(prompts, completions, completion_ids, item, rest)] = asked
    assert prompts == [[{"role": "user", "content": "How much?"}]] * 3
    assert completions == [[{"role": "assistant", "content": f"answer {k}"}] for k in range(3)]
    assert item == ["tea"] * 3 and completion_ids == [[], [], []]
    assert rest == {}, "TRL leaves the row's own prompt out"
    for trajectory in played:
        assert trajectory.rewards == {"reward": Reward(value=0.5), "length": Reward(value=8.0, weight=2.0)}
        assert trajectory.reward == 16.5


def test_completion_ids_have_every_token_after_the_prompt():
    asked = []

    def watch(completion_ids, completions):
        asked.append((completion_ids, completions))
        return [None] * len(completions)

    [played] = group([one(watch)], model(calls(call("look")), "3"), size=1)
    [([ids], [messages])] = asked
    first, second = played.turns
    assert ids == first.ids + second.context_ids + second.ids
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[0]["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}
    assert messages[1]["content"] == "3" and messages[1]["name"] == "look"
    assert played.rewards["watch"].value is None and played.reward == 0.5


def test_async_functions_and_functions_of_one_trajectory():
    async def later(completions, **columns):
        await asyncio.sleep(0)
        return np.arange(len(completions), dtype=np.float32)

    def own(trajectory):
        return None if trajectory.id.endswith("s1") else 4

    async def own_later(trajectory):
        return len(trajectory.turns)

    played = group([one(later), one(own), one(own_later)])
    assert [trajectory.rewards["later"].value for trajectory in played] == [0.0, 1.0, 2.0]
    assert [trajectory.rewards["own"].value for trajectory in played] == [4.0, None, 4.0]
    assert [trajectory.reward for trajectory in played] == [5.5, 2.5, 7.5]


def raising(completions, **columns):
    raise StopIteration("boom")


def wrong_length(completions, **columns):
    return [1.0]


def no_list(completions, **columns):
    return 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [(raising, "raised StopIteration"), (wrong_length, "returned 1 values"), (no_list, "returned float")],
)
def test_a_function_that_fails_whatever_it_is_asked_about_pays_nobody(function, message):
    played = group([one(function)])
    # Which of the siblings broke it cannot be told where each alone could be scored.
    excused = function is wrong_length
    reason = StopReason.SCORING_FAILED if excused else StopReason.FORFEITED
    assert {trajectory.stop_reason for trajectory in played} == {reason}
    assert {trajectory.reward for trajectory in played} == {None if excused else 0.5}, "the environment's"
    assert all(message in trajectory.error.message for trajectory in played)
    assert all(trajectory.turns[0].message.text for trajectory in played), "what was played is kept"


def test_nan_for_one_sibling_is_forfeited_by_that_one_alone():
    def odd(completions, **columns):
        return [1.0, float("nan"), 1.0]

    played = group([one(odd)])
    reasons = [trajectory.stop_reason for trajectory in played]
    assert reasons == [StopReason.ANSWERED, StopReason.FORFEITED, StopReason.ANSWERED]
    assert [trajectory.rewards["odd"].value for trajectory in played] == [1.0, 0.0, 1.0]
    assert "finite number" in played[1].error.message


@pytest.mark.parametrize("sync", [True, False])
def test_a_function_that_hangs_is_left_behind_at_its_deadline(sync):
    released = threading.Event()

    def hang(trajectory):
        released.wait(30)

    async def hang_async(trajectory):
        await asyncio.sleep(30)

    started = time.perf_counter()
    played = group([one(hang if sync else hang_async, seconds=0.05)], size=2)
    assert time.perf_counter() - started < 10
    released.set()
    assert all("did not finish within 0.05 s" in trajectory.error.message for trajectory in played)


@pytest.mark.parametrize(
    "odd", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()]
)
def test_what_is_no_exception_ends_its_own_call_at_once_and_nothing_else(odd):
    def sync(trajectory):
        raise odd

    async def later(trajectory):
        raise odd

    started = time.perf_counter()
    for function in (sync, later):
        played = group([one(function, seconds=30)])
        assert {trajectory.stop_reason for trajectory in played} == {StopReason.FORFEITED}
    assert time.perf_counter() - started < 10


def test_a_function_cannot_change_the_rows_of_siblings():
    def spoil(trajectory):
        trajectory.task["nested"].append(1)
        return 0.0

    def spoil_all(completions, nested, **columns):
        for row in nested:
            row.append(1)
        return [0.0] * len(completions)

    row = {"nested": []}
    played = group([one(spoil), one(spoil_all)], task=row)
    assert row == {"nested": []} and all(trajectory.task == row for trajectory in played)


def test_failed_siblings_are_not_asked_about():
    asked = []

    def watch(completions, **columns):
        asked.append(len(completions))
        return [0.0] * len(completions)

    def sometimes(context):
        if context.session.endswith("s1"):
            raise RuntimeError("no")
        return "3"

    played = group([one(watch)], ScriptedPolicy(sometimes))
    assert asked == [2] and played[1].stop_reason is StopReason.POLICY_FAILED


def test_a_name_that_the_environment_uses_is_not_overwritten():
    def reward(trajectory):
        return 1.0

    [played] = group([one(reward)], size=1)
    assert played.stop_reason is StopReason.SCORING_FAILED and "rename" in played.error.message


def test_unusable_functions_are_refused_before_anything_is_played():
    with pytest.raises(RecipeError, match=r"must take \(trajectory\)"):
        one(lambda text: 1.0, name="f")
    with pytest.raises(RecipeError, match=r"pkg\.module:function"):
        RewardFunction.load("nope")
    with pytest.raises(RecipeError, match="nope_not_here"):
        RewardFunction.load("math:nope_not_here")
    with pytest.raises(RecipeError, match="cannot be called"):
        RewardFunction.load("math:pi")
    with pytest.raises(RecipeError, match="same name"):
        arena(Answer, functions=[one(raising), one(raising)])


def test_an_edited_function_is_another_one_to_the_harness(tmp_path):
    def load(text: str) -> str:
        namespace: dict = {}
        file = tmp_path / "rewards.py"
        file.write_text(text)
        exec(compile(text, str(file), "exec"), namespace)
        linecache.checkcache()
        return RewardFunction(function=namespace["short"], name="short").identity

    plain = load("def short(completions):\n    return [1.0 for _ in completions]\n")
    again = load("def short(completions):\n    return [1.0 for _ in completions]\n")
    edited = load("def short(completions):\n    return [0.5 for _ in completions]\n")
    assert plain == again != edited
