"""Adapters over weights in 4 bits: one model that is trained, played and written."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.learn.test_learner import REINFORCE, learner, samples_of, weights
from tests.support.models import tiny_qwen3
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3ForCausalLM,
)

from turnwise.config import LoraConfig, ModelConfig
from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import LearnError, RecipeError
from turnwise.learn.learner import Learner
from turnwise.learn.model import PolicyModel, load_model
from turnwise.learn.quantized import matrices, unquantized, widened
from turnwise.learn.weights import LiveWeights
from turnwise.types import Sampling


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_qwen3(hidden=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bits(base: Path, kind: str = "nf4", *, seed: int = 0, **lora: Any) -> PolicyModel:
    config = ModelConfig(name=str(base), lora=LoraConfig(**{"r": 4, **lora}), quantization=kind)
    return load_model(config, device="cpu", seed=seed)


def trained(base: Path, kind: str = "nf4", *, updates: int = 2, **lora: Any) -> Learner:
    one = learner(four_bits(base, kind, **lora))
    for _ in range(updates):
        one.forward_backward(samples_of(), REINFORCE)
        one.optim_step()
    return one


def plain(weights_of: Learner) -> Qwen3ForCausalLM:
    """A model that never was quantized, with the weights that engines are given."""
    model = tiny_qwen3(hidden=64, seed=1)
    given = dict(weights_of.publish().tensors())
    missing, unknown = model.load_state_dict(given, strict=False)
    assert missing == ["lm_head.weight"] and not unknown  # It is tied.
    assert all(tensor.dtype == torch.float32 for tensor in given.values())
    return model.eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_what_engines_are_given_is_what_is_trained(base: Path, kind: str, targets: Any) -> None:
    ours = trained(base, kind, target_modules=targets)
    four = matrices(ours.model.causal)
    assert len(four) == 14 and {one.weight.dtype for one in four.values()} == {torch.uint8}
    samples = samples_of()
    for mine, theirs in zip(ours.logprobs(samples), learner(plain(ours)).logprobs(samples), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    original = learner(tiny_qwen3(hidden=64)).logprobs(samples)
    assert (
        max(float(np.abs(a - b).max()) for a, b in zip(ours.logprobs(samples), original, strict=True)) > 0.1
    )


def test_the_bits_stay_and_the_adapters_learn(base: Path) -> None:
    before, after = four_bits(base), trained(base).model
    for name, layer in matrices(before.causal).items():
        assert torch.equal(widened(layer), widened(matrices(after.causal)[name])), name
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in after.trainable)
    fresh = dict(before.trainable)
    moved = [name for name, p in after.trainable if not torch.equal(p, fresh[name])]
    assert len(moved) == len(fresh), "a gradient was lost in a matrix of 4 bits"


def test_gradients_are_those_of_adapters_over_the_same_weights_whole(base: Path) -> None:
    """Also after scoring without gradients, where bitsandbytes repacks weights on some processors."""
    from peft import LoraConfig as Adapters
    from peft import get_peft_model

    ours = learner(four_bits(base))
    ours.logprobs(samples_of())
    whole = plain(ours)
    torch.manual_seed(0)
    adapters = Adapters(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = learner(PolicyModel(get_peft_model(whole, adapters)))
    for one in (ours, theirs):
        one.forward_backward(samples_of(), REINFORCE)
    wanted = {name: p.grad for name, p in theirs.model.trainable}
    for name, p in ours.model.trainable:
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-4)
    assert max(float(p.grad.abs().max()) for _, p in ours.model.trainable if p.grad is not None) > 1e-3


def test_the_reference_is_the_model_without_adapters(base: Path) -> None:
    samples = samples_of()
    start = trained(base, updates=0).logprobs(samples)
    ours = trained(base)
    for mine, theirs in zip(ours.logprobs(samples, reference=True), start, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    metrics = ours.forward_backward(ours.with_reference(samples), partial(REINFORCE, kl=0.1))
    assert metrics["kl_reference"] > 1e-4


def test_a_loaded_checkpoint_makes_the_same_next_update(base: Path, tmp_path: Path) -> None:
    unbroken = trained(base, dropout=0.3)
    unbroken.save(tmp_path / "step-2")
    assert sum(file.stat().st_size for file in (tmp_path / "step-2").glob("*.safetensors")) < 60_000
    resumed = learner(four_bits(base, dropout=0.3, seed=5))
    resumed.load(tmp_path / "step-2")
    for one in (unbroken, resumed):
        one.forward_backward(samples_of(), REINFORCE)
        one.optim_step()
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_is_an_ordinary_model(base: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    ours = trained(base)
    ours.export(tmp_path / "whole", dtype=dtype)
    assert "quantization" not in (tmp_path / "whole" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.dtype == (dtype or torch.float32) and not matrices(model)
    samples = samples_of()
    again = learner(model.float().eval()).logprobs(samples)
    for mine, theirs in zip(ours.logprobs(samples), again, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 if dtype is None else 0.2)
    # The run goes on: what was written was a copy.
    ours.forward_backward(samples, REINFORCE)
    ours.optim_step()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_whole_model_around_its_weights(tmp_path: Path, tie: bool, adapted: bool) -> None:
    tiny_qwen3(hidden=64, tie=tie).save_pretrained(tmp_path / "base")
    if adapted:
        module = four_bits(tmp_path / "base").module
        causal = module.get_base_model()
    else:
        module = causal = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        for layer in matrices(causal).values():
            layer.support_avx512bf16_for_cpu = False
    view: Any = SimpleNamespace(causal=causal, lora=adapted)
    whole = unquantized(module, dict(LiveWeights(view).tensors()))
    assert type(whole) is Qwen3ForCausalLM and not whole.training
    assert {type(part) for name, part in whole.named_modules() if name.endswith("_proj")} == {nn.Linear}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, causal(ids).logits, atol=1e-4, rtol=1e-4)
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tie
    whole.to(torch.bfloat16)  # A quantized one would refuse.
    weights = dict(LiveWeights(view).tensors())
    del weights["model.norm.weight"]
    with pytest.raises(LearnError, match=r"lacks model\.norm\.weight"):
        unquantized(module, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_the_type_that_weights_came_in_changes_nothing(
    base: Path, dtype: torch.dtype, storage: str, tmp_path: Path
) -> None:
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_storage=storage, bnb_4bit_compute_dtype=torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=bits)
    model = load_model(ModelConfig(name=str(base), lora=LoraConfig(r=4)), module=loaded, device="cpu")
    ours = learner(model)
    for mine, theirs in zip(
        ours.logprobs(samples_of()), learner(plain(ours)).logprobs(samples_of()), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_how_a_model_generates_is_exported_too(base: Path, tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=[1, 2], temperature=0.6, do_sample=True).save_pretrained(base)
    trained(base).export(tmp_path / "whole")
    found = GenerationConfig.from_pretrained(tmp_path / "whole")
    assert (found.eos_token_id, found.temperature) == ([1, 2], 0.6)


@pytest.mark.parametrize("eight", [False, True], ids=["4 bits", "8 bits"])
def test_a_model_that_was_saved_quantized_is_played_whole(base: Path, tmp_path: Path, eight: bool) -> None:
    config = BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=not eight)
    bits = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    bits.save_pretrained(tmp_path / "bits")

    async def greedy() -> list[int]:
        async with await TransformersEngine.load(
            str(tmp_path / "bits"), dtype="float32", device="cpu", max_context=64
        ) as engine:
            return list((await engine.generate([1, 2, 3], Sampling(temperature=0.0, max_tokens=8))).ids)

    whole = bits.dequantize(dtype=torch.float32).generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False
    )
    assert asyncio.run(greedy()) == whole[0, 3:].tolist()
    named = ModelConfig(name=str(tmp_path / "bits"), lora=LoraConfig(), quantization="nf4")
    with pytest.raises(RecipeError, match=r"is nf4, and the model was saved quantized, by bitsandbytes"):
        load_model(named, device="cpu")
    alone = named.model_copy(update={"quantization": None})
    if eight:
        with pytest.raises(RecipeError, match=r"quantized by bitsandbytes in 8 bits.*with whole weights"):
            load_model(alone, device="cpu")
    else:
        assert len(matrices(load_model(alone, device="cpu").causal)) == 14


def test_what_cannot_be_trained_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be trained themselves: add adapters"):
        load_model(ModelConfig(name=str(base), quantization="nf4"), device="cpu")
    eight = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    adapted = ModelConfig(name=str(base), lora=LoraConfig())
    with pytest.raises(RecipeError, match=r"quantized by bitsandbytes in 8 bits.*load_in_4bit=True"):
        load_model(adapted, module=eight, device="cpu")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=1, n_head=4))
    gpt2.save_pretrained(tmp_path / "gpt2")
    transposed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt2", dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(RecipeError, match="the matrices of GPT2LMHeadModel are transposed"):
        load_model(adapted, module=transposed, device="cpu")
    tied = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
    head = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=tied)
    with pytest.raises(RecipeError, match="add 'lm_head' to llm_int8_skip_modules"):
        load_model(adapted, module=head, device="cpu")
