"""What cannot work at all is told at once: when the trainer is made, or by the first group that is played."""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compat.playing import ROW, play
from tests.compat.trainers import longer, trainer
from tests.support.rollouts import call, calls
from turnwise.compat.environments import environments
from turnwise.compat.guarded import Guarded
from turnwise.compat.metrics import episode_metrics
from turnwise.compat.rewards import Board, reward_functions
from turnwise.errors import EnvError, RecipeError, TaskError
from turnwise.rollout.arena import Arena
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.types import STEPS, Reward, Sampling, StopReason, TrajectoryGroup

# -- when it is made -----------------------------------------------------------------------------------


class Silent:
    """Says nothing at the start."""

    def reset(self, **row: Any) -> None:
        self.asked = 0

    def ask(self) -> str:
        """Ask."""
        self.asked += 1
        return "no"

    def get_reward(self) -> float:
        return 1.0


def misspelt(completions, answr, **_):
    return [1.0] * len(completions)


def with_environments(environments, completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"train_dataset": None}, RecipeError, "train_dataset is needed"),
        ({"train_dataset": [{"question": "x"}] * 4}, TaskError, "row 0: it has no 'prompt', only question"),
        ({"reward_funcs": misspelt}, RecipeError, r"'misspelt' needs 'answr'.* and the columns n$"),
        ({"reward_funcs": with_environments}, RecipeError, "needs 'environments'"),
        ({"reward_funcs": longer, "eval_dataset": None}, None, ""),
        ({"reward_funcs": functools.partial(misspelt, answr=1)}, None, ""),
        ({"reward_funcs": with_environments, "environment_factory": Silent}, None, ""),
        ({"reward_funcs": None, "environment_factory": Silent, "train_dataset": None}, None, ""),
    ],
)
def test_what_can_be_seen_before_anything_is_played(
    given: dict[str, Any], error: type[Exception] | None, said: str, tmp_path: Path
) -> None:
    if error is None:
        trainer(tmp_path, **given)
        return
    with pytest.raises(error, match=said):
        trainer(tmp_path, **given)


def test_an_evaluation_needs_prompts_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=[{"question": "x"}])
    with pytest.raises(TaskError, match="eval_dataset, row 0: it has no 'prompt'"):
        made.evaluate()


# -- by the first group --------------------------------------------------------------------------------


class Broken(Silent):
    """Its first method raises."""

    def reset(self, **row: Any) -> None:
        raise KeyError("level")


class Unscored(Silent):
    def get_reward(self) -> float:
        raise ZeroDivisionError("no moves")


class Odd(Silent):
    def get_reward(self) -> Any:
        return "1.0"


class AsyncUnscored(Silent):
    async def get_reward(self) -> float:  # type: ignore[override]
        raise ZeroDivisionError("no moves")


@pytest.mark.parametrize(
    ("factory", "said", "line"),
    [
        (Broken, "environment Broken: reset: KeyError: 'level'", 'raise KeyError("level")'),
        (Unscored, "get_reward: ZeroDivisionError: no moves", 'raise ZeroDivisionError("no moves")'),
        (AsyncUnscored, "get_reward: ZeroDivisionError: no moves", 'raise ZeroDivisionError("no moves")'),
        (Odd, "get_reward: 'Odd': expected a number", ""),
    ],
)
def test_an_environment_that_fails_in_all_siblings_ends_the_run_at_once(
    factory: type, said: str, line: str, tmp_path: Path
) -> None:
    # One group, so that no other is cancelled where it stands.
    made = trainer(tmp_path, reward_funcs=None, environment_factory=factory, per_device_train_batch_size=4)
    with pytest.raises(EnvError, match=r"in all 4 episodes of a group") as caught:
        made.train()
    assert said in str(caught.value) and line in caught.value.__notes__[0]
    assert made.state.log_history == []


def test_a_reset_that_says_nothing_where_no_row_does(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=None, environment_factory=Silent, train_dataset=None)
    with pytest.raises(EnvError, match="reset returned None and the row's 'prompt' is empty"):
        made.train()


@pytest.mark.parametrize(
    ("value", "worth"), [(torch.tensor(2.0), 2.0), (np.float32(2), 2.0), (float("nan"), None), (None, None)]
)
def test_get_reward_may_say_what_trl_makes_a_tensor_of(value: Any, worth: float | None) -> None:
    class Worth(Silent):
        def get_reward(self) -> Any:
            return value

    [group] = play(Arena("Worth", environments(Worth)["Worth"]), ScriptedPolicy(["done"]))
    assert [one.reward for one in group.trajectories] == [worth, worth]


class Sometimes(Silent):
    """Scores the episodes in which it was asked once."""

    error: type[Exception] = KeyError

    def get_reward(self) -> float:
        if self.asked != 1:
            raise self.error("asked")
        return 1.0


class Mistaken(Sometimes):
    error = AttributeError


def groups_of(factory: type, asked: list[list[int]]) -> list[TrajectoryGroup]:
    """One after another; each sibling asks so many times."""
    [(name, spec)] = environments(factory).items()
    functions = reward_functions(None, weights=None, board=Board())
    guarded, where = Guarded(), Arena(name, spec, functions=functions)

    async def main() -> list[TrajectoryGroup]:
        found = []
        try:
            for number, counts in enumerate(asked):
                policy = ScriptedPolicy(
                    lambda context, counts=counts: (
                        calls(call("ask")) if context.turn < counts[int(context.session[-1])] else "done"
                    )
                )
                order = GroupOrder(id=f"t/{number}", env=name, task=ROW, seed=0, size=len(counts))
                played = await guarded(
                    order, arena=where, policy=policy, sampling=Sampling(), sink=lambda _: None
                )
                found.append(played)
        finally:
            await where.aclose()
        return found

    return asyncio.run(main())


def test_an_episode_that_get_reward_cannot_score_is_left_out_and_told_of_once(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = groups_of(Sometimes, [[1, 2, 1], [0, 0, 0]])
    assert [one.reward for one in first.trajectories] == [1.0, None, 1.0]
    assert first.trajectories[1].stop_reason is StopReason.ENV_FAILED and not first.trajectories[1].rewards
    assert {one.stop_reason for one in second.trajectories} == {StopReason.ENV_FAILED}
    assert caplog.text.count("this is told once") == 1 and "KeyError: 'asked'" in caplog.text
    with pytest.raises(EnvError, match="AttributeError: asked"):
        groups_of(Mistaken, [[1, 2, 1], [0, 0, 0]])


def test_the_0_of_what_nobody_could_score_is_not_logged_as_paid_by_steps() -> None:
    [group] = play(Arena("Silent", environments(Silent)["Silent"]), ScriptedPolicy(["done"]))
    first, second = group.trajectories
    lost = replace(first, rewards={STEPS: Reward(value=0.0)}, stop_reason=StopReason.TIME_LIMIT)
    told = episode_metrics([replace(group, trajectories=(lost, second))], tools=True)
    assert "rewards/steps/mean" not in told and told["rewards/Silent/mean"] == 1.0
    assert told["reward"] == 0.5
