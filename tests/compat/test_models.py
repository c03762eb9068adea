"""Models by name, as they are, with adapters; what cannot be trained is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.compat.trainers import model, trainer, weights
from tests.support.tokenizers import tiny_tokenizer
from turnwise.compat.models import load_policy
from turnwise.errors import LearnError, RecipeError

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model directory with its tokenizer."""
    path = tmp_path / "tiny"
    model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def test_a_model_by_path_brings_its_tokenizer(saved: str, tmp_path: Path) -> None:
    made = trainer(tmp_path / "out", given=saved, processing_class=None, max_steps=1)
    made.train()
    assert made.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert made.plan.recipe.model.name == saved


def test_adapters_are_trained_and_saved_as_adapters(saved: str, tmp_path: Path) -> None:
    made = trainer(
        tmp_path / "out", given=saved, peft_config=LORA, max_steps=2, save_strategy="steps", save_steps=1
    )
    base = {name: tensor for name, tensor in weights(made.model).items() if "lora" not in name}
    made.train()
    assert isinstance(made.model, peft.PeftModel)
    moved = weights(made.model)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in base.items()), "only adapters move"
    assert any(float(moved[name].abs().max()) > 0 for name in moved if "lora_B" in name)
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved), tmp_path / "out" / "checkpoint-2"
    )
    assert all(torch.allclose(tensor, moved[name]) for name, tensor in weights(again).items())


def test_adapters_of_one_seed_are_the_same(saved: str) -> None:
    first, second = (weights(load_policy(saved, peft_config=LORA, seed=3)) for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_adapters_that_are_trained_further_are_their_own_reference(saved: str, tmp_path: Path) -> None:
    adapted: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), LORA)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made = trainer(tmp_path / "out", given=adapted, processing_class=tiny_tokenizer(), beta=0.1, max_steps=1)
    made.train()
    assert made.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6), "nothing has moved before the first"


def test_what_does_not_go_together_is_refused(saved: str, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(RecipeError, match="model_init_kwargs is for a model that the trainer loads by name"):
        load_policy(loaded, init_kwargs={"dtype": "float32"})
    with pytest.raises(RecipeError, match="the model has adapters already"):
        load_policy(peft.get_peft_model(loaded, LORA), peft_config=LORA)
    with pytest.raises(RecipeError, match="peft_config is a config of peft"):
        load_policy(saved, peft_config={"r": 4})
    with pytest.raises(LearnError, match="cannot be loaded"):
        load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="4 bits cannot be trained themselves: add adapters"):
        load_policy(saved, quantization_config=FOUR_BITS)
    with pytest.raises(RecipeError, match=r"by bitsandbytes in 8 bits.*load_in_4bit=True"):
        load_policy(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True), peft_config=LORA)
    as_dict = {"quantization_config": {"load_in_4bit": True}}
    assert hasattr(load_policy(saved, init_kwargs=as_dict, peft_config=LORA), "peft_config")
    with pytest.raises(RecipeError, match="the adapters are LoRA with lora_bias"):
        load_policy(saved, peft_config=peft.LoraConfig(**LORA.to_dict() | {"lora_bias": True}))
    with pytest.raises(RecipeError, match="quantization_config is given twice"):
        load_policy(saved, quantization_config=FOUR_BITS, init_kwargs={"quantization_config": FOUR_BITS})


@pytest.mark.parametrize("live", [False, True], ids=["by name", "live"])
def test_adapters_over_4_bits_are_trained_and_played(saved: str, tmp_path: Path, live: bool) -> None:
    own: dict[str, Any] = {"given": saved, "quantization_config": FOUR_BITS}
    if live:
        own = {"given": AutoModelForCausalLM.from_pretrained(saved, quantization_config=FOUR_BITS)}
        own["processing_class"] = tiny_tokenizer()
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
    made = trainer(tmp_path / "out", peft_config=LORA, **own, **settings)
    before = weights(made.model)
    made.train()
    for line in made.state.log_history[:-1]:
        assert line["mismatch_max"] < 1e-3, "what played is what was trained"
    assert made.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    moved = {name for name, one in weights(made.model).items() if not torch.equal(one, before[name])}
    assert moved and all("lora_" in name for name in moved)
    made.save_model(str(tmp_path / "adapters"))
    base = AutoModelForCausalLM.from_pretrained(saved, quantization_config=FOUR_BITS)
    again = weights(peft.PeftModel.from_pretrained(base, tmp_path / "adapters"))
    assert all(torch.equal(again[name], one) for name, one in weights(made.model).items() if "lora_" in name)
    more = trainer(tmp_path / "out", peft_config=LORA, **own, **settings | {"max_steps": 3})
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 3


def test_init_kwargs_reach_from_pretrained(saved: str) -> None:
    assert (
        load_policy(saved, init_kwargs={"attn_implementation": "eager"}).config._attn_implementation
        == "eager"
    )
    assert load_policy(saved).dtype == torch.float32


def test_a_tokenizer_is_a_tokenizer(saved: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="processing_class is a tokenizer or a processor; found str"):
        trainer(tmp_path / "out", given=saved, processing_class="tiny")
    own = AutoTokenizer.from_pretrained(saved)
    assert trainer(tmp_path / "out", given=saved, processing_class=own).processing_class is own
