"""From TRL's arguments to a plan: each argument where it ends up, and steps counted as TRL counts them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import TrainerCallback, get_scheduler

from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer
from turnwise import GRPOConfig, RLOOConfig, SFTConfig
from turnwise.compat.fields import Honoured, fields_of
from turnwise.compat.translate import NO_DEADLINE, Plan, rl_recipe, sft_recipe
from turnwise.config import EnvConfig, OptimizerConfig
from turnwise.errors import RecipeError
from turnwise.learn.optim import schedule
from turnwise.recipe import load_recipe, resolved

MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr"}
SERVER = {"use_vllm": True, "vllm_mode": "server"}
VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
SEQUENCE = {"importance_sampling_level": "sequence"}


def grpo(rows: Any = 64, environments: tuple[str, ...] = ("e",), processes: int = 1, **settings: Any) -> Plan:
    args = GRPOConfig(output_dir="out/Try 1", **{"max_steps": 4, **settings})
    return plan_of(args, rows, environments, processes)


def plan_of(args: Any, rows: Any = 64, environments: tuple[str, ...] = ("e",), processes: int = 1) -> Plan:
    return rl_recipe(
        args, model_name="tiny", environments={name: EnvConfig() for name in environments}, rows=rows,
        processes=processes,
    )  # fmt: skip


def rloo(**settings: Any) -> Plan:
    return plan_of(RLOOConfig(output_dir="out/Try 1", **{"max_steps": 4, **settings}))


def sft(rows: int = 64, **settings: Any) -> Plan:
    args = SFTConfig(output_dir="out/Try 1", **{"max_steps": 4, **settings})
    return sft_recipe(
        args, model_name="tiny", environments={"d": EnvConfig()}, rows=rows, sources=["rows.jsonl"]
    )


def at(plan: Plan, place: str) -> Any:
    """What stands in the plan or its recipe under a dotted name."""
    value: Any = plan if place.startswith("plan.") else plan.recipe
    for part in place.removeprefix("plan.").split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Batches
    "per_device_train_batch_size": ({"per_device_train_batch_size": 32}, {"rl.groups": {"e": 4}}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 3}, {"rl.groups": {"e": 3}}),
    "steps_per_generation": (
        {"steps_per_generation": 4},
        {"rl.groups": {"e": 4}, "rl.minibatches": 4, "plan.updates_per_step": 4, "rl.steps": 1},
    ),
    "generation_batch_size": ({"generation_batch_size": 16}, {"rl.groups": {"e": 2}, "rl.minibatches": 2}),
    "num_generations": ({"num_generations": 4}, {"rl.group_size": 4, "rl.groups": {"e": 2}}),
    "num_iterations": ({"num_iterations": 2}, {"rl.epochs": 2, "rl.steps": 2, "plan.updates_per_step": 2}),
    "num_train_epochs": ({"num_train_epochs": 2, "max_steps": -1}, {"rl.steps": 128, "plan.max_steps": 128}),
    "max_steps": ({"max_steps": 9}, {"rl.steps": 9, "plan.max_steps": 9}),
    "seed": ({"seed": 7}, {"seed": 7}),
    # Optimizer
    "learning_rate": ({"learning_rate": 3e-4}, {"rl.optimizer.lr": 3e-4}),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine"}, {"rl.optimizer.schedule": "cosine"}),
    "lr_scheduler_kwargs": (
        {**MIN_LR, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"rl.optimizer.schedule": "cosine", "rl.optimizer.floor": 0.1},
    ),
    "warmup_steps": ({"warmup_steps": 2}, {"rl.optimizer.warmup_steps": 2}),
    "weight_decay": ({"weight_decay": 0.1}, {"rl.optimizer.weight_decay": 0.1}),
    "adam_beta1": ({"adam_beta1": 0.8}, {"rl.optimizer.betas": (0.8, 0.999)}),
    "adam_beta2": ({"adam_beta2": 0.95}, {"rl.optimizer.betas": (0.9, 0.95)}),
    "adam_epsilon": ({"adam_epsilon": 1e-6}, {"rl.optimizer.eps": 1e-6}),
    "max_grad_norm": ({"max_grad_norm": 0.0}, {"rl.optimizer.max_grad_norm": None}),
    # Numbers
    "bf16": ({"use_cpu": True, "bf16": True}, {"model.dtype": "bfloat16"}),
    "gradient_checkpointing": ({"gradient_checkpointing": False}, {"rl.rows.gradient_checkpointing": False}),
    "activation_checkpointing": (
        {"activation_checkpointing": False},
        {"rl.rows.gradient_checkpointing": False},
    ),
    # Processes
    "fsdp": ({"fsdp": "full_shard"}, {"parallel.kind": "fsdp"}),
    "ddp_timeout": ({"ddp_timeout": 60}, {"parallel.timeout": 60.0}),
    # Sampling and what plays
    "max_completion_length": (
        {"max_completion_length": 96},
        {
            "environments.e.limits.max_completion": 96,
            "rl.sampling.max_tokens": 96,
            "rl.rows.micro_tokens": 1536,
        },
    ),
    "tool_timeout": ({"tool_timeout": 7.0}, {"environments.e.limits.call_seconds": 7.0}),
    "episode_timeout": ({"episode_timeout": 70.0}, {"environments.e.limits.seconds": 70.0}),
    "max_tool_calling_iterations": (
        {"max_tool_calling_iterations": 3},
        {"environments.e.limits.max_tool_turns": 3},
    ),
    "temperature": ({"temperature": 0.7}, {"rl.sampling.temperature": 0.7}),
    "top_p": ({"top_p": 0.9}, {"rl.sampling.top_p": 0.9, "rl.correction.kind": "tis"}),
    "top_k": ({"top_k": 20}, {"rl.sampling.top_k": 20, "rl.correction.kind": "tis"}),
    "min_p": ({"min_p": 0.1}, {"rl.sampling.min_p": 0.1, "rl.correction.kind": "tis"}),
    "generation_kwargs": (
        {"generation_kwargs": {"temperature": 0.5, "max_new_tokens": 64}},
        {"rl.sampling.temperature": 0.5, "rl.sampling.max_tokens": 64},
    ),
    "chat_template_kwargs": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"model.chat_template_kwargs": {"enable_thinking": False}},
    ),
    "use_vllm": (VLLM, {"rl.correction.kind": "tis"}),
    "vllm_mode": (SERVER, {"engine.kind": "vllm", "engine.urls": ["http://127.0.0.1:8000"]}),
    "vllm_server_base_url": (
        {**SERVER, "vllm_server_base_url": "http://gpu:9000"},
        {"engine.urls": ["http://gpu:9000"]},
    ),
    "vllm_server_host": ({**SERVER, "vllm_server_host": "gpu"}, {"engine.urls": ["http://gpu:8000"]}),
    "vllm_server_port": ({**SERVER, "vllm_server_port": 9}, {"engine.urls": ["http://127.0.0.1:9"]}),
    "vllm_server_timeout": ({**SERVER, "vllm_server_timeout": 9.0}, {"engine.start_seconds": 9.0}),
    "vllm_group_port": (
        {**SERVER, "vllm_group_port": 5000},
        {"engine.weights": "nccl", "engine.nccl_port": 5000},
    ),
    "vllm_max_model_length": ({"vllm_max_model_length": 2000}, {"engine.max_context": 2000}),
    # Advantages
    "scale_rewards": ({"scale_rewards": "batch"}, {"rl.scale": "batch"}),
    "multi_objective_aggregation": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"rl.rewards": "separately"},
    ),
    "mask_truncated_completions": ({"mask_truncated_completions": True}, {"rl.overlong.mask": True}),
    # Losses
    "loss_type": ({"loss_type": "dr_grpo"}, {"rl.normalise": "constant"}),
    "epsilon": ({"epsilon": 0.1}, {"rl.clip_low": 0.1, "rl.clip_high": 0.1}),
    "epsilon_high": ({"epsilon_high": 0.28}, {"rl.clip_high": 0.28}),
    "delta": ({"delta": 4.0}, {"rl.ratio_cap": 4.0}),
    "importance_sampling_level": (SEQUENCE, {"rl.loss": "gspo"}),
    "sapo_temperature_pos": (
        {"loss_type": "sapo", "sapo_temperature_pos": 1.2},
        {"rl.loss": "sapo", "rl.sapo.tau_positive": 1.2},
    ),
    "sapo_temperature_neg": (
        {"loss_type": "sapo", "sapo_temperature_neg": 1.2},
        {"rl.sapo.tau_negative": 1.2},
    ),
    "vespo_k_pos": ({"loss_type": "vespo", "vespo_k_pos": 5.0}, {"rl.vespo.k_positive": 5.0}),
    "vespo_k_neg": ({"loss_type": "vespo", "vespo_k_neg": 5.0}, {"rl.vespo.k_negative": 5.0}),
    "vespo_lambda_pos": (
        {"loss_type": "vespo", "vespo_lambda_pos": 5.0},
        {"rl.loss": "vespo", "rl.vespo.lambda_positive": 5.0},
    ),
    "vespo_lambda_neg": ({"loss_type": "vespo", "vespo_lambda_neg": 5.0}, {"rl.vespo.lambda_negative": 5.0}),
    "beta": ({"beta": 0.04}, {"rl.kl": 0.04}),
    "use_bias_correction_kl": (
        {"beta": 0.04, "use_bias_correction_kl": False},
        {"rl.kl": 0.04, "rl.kl_estimator": "k3"},
    ),
    "entropy_coef": ({"entropy_coef": 0.01}, {"rl.entropy": 0.01}),
    "off_policy_mask_threshold": ({"off_policy_mask_threshold": 0.5}, {"rl.off_policy_kl": 0.5}),
    # Corrections
    "vllm_importance_sampling_mode": (
        {**VLLM, "vllm_importance_sampling_mode": "token_mask"},
        {"rl.correction.kind": "icepop"},
    ),
    "vllm_importance_sampling_clip_max": (
        {**VLLM, "vllm_importance_sampling_clip_max": 1.5},
        {"rl.correction.high": 1.5},
    ),
    "vllm_importance_sampling_clip_min": (
        {**VLLM, "vllm_importance_sampling_clip_min": 0.5},
        {"rl.correction.low": 0.5},
    ),
    "vllm_importance_sampling_cap": (
        {**VLLM, "vllm_importance_sampling_cap": 1.5},
        {"rl.correction.high": 1.5},
    ),
}
"""By argument: settings that it is among, and what they change."""
ELSEWHERE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "normalize_advantages": (rloo, {"normalize_advantages": True}, {"rl.scale": "batch"}),
    "beta": (rloo, {"beta": 0.2}, {"rl.kl": 0.2}),
}
LATER = {"train_sampling_strategy", "use_cpu", "vllm_importance_sampling_correction"}
"""Tried in tests of their own."""


@pytest.mark.parametrize("name", CASES)
def test_each_argument_ends_up_in_its_place(name: str) -> None:
    settings, expected = CASES[name]
    assert name in settings or name in ("vllm_mode",)
    plan, usual = grpo(**settings), grpo()
    for place, value in expected.items():
        assert at(plan, place) == value
    assert any(at(usual, place) != value for place, value in expected.items())


def test_what_does_not_differ_here_is_tried_elsewhere() -> None:
    # With the rest of their settings alone, these places would be as they are with the argument.
    for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"):
        assert at(grpo(**VLLM), "rl.correction.high") == 3.0 != CASES[name][1]["rl.correction.high"]
    assert at(grpo(beta=0.04), "rl.kl_estimator") == "k3_ratio"
    assert at(grpo(loss_type="sapo"), "rl.sapo.tau_positive") == 1.0
    assert at(grpo(loss_type="vespo"), "rl.vespo.lambda_positive") == 3.0
    assert at(grpo(**SERVER), "engine.weights") is None
    for args, name in ((rloo, "normalize_advantages"), (rloo, "beta")):
        _, settings, expected = ELSEWHERE[name]
        ((place, value),) = expected.items()
        assert at(args(**settings), place) == value != at(args(), place)


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, SFTConfig], ids=lambda one: one.__name__)
def test_every_argument_that_goes_into_the_plan_is_tried(config: type) -> None:
    fields = fields_of(config).items()
    planned = {name for name, field in fields if isinstance(field, Honoured) and field.at == "plan"}
    assert planned - CASES.keys() - ELSEWHERE.keys() == planned & LATER


def test_the_usual_plan() -> None:
    """TRL's defaults: 8 episodes of a prompt, DAPO's loss, one update."""
    plan = grpo()
    rl = plan.recipe.rl
    assert rl is not None and plan.recipe.name == "Try-1"
    assert (plan.steps, plan.max_steps, plan.updates_per_step, plan.prompts_per_step) == (4, 4, 1, 1)
    assert (rl.loss, rl.normalise, rl.clips, rl.correction.kind) == ("ppo", "token", (0.2, 0.2), "ignore")
    assert (rl.advantage, rl.scale, rl.kl, rl.staleness) == ("grpo", "group", 0.0, 0)
    assert rl.optimizer.schedule == "linear" and rl.optimizer.lr == 1e-6
    assert plan.notes == ()


def test_a_plan_is_a_recipe_like_any_other(tmp_path: Path) -> None:
    for plan in (grpo(), grpo(**SERVER), rloo(), sft(), grpo(steps_per_generation=4, top_p=0.9)):
        path = tmp_path / "recipe.yaml"
        path.write_text(resolved(plan.recipe), encoding="utf-8")
        assert load_recipe(path) == plan.recipe or resolved(load_recipe(path)) == resolved(plan.recipe)


# -- counting -----------------------------------------------------------------------------------------


def trls_count(args: Any, rows: int, tmp_path: Path) -> tuple[int, int]:
    """Optimizer steps and their last epoch, as TRL and transformers count them."""
    import trl
    from datasets import Dataset

    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            counted.append(state.max_steps)
            raise StopIteration

    counted: list[int] = []
    trainer = trl.GRPOTrainer(
        tiny_qwen3(hidden=32), lambda completions, **_: [0.0] * len(completions),
        trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **args),
        train_dataset=Dataset.from_list([{"prompt": f"{n}"} for n in range(rows)]),
        processing_class=tiny_tokenizer(), callbacks=[Stop],
    )  # fmt: skip
    with pytest.raises(StopIteration):
        trainer.train()
    return counted[0], trainer.state.max_steps


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"num_train_epochs": 2}, 5),
        ({"per_device_train_batch_size": 16, "num_train_epochs": 1.5}, 11),
        ({"steps_per_generation": 4, "num_train_epochs": 1}, 13),
        ({"steps_per_generation": 4, "num_iterations": 2, "num_train_epochs": 1}, 9),
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 2}, 10),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_train_epochs": 1}, 16),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 2}, 6),
        ({"max_steps": 7}, 3),
    ],
)
def test_optimizer_steps_are_counted_as_in_trl(settings: dict[str, Any], rows: int, tmp_path: Path) -> None:
    plan = plan_of(GRPOConfig(output_dir="x", **settings), rows)
    assert plan.max_steps == trls_count(settings, rows, tmp_path)[0]
    assert (plan.steps - 1) * plan.updates_per_step < plan.max_steps <= plan.steps * plan.updates_per_step


def test_several_processes_play_one_batch_together() -> None:
    assert grpo(processes=4).recipe.rl.groups == {"e": 4}  # type: ignore[union-attr]


def test_updates_of_what_was_played_at_once() -> None:
    """Theirs deals out episodes, and divides by all that was played; bnpo by each micro-batch's own."""
    rl = grpo(steps_per_generation=4, num_iterations=2).recipe.rl
    assert rl is not None
    assert (rl.minibatches, rl.epochs, rl.minibatch_of, rl.normalise_over) == (4, 2, "episodes", "step")
    assert at(grpo(steps_per_generation=4, loss_type="bnpo"), "rl.normalise_over") == "update"
    # One group in as many updates as it has episodes.
    assert at(grpo(steps_per_generation=8, per_device_train_batch_size=1), "rl.minibatches") == 8


def test_updates_of_several_generation_batches() -> None:
    """Nothing is updated between them, so they are one step."""
    plan = grpo(gradient_accumulation_steps=4, steps_per_generation=2, per_device_train_batch_size=16)
    assert (plan.prompts_per_step, plan.updates_per_step, at(plan, "rl.epochs")) == (8, 1, 1)
    # Two passes over the same episodes in one update have the gradient of one.
    twice = grpo(gradient_accumulation_steps=2, steps_per_generation=1, num_iterations=2)
    assert (twice.prompts_per_step, twice.updates_per_step) == (1, 1)
    four = grpo(gradient_accumulation_steps=2, steps_per_generation=1, num_iterations=4)
    assert (four.updates_per_step, at(four, "rl.epochs")) == (2, 2)


def test_epochs_go_by_whole_generation_batches() -> None:
    plan = grpo(rows=10, per_device_train_batch_size=32, max_steps=-1, num_train_epochs=3)
    assert (plan.prompts_per_step, plan.steps) == (4, 6)
    assert [plan.epoch_of(step) for step in (0, 1, 2, 5)] == [0, 0.5, 1, 2.5]
    assert grpo(rows=None).epoch_of(4) == 1


def test_environments_share_a_step_as_they_share_the_rows() -> None:
    rows = {"a": 60, "b": 30, "c": 1}
    plan = grpo(rows=rows, environments=("a", "b", "c"), per_device_train_batch_size=96)
    assert at(plan, "rl.groups") == {"a": 7, "b": 4, "c": 1} and plan.rows == 91
    even = grpo(rows=None, environments=("a", "b"), per_device_train_batch_size=32)
    assert at(even, "rl.groups") == {"a": 2, "b": 2}


def test_limits_are_put_over_an_environments_own() -> None:
    own = EnvConfig.model_validate({"reward_weight": 2.0, "limits": {"max_turns": 3, "max_completion": 9}})
    args = GRPOConfig(output_dir="x", max_steps=1, max_completion_length=96)
    config = rl_recipe(args, model_name="m", environments={"e": own}, rows=1).recipe.environments["e"]
    assert (config.reward_weight, config.limits.max_turns, config.limits.max_completion) == (2.0, 3, 96)
    assert (config.limits.call_seconds, config.limits.seconds) == (300.0, 3600.0)
    theirs = trl.GRPOConfig(output_dir="x", max_steps=1, use_cpu=True, bf16=False)
    args = GRPOConfig(output_dir="x", max_steps=1, tool_timeout=None, episode_timeout=None)
    for one, deadlines in ((theirs, (300.0, 3600.0)), (args, (NO_DEADLINE, NO_DEADLINE))):
        limits = (
            rl_recipe(one, model_name="m", environments={"e": own}, rows=1).recipe.environments["e"].limits
        )
        assert (limits.call_seconds, limits.seconds) == deadlines


# -- schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", {}), ("cosine", {}), ("constant", {}), ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_with_min_lr", {"min_lr": 2e-5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_rates_are_transformers(kind: str, more: dict[str, float], warmup: float) -> None:
    """But for the warm-up, which here begins with a part of the rate in place of 0."""
    rate, updates = 1e-4, 12
    args: dict[str, Any] = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": more or None}
    plan = grpo(learning_rate=rate, warmup_steps=warmup, max_steps=updates, **args)
    config = at(plan, "rl.optimizer")
    assert isinstance(config, OptimizerConfig)
    steps = 0 if kind == "constant" else math.ceil(warmup if warmup >= 1 else warmup * updates)
    assert config.warmup_steps == steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    theirs = get_scheduler(kind, optimizer, steps, updates, scheduler_specific_kwargs=more)
    for update in range(updates):
        ours = rate * schedule(config, update, updates)
        wanted = rate * (update + 1) / steps if update < steps else theirs.get_last_lr()[0]
        assert ours == pytest.approx(wanted, rel=1e-6)
        theirs.step()


def test_a_rate_that_only_rises_is_told() -> None:
    plan = grpo(max_steps=2, warmup_steps=10)
    assert at(plan, "rl.optimizer.warmup_steps") == 10
    assert plan.notes == (
        "the learning rate rises to the end: warmup_steps are as many as all updates, or more",
    )


# -- losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": "grpo"}, ("ppo", "sequence", 0.2, 0.2)),
        ({"loss_type": "grpo", **SEQUENCE}, ("gspo", "sequence", 0.2, 0.2)),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, ("ppo", "token", 0.2, 0.28)),
        ({"loss_type": "dapo", **SEQUENCE}, ("gspo", "token", 0.2, 0.2)),
        ({"loss_type": "bnpo"}, ("ppo", "token", 0.2, 0.2)),
        ({"loss_type": "dr_grpo"}, ("ppo", "constant", 0.2, 0.2)),
        ({"loss_type": "luspo"}, ("ppo", "sum", 0.2, 0.2)),
        ({"loss_type": "luspo", **SEQUENCE}, ("gspo", "sum", 0.2, 0.2)),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, ("cispo", "token", None, 4.0)),
        ({"loss_type": "sapo"}, ("sapo", "sequence", None, None)),
        ({"loss_type": "vespo"}, ("vespo", "token", None, None)),
    ],
    ids=lambda one: " ".join(map(str, one.values())) if isinstance(one, dict) else "",
)
def test_losses(settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    rl = grpo(**settings).recipe.rl
    assert rl is not None and (rl.loss, rl.normalise, rl.clip_low, rl.clip_high) == expected


def test_rloo_is_of_whole_sequences_with_the_divergence_in_the_reward() -> None:
    plan = rloo()
    rl = plan.recipe.rl
    assert rl is not None and plan.prompts_per_step == 4 and rl.group_size == 2
    assert (rl.loss, rl.normalise, rl.advantage, rl.scale) == ("rloo", "sum", "rloo", "none")
    assert (rl.kl, rl.kl_in, rl.correction.kind) == (0.05, "reward", "ignore")
    assert at(rloo(beta=0.0), "rl.kl") == 0 and at(rloo(top_k=5), "rl.correction.kind") == "tis"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("ignore", None, None)),
        ({"use_vllm": True}, ("sequence_mask", 0.0, 3.0)),
        ({**SERVER, "vllm_importance_sampling_clip_min": 0.5}, ("sequence_mask", 0.5, 3.0)),
        ({**VLLM, "vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.1},
         ("tis", 0.1, 1e9)),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, ("ignore", None, None)),
        ({"top_p": 0.9, "vllm_importance_sampling_clip_max": 2.0}, ("tis", 0.0, 2.0)),
    ],
)  # fmt: skip
def test_corrections(settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    correction = at(grpo(**settings), "rl.correction")
    assert (correction.kind, correction.low, correction.high) == expected


def test_divergences_beside_sequence_ratios() -> None:
    assert at(grpo(beta=0.1, **SEQUENCE), "rl.kl_estimator") == "k3_sequence_ratio"
    assert at(grpo(beta=0.1, use_bias_correction_kl=False, **SEQUENCE), "rl.kl_estimator") == "k3"


# -- what plays ---------------------------------------------------------------------------------------


def test_the_engine_has_room_for_an_episode() -> None:
    assert at(grpo(), "engine.max_context") is None
    assert at(grpo(), "engine.max_sequences") == 8
    assert at(grpo(max_completion_length=8000), "engine.max_context") == 10048
    args = GRPOConfig(output_dir="x", max_steps=1, max_completion_length=8000)
    own = rl_recipe(args, model_name="m", environments={"e": EnvConfig()}, rows=1, context=9000)
    assert at(own, "engine.max_context") == 9000
    endless = grpo(max_completion_length=None, vllm_max_model_length=1000)
    assert at(endless, "rl.sampling.max_tokens") == 999
    assert at(endless, "environments.e.limits.max_completion") is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_vllm": True}, "vllm_mode='colocate': the embedded engine plays"),
        ({"vllm_mode": "server"}, "vllm_mode does nothing with use_vllm=False"),
        ({"vllm_server_port": 9}, "vllm_server_port does nothing with use_vllm=False"),
        (
            {"use_vllm": True, "vllm_server_port": 9},
            "vllm_server_port does nothing with vllm_mode='colocate'",
        ),
        ({"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization does nothing: it is of vLLM in"),
        ({"per_device_eval_batch_size": 2}, "per_device_eval_batch_size does nothing: an evaluation's"),
        (
            {"vllm_importance_sampling_mode": "token_mask"},
            "vllm_importance_sampling_mode does nothing with use",
        ),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon does nothing with loss_type='sapo'; it is of grpo"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos does nothing with loss_type='dapo'"),
        ({"use_bias_correction_kl": False}, "use_bias_correction_kl does nothing with beta=0"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards does nothing with multi_objective_aggregation='normalize_then_sum'",
        ),
        ({"top_p": 0.9}, "top_p, top_k or min_p cut what is sampled: each token is weighed by the mass"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "entropy_coef: with loss_type='grpo' the entropy is a"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 2},
            "warmup_steps does nothing with lr_scheduler_type='constant'; see constant_with_warmup",
        ),
    ],
)
def test_what_does_nothing_is_told(settings: dict[str, Any], told: str) -> None:
    assert [note for note in grpo(**settings).notes if note.startswith(told)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type is one of grpo, sapo, dapo.*; found 'ppo'"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level is one of token, sequence; found"),
        ({"scale_rewards": "std"}, "scale_rewards is one of group, batch, none; found 'std'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation is one of"),
        ({"vllm_importance_sampling_mode": "mask"}, "vllm_importance_sampling_mode is one of"),
        ({"vllm_mode": "remote"}, "vllm_mode is 'colocate' or 'server'; found 'remote'"),
        ({"loss_type": "cispo"}, "epsilon_high is 0.2 and with loss_type='cispo' the cap on ratios itself"),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, **SEQUENCE},
            "importance_sampling_level='sequence' with",
        ),
        ({"loss_type": "vespo", **SEQUENCE}, "of which it makes the sequence's itself; use 'token'"),
        ({"loss_type": "vespo", "use_vllm": True}, "vllm_importance_sampling_mode='sequence_mask' with loss"),
        ({"loss_type": "luspo", "entropy_coef": 0.1}, "entropy_coef with loss_type='luspo'"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "divides by max_completion_length: set it"),
        ({"delta": 1.1}, "rl.ratio_cap: must be above the clip"),
        ({"temperature": 0.0}, "rl.sampling.temperature: siblings must differ"),
        ({"epsilon": 0.0}, "rl.clip_low: Input should be greater than 0; found 0.0"),
        ({"generation_kwargs": {"num_beams": 4}}, "generation_kwargs takes temperature, .*; found num_beams"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "lr_scheduler_type is one of linear, .*; found inverse_sqrt"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs: linear takes no num_cycles here"),
        (
            {**MIN_LR, "lr_scheduler_kwargs": {"min_lr": 1e-7, "min_lr_rate": 0.1}},
            "takes one of min_lr and min_lr_rate in lr_scheduler_kwargs",
        ),
        ({"vllm_max_model_length": 300}, "rl.sampling.max_tokens: 512 leave no room for a prompt"),
        ({**SERVER, "top_p": 0.9, "vllm_importance_sampling_mode": "token_mask"}, "does not tell the mass"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "num_generations": 4},
            "steps_per_generation=3 and gradient_accumulation_steps=2: an update would begin in one",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        grpo(**settings)


def test_an_unknown_number_of_rows_needs_a_number_of_steps() -> None:
    with pytest.raises(RecipeError, match="max_steps is needed where the number of rows is not known"):
        grpo(rows=None, max_steps=-1)
    with pytest.raises(RecipeError, match="a step has 1 prompts, and there are 2 environments"):
        grpo(environments=("a", "b"))


def test_a_config_that_was_changed_is_counted_anew() -> None:
    args = GRPOConfig(output_dir="x", max_steps=1)
    args.num_generations = 3
    with pytest.raises(RecipeError, match=r"8 episodes are played at once .* of num_generations, 3"):
        plan_of(args)


def test_a_gpu_is_left_alone_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnwise.compat.arguments._accelerator", lambda: (True, False))
    usual, asked = grpo().recipe, grpo(use_cpu=True).recipe
    assert (usual.model.device, usual.engine.device) == (None, None)
    assert (asked.model.device, asked.engine.device, asked.model.dtype) == ("cpu", "cpu", "float32")


# -- supervised learning --------------------------------------------------------------------------------


def test_supervised_steps_are_counted_as_in_transformers() -> None:
    plan = sft(rows=50, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    config = plan.recipe.sft
    assert config is not None and config.batch == {"d": 16} and config.sources == ["rows.jsonl"]
    assert (plan.steps, plan.max_steps, plan.updates_per_step) == (8, 8, 1)
    assert config.weighting == "token" and config.optimizer.lr == 2e-5
    assert at(sft(max_length=100), "sft.rows.micro_tokens") == 1600
    assert at(sft(max_length=None), "sft.rows.micro_tokens") == 8192


def test_lengths_need_no_grouping() -> None:
    sft(train_sampling_strategy="sequential")
    with pytest.raises(RecipeError, match="train_sampling_strategy is random or sequential; found 'group_by"):
        sft(train_sampling_strategy="group_by_length")
