"""A trainer's run on disk: checkpoints, resuming, evaluation, the best model, runs that were there before."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from tests.compat.trainers import ROWS, Events, longer, model, trainer, weights
from turnwise.errors import RecipeError

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
TIMES = {"step_time", "rollout_seconds", "learn_seconds", "publish_seconds"}


def lines(made: Any) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    return [
        {
            name: pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
            for name, value in line.items()
            if name not in TIMES
        }
        for line in made.state.log_history
        if "train_runtime" not in line
    ]


def logged(made: Any) -> list[dict[str, Any]]:
    """As they are, those of `lines`."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in made.state.log_history
        if "train_runtime" not in line
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two models are equal, but for sums that were added up in another order."""
    return all(
        torch.allclose(tensor, weights(other)[name], atol=1e-6) for name, tensor in weights(one).items()
    )


class KilledError(Exception):
    """Stands for what ends a process."""


class Kill(TrainerCallback):
    """Ends the training after an update."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Raise."""
        if state.global_step == self.at:
            raise KilledError


def killed(path: Path, at: int, **settings: Any) -> None:
    """A run that ended in the middle."""
    with pytest.raises(KilledError):
        trainer(path, callbacks=[Kill(at)], **SAVED | settings).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing has stopped."""
    made = trainer(tmp_path_factory.mktemp("whole"), **SAVED)
    made.train()
    return made


def test_checkpoints_stand_where_transformers_puts_them(whole: Any) -> None:
    path = Path(whole.args.output_dir)
    assert {one.name for one in path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert same(AutoModelForCausalLM.from_pretrained(path / "checkpoint-5"), whole.model)
    assert not same(AutoModelForCausalLM.from_pretrained(path / "checkpoint-4"), whole.model)
    state = json.loads((path / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (4, 5)
    assert [line["step"] for line in state["log_history"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_run_that_was_stopped_goes_on_exactly(whole: Any, tmp_path: Path, at: int) -> None:
    killed(tmp_path, at)
    made = trainer(tmp_path, **SAVED)
    output = made.train(resume_from_checkpoint=True)
    assert output.global_step == 5
    assert same(made.model, whole.model)
    assert [line.keys() for line in lines(made)] == [line.keys() for line in lines(whole)]
    assert all(told == wanted for told, wanted in zip(logged(made), lines(whole), strict=True))
    ids = [
        line["id"] for line in map(json.loads, (tmp_path / "trajectories/rl.jsonl").read_text().splitlines())
    ]
    assert len(ids) == len(set(ids)) == 5 * 8, "nothing is played twice"


def test_updates_of_a_batch_are_made_again_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_iterations": 2, "max_steps": 5, "save_steps": 2}
    made = [trainer(tmp_path / "whole", **SAVED | settings)]
    made[0].train()
    killed(tmp_path / "cut", 3, **settings)
    made.append(trainer(tmp_path / "cut", **SAVED | settings))
    made[1].train(resume_from_checkpoint=True)
    assert same(made[0].model, made[1].model)
    assert all(told == wanted for told, wanted in zip(logged(made[1]), lines(made[0]), strict=True))


def test_an_earlier_checkpoint_can_be_gone_on_from(whole: Any, tmp_path: Path) -> None:
    first = trainer(tmp_path, **SAVED)
    first.train()
    events, between = Events(), time.time()
    made = trainer(tmp_path, callbacks=[events], **SAVED)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for name, step in events.seen if name == "on_step_end"] == [3, 4, 5]
    assert same(made.model, whole.model)
    played = map(json.loads, (tmp_path / "trajectories/rl.jsonl").read_text().splitlines())
    began = [one["started"] for one in played]
    assert sum(one > between for one in began) == 3 * 8, "what came later is played anew"
    assert (tmp_path / "previous-1" / "checkpoint-5").is_dir(), "what came later is kept"
    assert len((tmp_path / "previous-1" / "steps.jsonl").read_text().splitlines()) == 5


def test_a_run_may_go_on_for_longer(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    made = trainer(tmp_path, **SAVED | {"max_steps": 7})
    assert made.train(resume_from_checkpoint=True).global_step == 7
    assert [line["step"] for line in lines(made)] == [1, 2, 3, 4, 5, 6, 7]


def test_beginning_anew_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(tmp_path, **SAVED)
    first.train()
    second = trainer(tmp_path, given=model(seed=1), **SAVED)
    second.train()
    assert "previous-1" in caplog.text
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "previous-1/checkpoint-5"), first.model)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5"), second.model)
    assert not same(first.model, second.model)


def test_what_is_no_checkpoint_of_this_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run of Turnwise"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    model().save_pretrained(tmp_path / "other" / "checkpoint-3")
    with pytest.raises(RecipeError, match="hand its path over as the model"):
        trainer(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "other/checkpoint-3"))
    trainer(tmp_path / "one", **SAVED).train()
    with pytest.raises(RecipeError, match="lies in another run"):
        trainer(tmp_path / "two").train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-2"))


def test_checkpoints_that_are_too_many_are_dropped_but_not_the_best(tmp_path: Path) -> None:
    rewards = iter([5.0, 9.0, 1.0, 1.0, 1.0])
    values: list[float] = []

    class Telling(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: dict[str, Any], **__: Any) -> None:
            values.append(metrics["eval_reward"])

    class Made(type(trainer(tmp_path / "unused"))):  # type: ignore[misc]
        def evaluate(self, *arguments: Any, **more: Any) -> dict[str, Any]:
            return {**super().evaluate(*arguments, **more), "eval_quality": next(rewards)}

    made = trainer(
        tmp_path, of=Made, callbacks=[Telling()], eval_dataset=ROWS[:2], eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, load_best_model_at_end=True, max_steps=5,
        metric_for_best_model="quality", greater_is_better=True,
    )  # fmt: skip
    made.train()
    assert {one.name for one in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), made.model)
    assert len(values) == 5


def test_early_stopping_of_transformers_stops(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, callbacks=[EarlyStoppingCallback(2, 1e9)], eval_dataset=ROWS[:1], eval_strategy="steps",
        eval_steps=1, max_steps=9, metric_for_best_model="reward", greater_is_better=True,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 3, "the first value is the best, and two more are patience"


def test_evaluations_are_stored_and_found_again(tmp_path: Path) -> None:
    settings = {"eval_dataset": ROWS[:2], "eval_strategy": "steps", "eval_steps": 1}
    whole = trainer(tmp_path / "whole", **SAVED, **settings)
    whole.train()
    killed(tmp_path / "cut", 4, **settings)
    events = Events()
    made = trainer(tmp_path / "cut", callbacks=[events], **SAVED, **settings)
    made.train(resume_from_checkpoint=True)
    assert [name for name in events.names if name == "on_evaluate"] == ["on_evaluate"] * 3

    def rewards(of: Any) -> list[tuple[int, float]]:
        return [(one["step"], one["eval_reward"]) for one in of.state.log_history if "eval_reward" in one]

    assert rewards(made)[:3] == rewards(whole)[:3]
    assert [step for step, _ in rewards(made)] == [1, 2, 3, 4, 5]


def test_data_sets_by_name_have_their_own_metrics(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset={"few": ROWS[:1], "many": ROWS})
    metrics = made.evaluate()
    assert {"eval_few_reward", "eval_many_reward"} <= metrics.keys()
    assert len(made.state.log_history) == 2


def test_num_generations_eval_is_how_often_each_row_is_played(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(completions: Any, **_: Any) -> list[float]:
        asked.append(len(completions))
        return longer(completions)

    trainer(tmp_path, reward_funcs=counting, num_generations_eval=3).evaluate(ROWS[:2])
    assert asked == [3, 3]


def test_ctrl_c_ends_it_and_the_run_goes_on(whole: Any, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Interrupt()], **SAVED).train()
    made = trainer(tmp_path, **SAVED)
    made.train(resume_from_checkpoint=True)
    assert same(made.model, whole.model)


BEST = {
    "eval_dataset": ROWS[:1], "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 1, "load_best_model_at_end": True,
}  # fmt: skip


def test_the_best_model_is_the_best_rewarded_where_nothing_else_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, **BEST)
    assert "the one with the highest eval_reward" in caplog.text
    made.train()
    found = [(line["eval_reward"], line["step"]) for line in made.state.log_history if "eval_reward" in line]
    best, step = max(found, key=lambda one: one[0])
    assert len(found) == 3
    assert (made.state.best_metric, made.state.best_global_step) == (best, step)
    assert made.state.best_model_checkpoint == f"{tmp_path}/checkpoint-{step}"


def test_a_metric_that_is_named_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"metric_for_best_model": "completions/mean_length", "greater_is_better": False}
    made = trainer(tmp_path, **BEST, **changes)
    assert made.args.metric_for_best_model == "completions/mean_length"
    assert made.args.greater_is_better is False
    assert "eval_reward" not in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "rewards/shorter/mean"},
        {"metric_for_best_model": "reward", "eval_dataset": {"a": ROWS[:1], "b": ROWS[1:2]}},
        {"eval_dataset": {"a": ROWS[:1], "b": ROWS[1:2]}},
    ],
)
def test_a_best_model_needs_a_metric_that_there_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    def plain(completions: Any, completion_ids: Any = None) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(RecipeError, match=r"metric_for_best_model is .*it has: eval.*rewards/plain/mean"):
        trainer(tmp_path, reward_funcs=plain, **BEST | changes)


class StopsWithTheEpoch(TrainerCallback):
    """Raises flags when an epoch ends."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, and save."""
        control.should_training_stop = control.should_save = True


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 1}])
def test_the_end_of_an_epoch_may_stop_and_save(tmp_path: Path, saving: dict[str, Any]) -> None:
    made = trainer(tmp_path, callbacks=[StopsWithTheEpoch()], max_steps=-1, num_train_epochs=3, **saving)
    made.train()
    assert made.state.global_step == 3, "one pass over six prompts, two at a time"
    assert (tmp_path / "checkpoint-3").is_dir()


def test_what_falls_between_two_updates_comes_at_the_end_of_their_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events()
    made = trainer(
        tmp_path, callbacks=[events], num_iterations=4, max_steps=8, save_strategy="steps", save_steps=3,
        eval_dataset=ROWS[:1], eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    made.train()
    assert caplog.text.count("eval_steps=3 and save_steps=3: a generation batch makes 4 updates") == 1
    assert [step for name, step in events.seen if name == "on_save"] == [4, 8]
    assert [step for name, step in events.seen if name == "on_evaluate"] == [4, 8]
    assert {one.name for one in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
