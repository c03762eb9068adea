"""A model that says what a script tells it to, and nothing else: so that two trainers see the same episodes.

Its body is random. Its head is solved for: the hidden states of all positions that a reply's token follows
are linearly independent, so one matrix sends each of them to its token, with a margin that leaves sampling at
temperature 1 no choice. Nothing is trained, and the weights stay an ordinary Qwen3's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from tests.support.tokenizers import tiny_tokenizer, trl_template
from transformers import Qwen3Config, Qwen3ForCausalLM

MARGIN = 30.0
"""Between the logit of the token that is said and those of all others."""

Messages = Sequence[Mapping[str, Any]]


@cache
def _tokenizer() -> str:
    return str(tiny_tokenizer(trl_template("qwen2_5")).backend_tokenizer.to_str())


def tokenizer() -> Any:
    """Fresh each time, as trainers write on it. Its template is one that TRL knows, tools included."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer()), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip
    made.chat_template = trl_template("qwen2_5")
    return made


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*wanted: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": dict(given)}} for name, given in wanted
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def answers(name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": text}


def scripted_model(conversations: Sequence[Messages], tools: Sequence[Any] = ()) -> Qwen3ForCausalLM:
    """A model that, in any of these conversations, says each assistant's message as it stands.

    Args:
        conversations: Whole ones; what is said after other contexts is undefined.
        tools: Functions, told to the template as TRL tells them.
    """
    speaker = tokenizer()

    def ids(messages: Messages, ask: bool = False) -> list[int]:
        rendered = speaker.apply_chat_template(
            list(messages), tools=list(tools) or None, add_generation_prompt=ask
        )
        return list(rendered["input_ids"])

    wanted: dict[tuple[int, ...], int] = {}
    rows = []
    for messages in conversations:
        whole = ids(messages)
        rows.append(whole)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = ids(messages[:index], ask=True), ids(messages[: index + 1])
            assert after[: len(before)] == before, "the template is append-only"
            end = after.index(speaker.eos_token_id, len(before)) + 1
            for position in range(len(before), end):
                told = wanted.setdefault(tuple(after[:position]), after[position])
                assert told == after[position], f"two continuations of {speaker.decode(after[:position])!r}"
    model = _random_model(hidden=64 * (len(wanted) // 64 + 1))
    states, targets = [], []
    with torch.no_grad():
        for whole in rows:
            hidden = model.model(torch.tensor([whole])).last_hidden_state[0]
            for position in range(1, len(whole)):
                target = wanted.pop(tuple(whole[:position]), None)
                if target is not None:
                    states.append(hidden[position - 1])
                    targets.append(target)
    assert not wanted
    states_NH = torch.stack(states).double()
    logits_NV = torch.zeros(len(targets), model.config.vocab_size, dtype=torch.float64)
    logits_NV[torch.arange(len(targets)), torch.tensor(targets)] = MARGIN
    # The smallest matrix that does it: the least that kernels' rounding can be enlarged.
    head_HV = states_NH.T @ torch.linalg.solve(states_NH @ states_NH.T, logits_NV)
    assert float((states_NH @ head_HV - logits_NV).abs().max()) < 0.1
    model.lm_head.weight.data = head_HV.T.float().contiguous()
    return model


def _random_model(hidden: int, seed: int = 0) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        initializer_range=0.08, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()
