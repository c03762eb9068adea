"""Random Qwen3 models, built in milliseconds: real architecture, no download."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_qwen3(
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int | None = None,
    vocab: int = 512,
    max_positions: int = 4096,
    seed: int = 0,
    tie: bool = True,
) -> Qwen3ForCausalLM:
    """A random Qwen3 in fp32 and eval mode; the same seed makes the same weights, whatever was drawn before.

    The initialisation is wide (0.08): greedy choices lie far apart, and a wrong mask changes tokens.
    """
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn if ffn is not None else 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        initializer_range=0.08,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return model.eval()


def qwen3_1m(*, seed: int = 0) -> Qwen3ForCausalLM:
    """About one million parameters: the model that the benchmarks' numbers are about."""
    return tiny_qwen3(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, vocab=2048, seed=seed)
