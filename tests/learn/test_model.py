"""Logprobs from packed rows, for families whose heads and attention differ."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.support.models import tiny_qwen3
from tests.support.samples import random_sample
from torch import nn

from turnwise.config import LoraConfig, ModelConfig
from turnwise.errors import LearnError, RecipeError
from turnwise.learn.batch import pack
from turnwise.learn.logprobs import token_logprobs
from turnwise.learn.model import PolicyModel, load_model
from turnwise.types import Sample

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def family(name: str, *, attention: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    config._attn_implementation = attention
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


def samples_of(lengths: list[int], *, temperature: float = 1.0) -> list[Sample]:
    rng = np.random.default_rng(3)
    return [random_sample(rng, n, id=f"t{i}", temperature=temperature) for i, n in enumerate(lengths)]


def alone(model: Any, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of one sample by the plain model: one row, whole log-softmax, in float64."""
    ids = torch.from_numpy(sample.token_ids_T).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double() / sample.temperature
    logprobs = logits[:-1].log_softmax(-1)
    mask = torch.from_numpy(sample.loss_mask_T)[1:]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[1:, None])[mask, 0], entropies[mask]


def packed(policy: PolicyModel, samples: list[Sample], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from packed rows, in the order of ``samples``."""
    settings = {"micro_tokens": 64, "row_tokens": 32, "together": policy.packs, **settings}
    logprobs, entropies = {}, {}
    for batch in pack(samples, **settings):
        lp, ent, _ = policy.logprobs(batch, chunk=5)
        document = torch.from_numpy(batch.documents_BT[batch.loss_mask_BT])
        for i, sample in enumerate(batch.samples):
            logprobs[sample.trajectory_id] = lp[document == i]
            entropies[sample.trajectory_id] = ent[document == i]
    return (
        torch.cat([logprobs[s.trajectory_id] for s in samples]),
        torch.cat([entropies[s.trajectory_id] for s in samples]),
    )


FAMILIES = {
    "qwen3": lambda: tiny_qwen3(hidden=32),
    "llama untied": lambda: family("Llama", tie_word_embeddings=False),
    "gemma2, capped": lambda: family(
        "Gemma2", attention="eager", head_dim=8, final_logit_softcapping=2.0, sliding_window=6
    ),
    "gemma3, capped": lambda: family("Gemma3Text", head_dim=8, final_logit_softcapping=2.0, sliding_window=6),
    "granite": lambda: family("Granite", logits_scaling=8.0, attention_multiplier=0.5),
    "cohere": lambda: family("Cohere", logit_scale=0.25),
    "mistral, sliding window": lambda: family("Mistral", sliding_window=4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_score_as_each_sample_alone(name: str) -> None:
    model = FAMILIES[name]()
    policy = PolicyModel(model)
    assert policy.packs and policy._head is not None
    samples = samples_of([9, 20, 5, 31, 12, 7, 40], temperature=0.7)
    wanted = [torch.cat(parts) for parts in zip(*(alone(model, s) for s in samples), strict=True)]
    got = packed(policy, samples)
    torch.testing.assert_close(got[0].double(), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), wanted[1], atol=1e-5, rtol=1e-5)
    # And the gradients, through recomputed chunks.
    got[0].sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted[0].sum().backward()
    for n, p in model.named_parameters():
        scale = max(1.0, float(p.grad.abs().max()))
        torch.testing.assert_close(ours[n] / scale, p.grad / scale, atol=1e-5, rtol=1e-4)


def test_a_head_that_is_not_known_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    class Doubling(transformers.Qwen3ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model = Doubling(tiny_qwen3(hidden=32).config).eval()
    with caplog.at_level(logging.WARNING):
        policy = PolicyModel(model)
    assert "does something to its logits that is not known here" in caplog.text
    samples = samples_of([9, 20, 5])
    wanted = torch.cat([alone(model, s)[0] for s in samples])
    torch.testing.assert_close(packed(policy, samples)[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_model_that_mixes_documents_gets_a_row_for_each(caplog: pytest.LogCaptureFixture) -> None:
    model = family("Lfm2", layer_types=["conv", "full_attention"])
    nn.init.normal_(model.model.layers[0].conv.conv.weight, std=1.0)
    with caplog.at_level(logging.WARNING):
        policy = PolicyModel(model)
    assert not policy.packs and "mixes documents" in caplog.text
    samples = samples_of([9, 20, 5])
    wanted = torch.cat([alone(model, s)[0] for s in samples])
    torch.testing.assert_close(packed(policy, samples)[0].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    head, targets = nn.Linear(8, 50), torch.randint(50, (7,))
    base = torch.randn(7, 8)

    def score(chunk: int) -> list[torch.Tensor]:
        hidden = base.clone().requires_grad_()
        head.zero_grad()
        logprobs, entropies, likeliest = token_logprobs(
            head, hidden, targets, None, chunk=chunk, accuracy=True
        )
        assert likeliest is not None
        (logprobs * torch.arange(7)).sum().backward()
        assert hidden.grad is not None and head.weight.grad is not None
        return [logprobs.detach(), entropies, hidden.grad, head.weight.grad.clone(), likeliest.float()]

    whole = head(base).log_softmax(-1)
    targets[2] = whole[2].argmax()
    torch.testing.assert_close(score(chunk)[0], whole.gather(-1, targets[:, None])[:, 0])
    assert score(chunk)[-1].tolist() == [0, 0, 1, 0, 0, 0, 0]
    torch.testing.assert_close(score(chunk), score(7))


def test_logits_exist_only_where_there_is_loss_and_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = PolicyModel(tiny_qwen3(hidden=32))
    (batch,) = pack(samples_of([30, 30]), micro_tokens=64)
    sizes: list[int] = []
    head = policy._head
    assert head is not None

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(policy, "_head", counting)
    with torch.no_grad():
        policy.logprobs(batch, chunk=3)
    assert sum(sizes) == int(batch.loss_mask_BT.sum()) < 60
    assert max(sizes) <= 3


def test_bfloat16_computes_over_float32_masters() -> None:
    policy = PolicyModel(tiny_qwen3(hidden=32), compute_dtype=torch.bfloat16)
    samples = samples_of([20, 20])
    exact = packed(PolicyModel(tiny_qwen3(hidden=32)), samples)[0]
    rough = packed(policy, samples)[0]
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    gap = float((rough - exact).abs().max())
    assert 1e-6 < gap < 0.3
    rough.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.module.parameters())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_masters_are_float32_and_as_they_were_stored(stored: torch.dtype, tmp_path: Path) -> None:
    model = tiny_qwen3(hidden=32).to(stored)
    model.save_pretrained(tmp_path)
    policy = load_model(ModelConfig(name=str(tmp_path), dtype="bfloat16"), device="cpu")
    assert policy.compute_dtype == torch.bfloat16
    for mine, theirs in zip(policy.module.parameters(), model.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float())


def test_a_recipe_says_where_a_model_is_trained(tmp_path: Path) -> None:
    tiny_qwen3(hidden=32).save_pretrained(tmp_path)
    policy = load_model(ModelConfig(name=str(tmp_path), device="cpu:0"))
    assert policy.device == torch.device("cpu", 0)


def test_dropout_of_the_model_is_off_and_that_of_adapters_on() -> None:
    import peft

    model = family("Llama", attention_dropout=0.5)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    policy = PolicyModel(lora)
    assert policy.has_dropout
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.0}
    assert not PolicyModel(family("Llama", attention_dropout=0.5)).has_dropout


def test_training_mode_scores_the_policy_that_sampled() -> None:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
    config = transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, **drops)
    policy = PolicyModel(transformers.GPT2LMHeadModel(config))
    samples = samples_of([20, 12])
    wanted = packed(policy, samples)[0]
    policy.checkpoint_activations()
    policy.training_mode(True)
    assert policy.module.training
    torch.testing.assert_close(packed(policy, samples)[0], wanted)


def test_gradient_checkpointing_changes_nothing() -> None:
    samples = samples_of([20, 12])
    grads = []
    for on in (False, True):
        policy = PolicyModel(tiny_qwen3(hidden=32))
        if on:
            policy.checkpoint_activations()
        policy.training_mode(True)
        packed(policy, samples)[0].sum().backward()
        assert policy.module.training is on
        grads.append([p.grad for _, p in policy.trainable])
    torch.testing.assert_close(grads[0], grads[1])


def test_load_model_refuses(tmp_path: Any) -> None:
    with pytest.raises(LearnError, match="cannot be loaded"):
        load_model(ModelConfig(name=str(tmp_path / "none")), device="cpu")
    with pytest.raises(RecipeError, match="use bfloat16 or float32"):
        load_model(ModelConfig(name="x", dtype="float16"), device="cpu")
    tiny_qwen3(hidden=32).save_pretrained(tmp_path)
    with pytest.raises(LearnError, match="no adapters can be put"):
        load_model(ModelConfig(name=str(tmp_path), lora=LoraConfig(target_modules=["nowhere"])), device="cpu")


def test_images_are_refused_by_name() -> None:
    sample = replace(samples_of([9])[0], images=("ab" * 32,))
    with pytest.raises(LearnError, match="t0 has images"):
        PolicyModel(tiny_qwen3(hidden=32)).logprobs(pack([sample], micro_tokens=16)[0], chunk=8)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_a_tied_end_are_refused(target: str, tmp_path: Path) -> None:
    """Merged into the matrix that both share, they would move what they are not on."""
    for tie in (True, False):
        tiny_qwen3(hidden=32, tie=tie).save_pretrained(tmp_path / "base")
        config = ModelConfig(name=str(tmp_path / "base"), lora=LoraConfig(target_modules=["q_proj", target]))
        if tie:
            with pytest.raises(RecipeError, match="on embeddings that are tied to the head"):
                load_model(config, device="cpu")
        else:
            assert load_model(config, device="cpu").lora
