"""A tiny Qwen3-architecture model from nothing, with a tokenizer fitted to the text that it will read.

It is written as an ordinary Hugging Face model directory, so everything downstream treats it as any other
model. It exists so that the whole way from first traces to a better policy runs on a laptop in minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from turnwise.config import ScratchConfig

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Tags that are one token each but part of the text: a parser must see them when it decodes."""


def fit_tokenizer(
    texts: Iterable[str], *, vocab_size: int, keep_apart: Sequence[str], chat_template: str
) -> Any:
    """Fit a byte-level BPE tokenizer whose merges run over whole constant phrases.

    Digits, and each quoted word of ``keep_apart`` (what the policy chooses between, such as a tool's enum),
    are never merged with their surroundings: the text around a choice becomes a few long tokens, and the
    choice itself one token that the model can learn to place.

    Args:
        texts: Rendered conversations.
        vocab_size: At most; merges stop earlier where nothing is left to merge.
        keep_apart: Words that stay whole and alone.
        chat_template: Jinja text stored with the tokenizer.

    Returns:
        A ``PreTrainedTokenizerFast``.
    """
    from transformers import PreTrainedTokenizerFast

    words = "|".join(sorted({re.escape(word) for word in keep_apart if word}, key=len, reverse=True))
    # A choice stands between quotes in a call's JSON; a sign belongs to the choice of a number.
    apart = r"\d|-(?=\d)" + (rf"|(?<=\")(?:{words})(?=\")" if words else "")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(apart), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens(list(MARKERS))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    # Tags split the text at encoding; the merges must not be spent on phrases that run across them.
    tags = re.compile("|".join(re.escape(tag) for tag in (*SPECIALS, *MARKERS)))
    tokenizer.train_from_iterator((part for text in texts for part in tags.split(text)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def blank_tokenizer(chat_template: str) -> Any:
    """A tokenizer that renders ``chat_template`` to text and encodes nothing: for what there is to fit on."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = chat_template
    return tokenizer


def write_model(
    config: ScratchConfig, tokenizer: Any, directory: Path, *, max_context: int, seed: int
) -> None:
    """Write a randomly initialised model and its tokenizer as a model directory.

    Args:
        config: Sizes.
        tokenizer: From `fit_tokenizer`.
        directory: Made anew.
        max_context: Longest context the model is declared for, in tokens.
        seed: Of the initial weights.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=max_context,
                initializer_range=config.initializer_range,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
