"""Both forwards compute the plain model's logits, and a forward that does not is found out."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import tiny_qwen3
from transformers import LlamaConfig, LlamaForCausalLM

from turnwise.engines import forward as forwards
from turnwise.engines.forward import HfForward, build_forward
from turnwise.engines.kv import LENGTH_BUCKET, SlotCache
from turnwise.engines.lean import LeanForward
from turnwise.errors import EngineError

CONTEXT = 64


def biased_llama() -> torch.nn.Module:
    """Every linear has a bias, and rotary scaling is not the default."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@torch.inference_mode()
def slots_logits(
    model: Any, forward: Any, geometry: Any, rows: list[list[int]], slots: list[int]
) -> list[torch.Tensor]:
    """Logits of each row, all rows at once: all but their last five tokens in one step, those one by one."""
    cache = SlotCache(geometry, slots=9, context=CONTEXT, dtype=torch.float32, device=torch.device("cpu"))
    starts = [len(row) - 5 for row in rows]
    nobody = np.empty(0, dtype=np.int64)
    ids = np.concatenate([row[:start] for row, start in zip(rows, starts, strict=True)])
    step = cache.plan(
        decode_slots=nobody,
        decode_positions=nobody,
        chunks=[(slot, 0, start) for slot, start in zip(slots, starts, strict=True)],
        token_ids=ids,
        outputs=np.arange(len(ids)),
    )
    found = [[part] for part in forward(step, cache).split(starts)]
    for n in range(5):
        step = cache.plan(
            decode_slots=np.array(slots),
            decode_positions=np.array(starts) + n,
            chunks=[],
            token_ids=np.array([row[start + n] for row, start in zip(rows, starts, strict=True)]),
            outputs=np.arange(len(rows)),
        )
        for parts, logits in zip(found, forward(step, cache), strict=True):
            parts.append(logits[None])
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("make", [tiny_qwen3, biased_llama])
@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2, 3], [1, 4, 8]])
def test_logits_equal_the_plain_models(make: Any, slots: list[int]) -> None:
    """In neighbouring slots, with a hole, and far apart: one window, a bridged one, or several."""
    model = make()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 200, n).tolist() for n in (6, 40, 17)]
    adopted = copy.deepcopy(model)
    lean, geometry = build_forward(adopted, CONTEXT)
    assert isinstance(lean, LeanForward)
    for forward in (lean, HfForward(adopted)):
        for row, logits in zip(rows, slots_logits(adopted, forward, geometry, rows, slots), strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_the_fused_weights_are_the_modules_own() -> None:
    model = tiny_qwen3()
    lean, _ = build_forward(model, CONTEXT)
    assert isinstance(lean, LeanForward)
    layer = model.model.layers[1].self_attn
    assert layer.k_proj.weight.data_ptr() == lean._layers[1].qkv[64:].data_ptr()
    assert layer.k_proj.weight.shape == (32, 64)
    # The module still computes what it did, and saves what it did.
    assert [*model.state_dict()] == [*tiny_qwen3().state_dict()]
    for name, tensor in tiny_qwen3().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_windows_cover_what_decodes() -> None:
    geometry = forwards.Geometry(layers=1, kv_heads=1, head_dim=4)
    cache = SlotCache(geometry, slots=64, context=512, dtype=torch.float32, device=torch.device("cpu"))
    slots = np.array([0, 1, 2, 4, 30, 31], dtype=np.int64)
    lengths = np.array([100, 90, 80, 70, 300, 17], dtype=np.int64)
    windows = cache._windows(slots, lengths)
    assert [(w.first, w.last, w.row, w.rows) for w in windows] == [(0, 5, 0, 4), (30, 32, 4, 2)]
    assert [w.length for w in windows] == [112, 304]
    assert all(w.length % LENGTH_BUCKET == 0 for w in windows)
    assert windows[0].lengths.tolist() == [100, 90, 80, 1, 70]
    assert windows[0].offsets is not None
    assert windows[0].offsets.tolist() == [0, 1, 2, 4]
    assert windows[1].offsets is None


def test_a_lean_forward_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: LeanForward, *args: Any) -> None:
        init(self, *args)
        self._scale *= 1.1

    init = LeanForward.__init__
    monkeypatch.setattr(LeanForward, "__init__", wrong)
    with caplog.at_level(logging.WARNING):
        forward, _ = build_forward(tiny_qwen3(), CONTEXT)
    assert isinstance(forward, HfForward)
    assert "the lean forward differs from Qwen3ForCausalLM" in caplog.text


def test_a_model_with_state_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for one that mixes tokens outside of attention: here, each token into the next."""
    model = tiny_qwen3()
    embed = model.model.embed_tokens
    original = type(embed).forward

    def mixing(self: Any, ids: torch.Tensor) -> torch.Tensor:
        out = original(self, ids)
        return out + out.roll(1, dims=-2)

    monkeypatch.setattr(type(embed), "forward", mixing)
    with pytest.raises(EngineError, match="answers differently over KV slots"):
        build_forward(model, CONTEXT)


def test_rotary_scaling_that_depends_on_the_batch_is_refused() -> None:
    model = tiny_qwen3()
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(EngineError, match="uses dynamic rotary scaling"):
        build_forward(model, CONTEXT)
