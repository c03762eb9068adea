"""The whole way from samples to gradients, against the installed TRL's own code on the same tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, OptimizerConfig, RlConfig
from turnwise.learn.advantages import ADVANTAGES
from turnwise.learn.learner import Learner
from turnwise.learn.losses import make_loss
from turnwise.learn.model import PolicyModel
from turnwise.learn.normalise import weigh
from turnwise.types import Sample

B, PROMPT, COMPLETION = 4, 5, 12
REWARDS = [0.0, 1.0, 0.5, 0.25]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(hidden=32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "hi"}] * 8)


def grpo_trainer(model_dir: Path, dataset: Any, out: Path, **settings: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=B,
        per_device_train_batch_size=B,
        gradient_accumulation_steps=1,
        max_completion_length=COMPLETION,
        model_init_kwargs={"dtype": "float32"},
        **settings,
    )
    trainer = GRPOTrainer(
        str(model_dir), reward_funcs=rewards, args=args, train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rewards(prompts: list[str], **_: Any) -> list[float]:
    return REWARDS[: len(prompts)]


@pytest.fixture
def rows() -> Iterator[tuple[dict[str, torch.Tensor], list[Sample]]]:
    """Ragged completions with tool results in between: TRL's padded tensors and our samples of them."""
    rng = np.random.default_rng(0)
    shape = (B, COMPLETION)
    prompts = rng.integers(500, size=(B, PROMPT))
    completions = rng.integers(500, size=shape)
    lengths = [12, 7, 9, 4]
    there = np.arange(COMPLETION)[None] < np.array(lengths)[:, None]
    own = there & (rng.random(shape) < 0.7)
    old = rng.normal(-6, 0.3, size=shape).astype(np.float32)
    reference = rng.normal(-6, 0.3, size=shape).astype(np.float32)
    advantages = rng.normal(size=B).astype(np.float32)
    inputs = {
        "prompt_ids": torch.from_numpy(prompts),
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "completion_ids": torch.from_numpy(completions),
        "completion_mask": torch.from_numpy(there).long(),
        "tool_mask": torch.from_numpy(own).long(),
        "advantages": torch.from_numpy(advantages),
        "old_per_token_logps": torch.from_numpy(old),
        "ref_per_token_logps": torch.from_numpy(reference),
        "num_items_in_batch": torch.tensor(float(own.sum())),
    }

    def row(b: int, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([np.zeros(PROMPT, values.dtype), values[b, : lengths[b]]])

    samples = []
    for b in range(B):
        mask_T = row(b, own)
        samples.append(
            Sample(
                token_ids_T=np.concatenate([prompts[b], completions[b, : lengths[b]]]).astype(np.int32),
                loss_mask_T=mask_T,
                logprobs_T=np.where(mask_T, row(b, old), np.float32(0)),
                advantages_T=np.where(mask_T, advantages[b], np.float32(0)),
                weights_T=np.zeros(len(mask_T), dtype=np.float32),
                versions_T=np.where(mask_T, 0, -1).astype(np.int32),
                reference_logprobs_T=np.where(mask_T, row(b, reference), np.float32(0)),
                trajectory_id=f"t{b}",
                group_id="g",
                env="e",
            )
        )
    yield inputs, samples


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("grpo", {"loss": "ppo", "normalise": "sequence"}),
        ("dapo", {"loss": "dapo", "normalise": "token"}),
        ("dr_grpo", {"loss": "ppo", "normalise": "constant"}),
    ],
)
def test_loss_and_gradients_equal_trls(
    loss_type: str,
    settings: dict[str, str],
    rows: tuple[dict[str, torch.Tensor], list[Sample]],
    model_dir: Path,
    dataset: Any,
    tmp_path: Path,
) -> None:
    inputs, samples = rows
    trainer = grpo_trainer(
        model_dir, dataset, tmp_path, loss_type=loss_type, beta=0.05, epsilon=0.2, epsilon_high=0.28
    )
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()

    config = RlConfig.model_validate(
        {"steps": 1, "groups": {"e": 1}, "clip_low": 0.2, "clip_high": 0.28, "kl": 0.05, **settings}
    )
    learner = Learner(
        PolicyModel(tiny_qwen3(hidden=32)),
        tiny_tokenizer(),
        optimizer=OptimizerConfig(),
        rows=BatchConfig(row_tokens=32, micro_tokens=32, logprob_chunk=4),
        total_steps=1,
    )
    constant = COMPLETION if config.normalise == "constant" else None
    metrics = learner.forward_backward(
        weigh(samples, config.normalise, max_tokens=constant), make_loss(config)
    )
    assert metrics["loss"] == pytest.approx(float(theirs), abs=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in learner.model.trainable:
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)
    logged = trainer._metrics["train"]
    for ours, their in {
        "entropy": "entropy",
        "kl_reference": "kl",
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
    }.items():
        assert metrics[ours] == pytest.approx(logged[their][0], abs=1e-5)


@pytest.mark.parametrize(("name", "scale"), [("grpo", "group"), ("dr_grpo", "none")])
def test_advantages_equal_trls(name: str, scale: str, model_dir: Path, dataset: Any, tmp_path: Path) -> None:
    trainer = grpo_trainer(model_dir, dataset, tmp_path, scale_rewards=scale)
    theirs = trainer._generate_and_score_completions([{"prompt": "hi"} for _ in range(B)])["advantages"]
    ours = ADVANTAGES[name](np.array(REWARDS))  # type: ignore[index]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_rloo_advantages_equal_trls(model_dir: Path, dataset: Any, tmp_path: Path) -> None:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=B,
        per_device_train_batch_size=B,
        max_completion_length=4,
        beta=0.0,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = RLOOTrainer(
        str(model_dir), reward_funcs=rewards, args=args, train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    theirs = trainer._generate_and_score_completions([{"prompt": "hi"} for _ in range(B)])["advantages"]
    np.testing.assert_allclose(ADVANTAGES["rloo"](np.array(REWARDS)), theirs.numpy(), atol=1e-5)


def test_the_fixture_would_show_a_wrong_mask(
    rows: tuple[dict[str, torch.Tensor], list[Sample]],
) -> None:
    _, samples = rows
    learner = Learner(
        PolicyModel(tiny_qwen3(hidden=32)), tiny_tokenizer(), optimizer=OptimizerConfig(),
        rows=BatchConfig(), total_steps=1,
    )  # fmt: skip
    loss = make_loss(RlConfig.model_validate({"steps": 1, "groups": {"e": 1}}))
    right = learner.forward_backward(weigh(samples, "token"), loss)["loss"]
    shifted = [replace(s, loss_mask_T=np.append(s.loss_mask_T[1:], False)) for s in samples]
    assert abs(learner.forward_backward(weigh(shifted, "token"), loss)["loss"] - right) > 1e-2
