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
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate([prompts, completions], axis=1))
        logits = tiny_qwen3(hidden=32)(ids).logits[:, PROMPT - 1 : -1]
        now = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0].numpy()
    # As far from the model as a few updates, or another kernel, would take it.
    old = (now + rng.normal(0, 0.3, size=shape)).astype(np.float32)
    reference = (now + rng.normal(0, 0.3, size=shape)).astype(np.float32)
    advantages = np.array([0.8, -1.1, 1.3, -0.4], dtype=np.float32)
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


GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
GSPO_CLIPS = {"clip_low": 0.02, "clip_high": 0.03, "kl_estimator": "k3_sequence_ratio"}
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "grpo"}, {"loss": "ppo", "normalise": "sequence", **CLIPS}),
        ({"loss_type": "dapo"}, {"loss": "dapo"}),
        ({"loss_type": "bnpo"}, {"loss": "bnpo", **CLIPS}),
        ({"loss_type": "dr_grpo"}, {"loss": "dr_grpo", "normalise": "constant", **CLIPS}),
        (
            {"loss_type": "grpo", **GSPO},
            {"loss": "gspo", "normalise": "sequence", **GSPO_CLIPS},
        ),
        (
            {"loss_type": "luspo", **GSPO},
            {"loss": "luspo", "normalise": "sum", **GSPO_CLIPS},
        ),
        # Their epsilon_high is the cap itself.
        ({"loss_type": "cispo", "epsilon_high": 1.1}, {"loss": "cispo", "clip_high": 0.1}),
        ({"loss_type": "sapo"}, {"loss": "sapo", "normalise": "sequence"}),
        ({"loss_type": "vespo"}, {"loss": "vespo"}),
        ({"loss_type": "dapo", "use_bias_correction_kl": False}, {"loss": "dapo", "kl_estimator": "k3"}),
        (
            {"loss_type": "grpo", **GSPO, "use_bias_correction_kl": False},
            {"loss": "gspo", "normalise": "sequence", **GSPO_CLIPS, "kl_estimator": "k3"},
        ),
        ({"loss_type": "dapo", "entropy_coef": 0.05}, {"loss": "dapo", "entropy": 0.05}),
        ({"loss_type": "dapo", "delta": 1.3}, {"loss": "dapo", "ratio_cap": 1.3}),
        (
            {"loss_type": "grpo", **GSPO, "delta": 1.04},
            {"loss": "gspo", "normalise": "sequence", **GSPO_CLIPS, "ratio_cap": 1.04},
        ),
        ({"loss_type": "dapo", "off_policy_mask_threshold": 0.05}, {"loss": "dapo", "off_policy_kl": 0.05}),
        # Theirs reads the level for every loss: broadcast over tokens, the mean is another.
        (
            {"loss_type": "dapo", **GSPO},
            {"loss": "gspo", "normalise": "token", **GSPO_CLIPS},
        ),
        ({"loss_type": "luspo"}, {"loss": "ppo", "normalise": "sum", **CLIPS}),
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_loss_and_gradients_equal_trls(
    theirs: dict[str, Any],
    ours: dict[str, Any],
    rows: tuple[dict[str, torch.Tensor], list[Sample]],
    model_dir: Path,
    dataset: Any,
    tmp_path: Path,
) -> None:
    inputs, samples = rows
    settings = {"beta": 0.05, "epsilon": 0.2, "epsilon_high": 0.28, **theirs}
    trainer = grpo_trainer(model_dir, dataset, tmp_path, **settings)
    metrics = compare(trainer, inputs, samples, {"kl": 0.05, **ours})
    logged = trainer._metrics["train"]
    names = {"entropy": "entropy", "kl_reference": "kl"}
    if settings["loss_type"] in ("grpo", "dapo", "bnpo", "dr_grpo"):
        if "importance_sampling_level" not in theirs:  # Theirs counts sequences then, ours tokens.
            names |= {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
        assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0
    for name, their in names.items():
        assert metrics[name] == pytest.approx(logged[their][0], abs=1e-5)


def test_what_is_played_at_once_is_normalised_over_all_of_it(
    rows: tuple[dict[str, torch.Tensor], list[Sample]], model_dir: Path, dataset: Any, tmp_path: Path
) -> None:
    """Theirs divides an update by its share of the tokens of the generation batch, not by its own."""
    inputs, samples = rows
    half = {key: value[:2] if value.ndim else value for key, value in inputs.items()}
    trainer = grpo_trainer(model_dir, dataset, tmp_path, steps_per_generation=2, epsilon_high=0.28)
    own = sum(int(one.loss_mask_T.sum()) for one in samples[:2])
    assert own != sum(int(one.loss_mask_T.sum()) for one in samples[2:])
    weighed = [replace(one, weights_T=one.weights_T * 2) for one in weigh(samples, "token")]
    compare(trainer, half, weighed[:2], {"loss": "dapo"}, weighed=True)


def test_rloo_equals_trls(
    rows: tuple[dict[str, torch.Tensor], list[Sample]], model_dir: Path, dataset: Any, tmp_path: Path
) -> None:
    from trl import RLOOConfig, RLOOTrainer

    inputs, samples = rows
    args = RLOOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=B,
        per_device_train_batch_size=B, max_completion_length=COMPLETION, beta=0.0, epsilon=0.2,
        epsilon_high=0.28, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = RLOOTrainer(
        str(model_dir), reward_funcs=rewards, args=args, train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.model.train()
    # Theirs knows no tools: all of a completion is the policy's own.
    lengths = inputs["completion_mask"].sum(1).tolist()
    whole = []
    for b, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        own_T = np.arange(PROMPT + length) >= PROMPT
        old_T = np.concatenate([np.zeros(PROMPT), inputs["old_per_token_logps"][b, :length].numpy()])
        whole.append(
            replace(
                sample, loss_mask_T=own_T, logprobs_T=old_T.astype(np.float32),
                versions_T=np.where(own_T, 0, -1).astype(np.int32),
                advantages_T=np.where(own_T, np.float32(inputs["advantages"][b]), np.float32(0)),
                reference_logprobs_T=None,
            )
        )  # fmt: skip
    del inputs["tool_mask"]
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    metrics = compare(trainer, inputs, whole, {"loss": "rloo", "normalise": "sum", **CLIPS})
    assert 0 < metrics["clip_low"] + metrics["clip_high"] < 1


def compare(
    trainer: Any,
    inputs: dict[str, torch.Tensor],
    samples: list[Sample],
    ours: dict[str, Any],
    *,
    weighed: bool = False,
) -> dict[str, float]:
    """Loss and gradients of all parameters, theirs and ours; returns our metrics."""
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    config = RlConfig.model_validate({"steps": 1, "groups": {"e": 1}, **ours})
    learner = Learner(
        PolicyModel(tiny_qwen3(hidden=32)),
        tiny_tokenizer(),
        optimizer=OptimizerConfig(),
        rows=BatchConfig(row_tokens=32, micro_tokens=32, logprob_chunk=4),
        total_steps=1,
    )
    constant = COMPLETION if config.normalise == "constant" else None
    metrics = learner.forward_backward(
        samples if weighed else weigh(samples, config.normalise, max_tokens=constant),
        make_loss(config),
        entropy_gradient=config.entropy > 0,
    )
    assert metrics["loss"] == pytest.approx(float(theirs), abs=1e-5)
    gradients = dict(trainer.model.named_parameters())
    largest = 0.0
    for name, parameter in learner.model.trainable:
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-5)
        largest = max(largest, float(parameter.grad.abs().max()))
    assert largest > 1e-2, "what is compared is not all but zero"
    return metrics


@pytest.mark.parametrize(
    ("loss", "mode", "bounds", "correction"),
    [
        ("grpo", "token_truncate", (None, 1.1), {"kind": "tis", "high": 1.1}),
        ("grpo", "token_mask", (0.85, 1.2), {"kind": "icepop", "low": 0.85, "high": 1.2}),
        ("grpo", "sequence_truncate", (None, 1.1), {"kind": "sequence_truncate", "high": 1.1}),
        ("grpo", "sequence_mask", (0.5, 2.0), {"kind": "sequence_mask", "low": 0.5, "high": 2.0}),
        ("gspo", "token_mask", (0.85, 1.2), {"kind": "icepop", "low": 0.85, "high": 1.2}),
        # With a mask each of these sequences has a token in it that ends its say.
        ("vespo", "token_truncate", (None, 1.1), {"kind": "tis", "high": 1.1}),
    ],
)
def test_sampler_correction_equals_trls(
    loss: str,
    mode: str,
    bounds: tuple[float | None, float],
    correction: dict[str, Any],
    rows: tuple[dict[str, torch.Tensor], list[Sample]],
    model_dir: Path,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but their call of vLLM is theirs: what it would have returned is put in its place."""
    tokens, samples = rows
    theirs, ours = {
        "grpo": ({"loss_type": "grpo"}, {"loss": "ppo", "normalise": "sequence"}),
        "gspo": ({"loss_type": "grpo", **GSPO}, {"loss": "gspo", "normalise": "sequence", **GSPO_CLIPS}),
        "vespo": ({"loss_type": "vespo"}, {"loss": "vespo"}),
    }[loss]
    trainer = grpo_trainer(
        model_dir, dataset, tmp_path, **theirs, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0], vllm_importance_sampling_clip_max=bounds[1],
    )  # fmt: skip
    trainer.use_vllm = True

    def each(values: torch.Tensor) -> list[list[Any]]:
        lengths = tokens["completion_mask"].sum(1).tolist()
        return [row[:n].tolist() for row, n in zip(values, lengths, strict=True)]

    played = (
        tokens["prompt_ids"].tolist(), each(tokens["completion_ids"]), each(tokens["tool_mask"]),
        ["done"] * B, each(tokens["old_per_token_logps"]), {}, None, None,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_generate", lambda prompts: played)
    inputs = trainer._generate_and_score_completions([{"prompt": "hi"} for _ in range(B)])
    weights = inputs["importance_sampling_ratio"]
    samples = [
        replace(one, advantages_T=np.where(one.loss_mask_T, np.float32(advantage), np.float32(0)))
        for one, advantage in zip(samples, inputs["advantages"], strict=True)
    ]
    metrics = compare(trainer, inputs, samples, {**ours, "correction": correction})
    own = (tokens["completion_mask"] * tokens["tool_mask"]).bool()
    weights = weights.expand(own.shape)[own]
    assert metrics["correction"] == pytest.approx(float(weights.mean()), abs=1e-5)
    assert metrics["correction_max"] == pytest.approx(float(weights.max()), abs=1e-5)
    assert metrics["correction_rejected"] == pytest.approx(float((weights == 0).float().mean()))
    if mode.endswith("mask"):
        assert 0 < metrics["correction_rejected"] < 1
    else:
        assert metrics["correction_max"] == pytest.approx(1.1)


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
    assert abs(learner.forward_backward(weigh(shifted, "token"), loss)["loss"] - right) > 1e-3
