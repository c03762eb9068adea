"""What scripts and callbacks read of a trainer, and what they change on it before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.compat.test_sft import ours
from tests.compat.trainers import ROWS, longer, trainer
from turnwise.errors import RecipeError


def test_attributes_of_trls_trainers_are_there(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_weights=[2.0], temperature=0.7, epsilon=0.3)
    assert made.reward_funcs == [longer]
    assert made.reward_func_names == ["longer"]
    assert torch.equal(made.reward_weights, torch.tensor([2.0]))
    assert (made.num_generations, made.num_generations_eval, made.temperature) == (4, 4, 0.7)
    assert (made.epsilon_low, made.epsilon_high, made.loss_type) == (0.3, 0.3, "dapo")
    assert (made.max_completion_length, made.num_iterations, made.beta) == (12, 1, 0.0)
    assert made.ref_model is None and made.optimizer is None and made.lr_scheduler is None
    assert made.model_wrapped is made.model
    with pytest.raises(AttributeError, match=r"trainer.epsilon_low is read.*set trainer.args.epsilon before"):
        made.epsilon_low = 0.1
    assert not hasattr(trainer(tmp_path, beta=0.1), "ref_model")


def test_live_environments_are_not_the_trainers(tmp_path: Path) -> None:
    class Room:
        reward = 0.0

        def reset(self, **_: Any) -> str:
            """Nothing."""
            return ""

        def wait(self) -> str:
            """Wait."""
            return "waited"

    made = trainer(tmp_path, environment_factory=Room)
    assert len(made.environments) == 1
    with pytest.raises(KeyError, match="keyword `environments`"):
        made.environments[0]


def test_callbacks_have_rates_and_the_length_of_a_pass(tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []

    class Looking(TrainerCallback):
        def on_step_end(self, *_: Any, lr_scheduler: Any, train_dataloader: Any, **more: Any) -> None:
            seen.append((*lr_scheduler.get_last_lr(), len(train_dataloader), train_dataloader.batch_size))

    made = trainer(tmp_path / "rl", callbacks=[Looking()], max_steps=2, gradient_accumulation_steps=2)
    made.train()
    # Six rows, four episodes each, eight a micro-batch; two rows fill none.
    assert seen == [(1e-3, 1e-3, 2, 8), (5e-4, 5e-4, 2, 8)]
    assert made.lr_scheduler.get_last_lr() == [5e-4, 5e-4]


def test_what_is_changed_on_a_trainer_is_planned_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def noting(prompts: Any, **_: Any) -> list[float]:
        asked.extend(prompts)
        return [float(n) for n, _ in enumerate(prompts)]

    made = trainer(tmp_path, reward_funcs=noting, max_steps=3)
    made.args.max_steps, made.args.learning_rate, made.args.reward_weights = 1, 5e-4, [3.0]
    made.train_dataset = [{"prompt": "Something else."}, {"prompt": "Something other."}]
    assert made.train().global_step == 1
    line = made.state.log_history[0]
    assert line["learning_rate"] == 5e-4
    assert {*asked} == {"Something else.", "Something other."}
    assert line["reward"] == 3 * line["rewards/noting/mean"] == 4.5
    made.args.eval_strategy = "epoch"
    with pytest.raises(RecipeError, match="no eval_dataset"):
        made.train()


def test_what_is_changed_on_a_supervised_trainer_is_planned_anew(tmp_path: Path) -> None:
    made = ours(tmp_path, [{"text": "none of this"}] * 4, max_steps=3)
    before = made.train_dataset
    made.args.max_steps = 1
    made.train_dataset = [{"text": "one"}, {"text": "two"}]
    assert made.train().global_step == 1
    assert made.train_dataset is not before
    tokens = [len(made.tokenizer(text)["input_ids"]) + 1 for text in ("one", "two")]  # And the end.
    assert made.state.log_history[0]["num_tokens"] == sum(tokens)


def test_a_trainer_that_is_not_changed_is_not_planned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, max_steps=1, train_dataset=iter(ROWS))  # Which can be read once.
    monkeypatch.setattr(type(made), "plan_anew", lambda _: pytest.fail("there was no need"))
    made.train()
