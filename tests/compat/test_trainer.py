"""`GRPOTrainer` trains the model that it is given, and shows it as transformers' Trainer does."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from tests.compat.trainers import ROWS, Events, config, longer, model, trainer, weights
from tests.support.tokenizers import tiny_tokenizer
from turnwise import GRPOTrainer, RLOOConfig
from turnwise.errors import RecipeError


def test_the_model_that_is_handed_over_is_the_one_that_is_trained(tmp_path: Path) -> None:
    given = model()
    before = weights(given)
    made = trainer(tmp_path, given=given)
    output = made.train()
    assert made.model is given
    assert all(not torch.equal(before[name], now) for name, now in weights(given).items() if "weight" in name)
    assert output.global_step == made.state.global_step == 3
    assert output.training_loss == output.metrics["train_loss"]
    made.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, weights(given)[name]) for name, tensor in weights(saved).items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == made.tokenizer.chat_template


def test_events_come_in_the_order_of_transformers_trainer(tmp_path: Path) -> None:
    events = Events()
    made = trainer(
        tmp_path, callbacks=[events], eval_dataset=ROWS[:2], eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, logging_steps=2, max_steps=4, num_train_epochs=2,
    )  # fmt: skip
    made.train()
    update = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    evaluated = ["on_prediction_step", "on_prediction_step", "on_log", "on_evaluate"]
    assert events.names == [
        "on_init_end", "on_train_begin",
        "on_epoch_begin", *update, *update, "on_log", *evaluated, "on_save",
        *update, "on_epoch_end",
        "on_epoch_begin", *update, "on_log", *evaluated, "on_save", "on_epoch_end",
        "on_log", "on_train_end",
    ]  # fmt: skip


def test_each_update_of_a_generation_batch_is_a_step(tmp_path: Path) -> None:
    events = Events()
    made = trainer(
        tmp_path, callbacks=[events], steps_per_generation=2, per_device_train_batch_size=4, num_iterations=2,
        max_steps=6, gradient_accumulation_steps=1,
    )  # fmt: skip
    made.train()
    assert made.plan.updates_per_step == 4
    assert [step for name, step in events.seen if name == "on_step_end"] == [1, 2, 3, 4, 5, 6]
    assert made.state.global_step == 6
    lines = [line for line in made.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["reward" in line for line in lines] == [True, False, False, False, True, False]
    assert [line["epoch"] for line in lines] == pytest.approx([step / 12 for step in range(1, 7)])


class Asking(TrainerCallback):
    """Raises a flag after an update."""

    def __init__(self, flag: str, at: int) -> None:
        self.flag, self.at = flag, at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise it."""
        if state.global_step == self.at:
            setattr(control, self.flag, True)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("should_log", "on_log"),
        ("should_evaluate", "on_evaluate"),
        ("should_save", "on_save"),
        ("should_training_stop", "on_train_end"),
    ],
)
def test_flags_of_the_control_are_honoured(tmp_path: Path, flag: str, wanted: str) -> None:
    events = Events()
    made = trainer(
        tmp_path, callbacks=[events, Asking(flag, 2)], eval_dataset=ROWS[:1], logging_steps=50, max_steps=4
    )
    made.train()
    assert (wanted, 2) in events.seen
    assert made.state.global_step == (2 if flag == "should_training_stop" else 4)
    assert (tmp_path / "checkpoint-2").is_dir() == (flag == "should_save")


def test_a_stop_between_two_updates_of_a_batch_is_at_once(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, callbacks=[Asking("should_training_stop", 1)], num_iterations=3, max_steps=9,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 1
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_callbacks_see_the_gradients_and_the_optimizer(tmp_path: Path) -> None:
    seen: list[tuple[float, float, bool]] = []

    class Looking(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, *_: Any, model: Any, **more: Any) -> None:
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            self.before = model.lm_head.weight.detach().clone()
            self.norm = float(norm)

        def on_optimizer_step(self, args: Any, *_: Any, model: Any, optimizer: Any, **more: Any) -> None:
            moved = not torch.equal(self.before, model.lm_head.weight)
            seen.append((self.norm, optimizer.param_groups[0]["lr"], moved))

    trainer(tmp_path, callbacks=[Looking()], max_grad_norm=0.25, max_steps=2).train()
    assert [norm for norm, _, _ in seen] == pytest.approx([0.25, 0.25], rel=1e-3)
    assert all(rate > 0 and moved for _, rate, moved in seen)


def test_it_trains_inside_of_a_running_loop_and_calls_back_on_the_callers_thread(tmp_path: Path) -> None:
    threads: set[int] = set()

    class Where(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            threads.add(threading.get_ident())

    async def cell() -> Any:
        return trainer(tmp_path, callbacks=[Where()]).train()

    assert asyncio.run(cell()).global_step == 3
    assert threads == {threading.get_ident()}


def test_a_callback_may_evaluate(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []

    class Evaluating(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                found.append(made.evaluate(ROWS[:3], metric_key_prefix="probe"))

    made = trainer(tmp_path, callbacks=[Evaluating()])
    made.train()
    assert found[0]["probe_reward"] > 0
    assert made.evaluate(ROWS[:3], metric_key_prefix="probe")["probe_reward"] > 0, (
        "without a running training"
    )


def test_metrics_have_trls_names_and_no_nan(tmp_path: Path) -> None:
    def sometimes(completions: Any, n: Any, log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("ns", sum(n) / len(n))
        return [None for _ in completions]

    made = trainer(tmp_path, reward_funcs=[longer, sometimes], max_steps=1)
    made.train()
    line = made.state.log_history[0]
    of_each = [
        *(f"completions/{which}_length" for which in ("mean", "min", "max")),
        *(f"completions/{which}_terminated_length" for which in ("mean", "min", "max")),
        *(f"rewards/{name}/{what}" for name in ("longer", "sometimes") for what in ("mean", "std")),
        *(f"clip_ratio/{which}" for which in ("low_mean", "high_mean", "region_mean")),
    ]
    alone = (
        "loss grad_norm learning_rate num_tokens completions/clipped_ratio reward reward_std step_time epoch "
        "frac_reward_zero_std entropy step ns"
    )
    assert {*of_each, *alone.split()} <= line.keys()
    assert line["rewards/sometimes/mean"] is None
    assert line["rewards/longer/mean"] == line["reward"] > 0
    assert "reward/prompts" in line, "Turnwise's own stand beside"
    json.dumps(made.state.log_history, allow_nan=False)


@pytest.mark.parametrize(
    ("method", "hint"),
    [("compute_loss", "loss_type"), ("_generate", "rollout_func"), ("get_train_dataloader", "train_dataset")],
)
def test_a_subclass_that_overrides_what_is_not_there_is_told_so(
    tmp_path: Path, method: str, hint: str
) -> None:
    own = type("Own", (GRPOTrainer,), {method: lambda self: None})
    with pytest.raises(TypeError, match=rf"Own overrides(?s:.*){method}.*{hint}"):
        trainer(tmp_path, of=own)


def test_a_subclass_may_override_what_is_there(tmp_path: Path) -> None:
    class Own(GRPOTrainer):
        def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
            super().log({**logs, "own": 1.0}, start_time)

    made = trainer(tmp_path, of=Own, max_steps=1)
    made.train()
    assert all(line["own"] == 1.0 for line in made.state.log_history)


def test_arguments_of_other_trainers_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes no tokenizer \(it is processing_class now\)"):
        GRPOTrainer(model(), longer, config(tmp_path), ROWS, tokenizer=tiny_tokenizer())  # type: ignore[call-arg]
    optimizer = torch.optim.SGD(model().parameters())
    with pytest.raises(RecipeError, match=r"args.optim"):
        trainer(tmp_path, optimizers=(optimizer, None))


@pytest.mark.parametrize("other", [TrainingArguments, RLOOConfig])
def test_arguments_of_another_class_are_refused_by_name(tmp_path: Path, other: type) -> None:
    with pytest.raises(TypeError, match=rf"takes a turnwise.GRPOConfig.*found {other.__name__}"):
        GRPOTrainer(model(), longer, other(output_dir=str(tmp_path), report_to="none"), ROWS)


def test_trls_own_arguments_are_taken(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    given = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, report_to="none", use_cpu=True, bf16=False,
        max_completion_length=4, disable_tqdm=True, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    made = GRPOTrainer(model(), longer, given, ROWS, ROWS[:1], processing_class=tiny_tokenizer())
    assert made.train().global_step == 1
    assert made.state.best_metric is not None


def test_a_tracker_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"report_to: None is not supported.*'none' reports to none"):
        trainer(tmp_path, report_to="None")
