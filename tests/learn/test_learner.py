"""The learner as a whole: invariances, references, checkpoints, refusals, and that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import tiny_qwen3
from tests.support.samples import random_sample
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from turnwise.config import BatchConfig, LoraConfig, ModelConfig, OptimizerConfig
from turnwise.errors import LearnError, NonFiniteError, StoreError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import cross_entropy, policy_loss, ppo, reinforce
from turnwise.learn.model import PolicyModel, load_model
from turnwise.learn.normalise import weigh
from turnwise.types import Sample

CLIPPED = partial(policy_loss, term=partial(ppo, clip_low=0.2, clip_high=0.28))
REINFORCE = partial(policy_loss, term=reinforce)


def learner(
    model: Any = None, *, rows: BatchConfig | None = None, total_steps: int = 10, **optimizer: Any
) -> Learner:
    if not isinstance(model, PolicyModel):
        model = PolicyModel(model or tiny_qwen3(hidden=32))
    return Learner(
        model,
        tiny_tokenizer(),
        optimizer=OptimizerConfig(**{"lr": 1e-2, **optimizer}),
        rows=rows or BatchConfig(),
        total_steps=total_steps,
    )


def samples_of(lengths: Sequence[int] = (9, 20, 5, 31, 12, 7), **settings: Any) -> list[Sample]:
    rng = np.random.default_rng(5)
    return weigh([random_sample(rng, n, id=f"t{i}", **settings) for i, n in enumerate(lengths)], "sequence")


def gradients(trained: Learner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trained.model.trainable if p.grad is not None}


def weights(trained: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.trainable}


@pytest.mark.parametrize(
    "rows",
    [
        BatchConfig(micro_tokens=8),
        BatchConfig(micro_tokens=64, row_tokens=32, logprob_chunk=3),
        BatchConfig(micro_tokens=512, row_tokens=128, gradient_checkpointing=True),
    ],
)
def test_the_gradient_is_the_same_whatever_the_rows(rows: BatchConfig) -> None:
    samples = samples_of()
    whole = learner(rows=BatchConfig(micro_tokens=4096))
    wanted = whole.forward_backward(samples, CLIPPED)
    split = learner(rows=rows)
    got = split.forward_backward(samples[::-1], CLIPPED)
    torch.testing.assert_close(gradients(split), gradients(whole), atol=1e-5, rtol=1e-5)
    for name, value in wanted.items():
        if name != "padding":
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_calls_add_up_and_rows_without_advantage_may_be_left_out() -> None:
    samples = samples_of()
    samples[2] = replace(samples[2], advantages_T=np.zeros_like(samples[2].advantages_T))
    whole = learner()
    whole.forward_backward(samples, CLIPPED)
    parts = learner()
    parts.forward_backward(samples[:2], CLIPPED)
    parts.forward_backward(samples[3:], CLIPPED)
    torch.testing.assert_close(gradients(parts), gradients(whole), atol=1e-5, rtol=1e-5)


def test_cross_entropy_is_transformers_own_labels_loss() -> None:
    samples = weigh(samples_of([20]), "token")
    ours = learner()
    loss = ours.forward_backward(samples, cross_entropy)["loss"]
    model = tiny_qwen3(hidden=32)
    ids = torch.from_numpy(samples[0].token_ids_T).long()[None]
    labels = torch.where(torch.from_numpy(samples[0].loss_mask_T)[None], ids, -100)
    theirs = model(input_ids=ids, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(float(theirs), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients(ours)[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_bandit_learns_the_rewarded_token() -> None:
    """Prompts of three tokens, one sampled token each; token 7 alone is paid."""
    bandit = learner(lr=5e-3)
    generator = np.random.default_rng(0)
    prompt = np.array([3, 4, 5], dtype=np.int32)

    def probability() -> np.ndarray[Any, Any]:
        with torch.no_grad():
            logits = bandit.model.causal(input_ids=torch.from_numpy(prompt).long()[None]).logits[0, -1]
        return logits[:16].softmax(-1).numpy() * float(logits.softmax(-1)[:16].sum())

    assert probability()[7] < 0.1
    for _ in range(40):
        p = probability().astype(np.float64)
        samples = []
        for i in range(32):
            action = int(generator.choice(16, p=p / p.sum()))
            # Explore at first, so that the reward is seen at all; the sampler's own logprob is recorded.
            if generator.random() < 0.2:
                action = 7
            samples.append(
                Sample(
                    token_ids_T=np.append(prompt, np.int32(action)),
                    loss_mask_T=np.array([False] * 3 + [True]),
                    logprobs_T=np.array([0, 0, 0, np.log(p[action])], dtype=np.float32),
                    advantages_T=np.array([0, 0, 0, float(action == 7) - p[7]], dtype=np.float32),
                    weights_T=np.zeros(4, dtype=np.float32),
                    versions_T=np.array([-1, -1, -1, bandit.version], dtype=np.int32),
                    trajectory_id=f"b{i}",
                    group_id="b",
                    env="bandit",
                )
            )
        metrics = bandit.forward_backward(weigh(samples, "token"), CLIPPED)
        # Nothing was updated since these were sampled: the learner sees the sampler's very logprobs.
        assert metrics["mismatch_max"] < 1e-4
        bandit.optim_step()
        bandit.publish()
    assert probability()[7] > 0.9


def test_version_and_freshness() -> None:
    trained = learner()
    samples = samples_of()
    assert {"mismatch", "mismatch_max"} <= trained.forward_backward(samples, CLIPPED).keys()
    trained.publish()
    assert trained.version == 0
    trained.optim_step()
    # Updated since the samples were drawn: what differs now is no fault of the sampler.
    assert not {"mismatch", "mismatch_max"} & trained.forward_backward(samples, CLIPPED).keys()
    trained.optim_step()
    trained.publish()
    trained.publish()
    assert (trained.version, trained.step) == (1, 2)
    assert not {"mismatch", "mismatch_max"} & trained.forward_backward(samples, CLIPPED).keys()
    now = [replace(s, versions_T=np.where(s.loss_mask_T, 1, -1).astype(np.int32)) for s in samples]
    assert "mismatch" in trained.forward_backward(now, CLIPPED)


def lora_model(tmp_path: Path, *, dropout: float = 0.0, seed: int = 0) -> PolicyModel:
    path = tmp_path / "base"
    if not path.exists():
        tiny_qwen3(hidden=32).save_pretrained(path)
    return load_model(
        ModelConfig(name=str(path), lora=LoraConfig(r=4, alpha=8, dropout=dropout)), device="cpu", seed=seed
    )


def test_with_the_adapter_off_the_reference_is_the_base(tmp_path: Path) -> None:
    samples = samples_of()
    base = learner().logprobs(samples)
    trained = learner(lora_model(tmp_path))
    assert all("lora_" in name for name, _ in trained.model.trainable)
    for _ in range(2):
        trained.forward_backward(samples, REINFORCE)
        trained.optim_step()
    reference = trained.logprobs(samples, reference=True)
    for ours, theirs in zip(reference, base, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    moved = max(float(np.abs(a - b).max()) for a, b in zip(trained.logprobs(samples), base, strict=True))
    assert moved > 1e-2


def test_without_adapters_a_frozen_copy_is_the_reference() -> None:
    samples = samples_of()
    trained = learner()
    with pytest.raises(LearnError, match="call keep_reference"):
        trained.with_reference(samples)
    trained.model.keep_reference()
    base = trained.logprobs(samples)
    metrics = trained.forward_backward(trained.with_reference(samples), partial(REINFORCE, kl=0.1))
    assert metrics["kl_reference"] == pytest.approx(0, abs=1e-9)
    trained.optim_step()
    for sample, wanted in zip(trained.with_reference(samples), base, strict=True):
        assert sample.reference_logprobs_T is not None
        np.testing.assert_array_equal(sample.reference_logprobs_T, wanted)
    metrics = trained.forward_backward(trained.with_reference(samples), partial(REINFORCE, kl=0.1))
    assert metrics["kl_reference"] > 1e-4


@pytest.mark.parametrize("kind", ["adamw", "muon", "lora"])
def test_a_loaded_checkpoint_makes_the_same_next_update(kind: str, tmp_path: Path) -> None:
    def fresh() -> Learner:
        settings: dict[str, Any] = {"schedule": "linear", "warmup_steps": 1}
        if kind == "lora":
            return learner(lora_model(tmp_path, dropout=0.3), **settings)
        return learner(kind=kind, **settings)

    samples = samples_of()
    unbroken = fresh()
    for _ in range(2):
        unbroken.forward_backward(samples, CLIPPED)
        unbroken.optim_step()
    unbroken.publish()
    unbroken.save(tmp_path / "step-2")
    # Nobody's randomness but the learner's own may matter.
    torch.manual_seed(99)
    resumed = fresh()
    resumed.load(tmp_path / "step-2")
    assert (resumed.step, resumed.version) == (2, 1)
    for one in (unbroken, resumed):
        one.forward_backward(samples, CLIPPED)
    wanted, got = unbroken.optim_step(), resumed.optim_step()
    assert got == wanted
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_checkpoint_is_a_model_directory_and_an_export_has_adapters_merged(tmp_path: Path) -> None:
    samples = samples_of()
    full = learner()
    full.forward_backward(samples, REINFORCE)
    full.optim_step()
    full.save(tmp_path / "full")
    adapted = learner(lora_model(tmp_path))
    adapted.forward_backward(samples, REINFORCE)
    adapted.optim_step()
    adapted.export(tmp_path / "merged")
    for trained, path in ((full, tmp_path / "full"), (adapted, tmp_path / "merged")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        again = learner(model.eval()).logprobs(samples)
        for ours, theirs in zip(trained.logprobs(samples), again, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert AutoTokenizer.from_pretrained(path).chat_template == tiny_tokenizer().chat_template
    adapted.export(tmp_path / "bf16", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16 and adapted.model.causal.dtype == torch.float32


def test_published_weights_load_under_the_checkpoints_names(tmp_path: Path) -> None:
    samples = samples_of()
    for trained, tied in (
        (learner(lora_model(tmp_path)), True),
        (learner(tiny_qwen3(hidden=32, tie=False)), False),
    ):
        trained.forward_backward(samples, REINFORCE)
        trained.optim_step()
        before = weights(trained)
        published = dict(trained.publish().tensors())
        target = tiny_qwen3(hidden=32, tie=tied, seed=1)
        missing, unexpected = target.load_state_dict(published, strict=False)
        assert (missing, unexpected) == ([] if not tied else ["lm_head.weight"], [])
        for ours, theirs in zip(trained.logprobs(samples), learner(target).logprobs(samples), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        torch.testing.assert_close(weights(trained), before, atol=0, rtol=0)


def test_a_broken_loss_is_refused_and_names_its_trajectories() -> None:
    samples = samples_of()
    broken = replace(samples[3], advantages_T=np.full_like(samples[3].advantages_T, np.nan))
    trained = learner(rows=BatchConfig(micro_tokens=32))
    before = weights(trained)
    with pytest.raises(NonFiniteError, match=r"1 of \d+ micro-batches, of trajectories t3; the update is"):
        trained.forward_backward([*samples[:3], broken], CLIPPED)
    with pytest.raises(LearnError, match="call forward_backward before optim_step"):
        trained.optim_step()
    torch.testing.assert_close(weights(trained), before, atol=0, rtol=0)


def test_a_broken_gradient_is_refused() -> None:
    trained = learner()
    trained.forward_backward(samples_of([9, 20]), CLIPPED)
    before = weights(trained)
    trained.model.trainable[0][1].grad.view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"trajectories t1, t0 is not finite"):
        trained.optim_step()
    assert trained.step == 0
    torch.testing.assert_close(weights(trained), before, atol=0, rtol=0)


def test_nothing_to_learn_from() -> None:
    sample = samples_of([9])[0]
    with pytest.raises(LearnError, match="leave the update out"):
        learner().forward_backward([replace(sample, loss_mask_T=np.zeros(9, dtype=np.bool_))], CLIPPED)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained = learner()
    trained.forward_backward(samples_of(), CLIPPED)
    trained.optim_step()
    trained.save(tmp_path / "c")
    with pytest.raises(LearnError, match="is no checkpoint to resume from"):
        learner().load(tmp_path)
    with pytest.raises(LearnError, match=r"made with optimizer\.kind='adamw'"):
        learner(kind="muon").load(tmp_path / "c")
    with pytest.raises(LearnError, match=r"restore model\.name and model\.lora"):
        learner(tiny_qwen3(hidden=32, layers=1)).load(tmp_path / "c")


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = learner()
    trained.save(tmp_path / "c")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        trained.step = 5
        with pytest.raises(StoreError, match="No space left on device"):
            trained.save(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    again = learner()
    again.load(tmp_path / "c")
    assert again.step == 0
