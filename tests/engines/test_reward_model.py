"""Sequence classifiers as rewards: the logit of each text, however many are asked about at one time."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tests.support.tokenizers import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from turnwise.compat.rewards import Board, reward_functions
from turnwise.engines import reward_model
from turnwise.engines.reward_model import RewardModel
from turnwise.errors import EnvLostError

CHATS = [
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": said}]
    for said in ("4", "I do not know, ask somebody else who does.", "5")
]


def classifier(seed: int = 0) -> Qwen3ForSequenceClassification:
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForSequenceClassification(config).eval()


def alone(model, text: str) -> float:
    """The logit of a lone text, which needs no padding."""
    ids = tiny_tokenizer()(text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        return model(**ids).logits[0, 0].item()


@pytest.fixture
def saved(tmp_path):
    classifier().save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


def test_each_text_has_the_logit_that_it_has_alone(monkeypatch):
    monkeypatch.setattr(reward_model, "ROWS", 2)
    model = classifier()
    judge = RewardModel(model, tokenizer=tiny_tokenizer())
    texts = ["short", "a text that is a good deal longer than the others are", "of middling length"]
    expected = [alone(model, text) for text in texts]
    assert len({round(one, 3) for one in expected}) == 3
    assert judge.score(texts) == pytest.approx(expected, abs=1e-5)
    assert judge.score([]) == []


def test_conversations_go_through_the_models_own_template():
    model, tokenizer = classifier(), tiny_tokenizer()
    expected = [alone(model, tokenizer.apply_chat_template(chat, tokenize=False)) for chat in CHATS]
    assert RewardModel(model, tokenizer=tokenizer).score(CHATS) == pytest.approx(expected, abs=1e-5)
    plain = RewardModel(
        model,
        tokenizer=tokenizer,
        template_kwargs={"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    )
    assert plain.score(CHATS[:1]) == pytest.approx([alone(model, "2+2?4")], abs=1e-5)


def test_a_name_is_loaded_once_and_not_before_it_is_asked(saved, monkeypatch):
    loads = []
    load = RewardModel._load
    monkeypatch.setattr(RewardModel, "_load", lambda self: (loads.append(1), load(self)))
    [function] = reward_functions(saved, weights=[2.0], board=Board())
    assert (function.name, function.weight, loads) == ("judge", 2.0, [])
    prompts, completions = [chat[:1] for chat in CHATS], [chat[1:] for chat in CHATS]
    expected = RewardModel(classifier(), tokenizer=tiny_tokenizer()).score(CHATS)
    loads.clear()
    found: dict[int, list[float]] = {}

    def ask(number: int) -> None:
        found[number] = function.function(prompts=prompts, completions=completions)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]
    assert all(scores == pytest.approx(expected, abs=1e-5) for scores in found.values()) and len(found) == 4


@pytest.mark.parametrize("plain", [False, True])
def test_scores_are_those_of_the_installed_trl(plain):
    """The referee is ``GRPOTrainer._calculate_rewards`` itself."""
    from trl import GRPOTrainer

    model, tokenizer = classifier(3), tiny_tokenizer()
    model.config._name_or_path = "org/judge"
    prompts = ["2+2? "] * 3 if plain else [chat[:1] for chat in CHATS]
    completions = ["4", "five", "a longer answer"] if plain else [chat[1:] for chat in CHATS]
    [function] = reward_functions(model, weights=None, board=Board(), reward_processing=tokenizer)
    assert function.name == "judge"
    ours = function.function(prompts=prompts, completions=completions, completion_ids=[[1]] * 3)

    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    class Trainer(GRPOTrainer):
        def __init__(self) -> None:
            self.accelerator = SimpleNamespace(device="cpu", is_main_process=False)
            self.args = SimpleNamespace(report_to=[])
            self.state, self.environments = SimpleNamespace(global_step=0), None
            self.chat_template_kwargs = {}
            self.reward_funcs, self.reward_processing_classes = [model], [tokenizer]
            self.reward_func_names = ["judge"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.Trainer._prepare_inputs", lambda self, inputs: inputs)
        theirs = Trainer()._calculate_rewards([{}] * 3, prompts, completions, [[1]] * 3)
    assert ours == pytest.approx(theirs[:, 0].tolist(), abs=1e-6)


def test_a_model_that_cannot_be_loaded_is_no_completions_fault(tmp_path):
    with pytest.raises(EnvLostError, match=r"reward model .*nothing"):
        RewardModel(str(tmp_path / "nothing")).score(["x"])
