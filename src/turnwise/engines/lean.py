"""A leaner forward for Llama-like decoders (Llama, Qwen2, Qwen3): the same sums in fewer calls.

Calls are what a small model's step costs on CPU, and what any model's step costs in front of a GPU. Queries,
keys and values are one product, gate and up another, queries and keys are normed and rotated together. The
fused matrices *are* the module's weights: its parameters become views of them, so that there is one set of
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from turnwise.engines.kv import Geometry, SlotCache, Step

FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Exactly these classes: a subclass may compute something else."""


@dataclass(slots=True, kw_only=True)
class _Layer:
    """One decoder layer's weights."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """``[heads + kv_heads, head_dim]``: norm weights of each head of queries and keys, where the family has
    them."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    sliding_window: int | None


class LeanForward:
    """Computes steps of a Llama-like model from its module's own weights."""

    def __init__(self, model: Any, geometry: Geometry, context: int) -> None:
        config, decoder = model.config, model.model
        self._geometry = geometry
        self._heads: int = config.num_attention_heads
        self._scale = float(decoder.layers[0].self_attn.scaling)
        self._eps = torch.tensor(config.rms_norm_eps)
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._norm: Tensor = decoder.norm.weight
        self._head: Tensor = model.lm_head.weight
        self._layers = [self._layer(layer) for layer in decoder.layers]
        self._rotary = _rotary_table(decoder, context)
        self.refresh()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is of a family that this forward computes."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            type(model) in FAMILIES
            and config.hidden_act == "silu"
            and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        )

    def refresh(self) -> None:
        """The module's weights have changed: make anew what is derived from them."""
        g = self._geometry
        for layer in self._layers:
            if layer.q_norm is not None and layer.k_norm is not None:
                layer.qk_norm = torch.cat(
                    [layer.q_norm.expand(self._heads, -1), layer.k_norm.expand(g.kv_heads, -1)]
                )

    def __call__(self, step: Step, cache: SlotCache) -> Tensor:
        """Logits ``[R, vocabulary]`` of the rows in ``step.outputs``."""
        g, eps, heads = self._geometry, self._eps, self._heads
        rotated, width = heads + g.kv_heads, g.head_dim
        tokens = len(step.token_ids)
        hidden = F.embedding(step.token_ids, self._embedding)
        rotary = self._rotary.index_select(0, step.positions)
        cos, sin = rotary[:, 0, None], rotary[:, 1, None]
        every = len(step.outputs) == tokens
        last = g.layers - 1
        for index, layer in enumerate(self._layers):
            normed = _rms_norm(hidden, layer.attention_norm, eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(tokens, -1, width)
            qk = qkv[:, :rotated]
            unrotated = qk if layer.qk_norm is None else _rms_norm(qk, layer.qk_norm, eps)
            torch.addcmul(unrotated * cos, unrotated.roll(width // 2, -1), sin, out=qk)
            cache.store(index, qkv[:, heads:], step)
            attended = cache.attend(
                index, qkv[:, :heads], step, scale=self._scale, sliding_window=layer.sliding_window
            )
            if index == last and not every:
                # Nobody reads the other rows any more.
                attended, hidden = attended[step.outputs], hidden[step.outputs]
            hidden = _linear_onto(hidden, attended, layer.out, layer.out_bias)
            normed = _rms_norm(hidden, layer.mlp_norm, eps)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            hidden = _linear_onto(hidden, F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return F.linear(_rms_norm(hidden, self._norm, eps), self._head)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up, gate_up_bias = _fuse(mlp.gate_proj, mlp.up_proj)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return _Layer(
            attention_norm=layer.input_layernorm.weight,
            qkv=qkv,
            qkv_bias=qkv_bias,
            qk_norm=None,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            out=attention.o_proj.weight,
            out_bias=attention.o_proj.bias,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=mlp.down_proj.weight,
            down_bias=mlp.down_proj.bias,
            sliding_window=getattr(attention, "sliding_window", None),
        )


def _rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Over the last axis; ``weight`` may have a row for each head.

    On CPU `F.rms_norm` is a composite of more calls than this; in half precision it sums in single, as it
    must.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale: Tensor = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight)
    return F.rms_norm(x, x.shape[-1:], None, float(eps)) * weight


def _linear_onto(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``residual + x @ weight.T + bias`` in one call."""
    out = torch.addmm(residual, x, weight.t())
    return out if bias is None else out.add_(bias)


def _fuse(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One matrix (and bias) for several products of one input; the modules' parameters become views of it."""
    weight = torch.cat([linear.weight.data for linear in linears])
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight.data = weight[start:stop]
        if bias is not None:
            linear.bias.data = bias[start:stop]
        start = stop
    return weight, bias


def _rotary_table(decoder: Any, context: int) -> Tensor:
    """``[context, 2, head_dim]``: cosines, and sines with the sign of the half that they turn."""
    device = decoder.embed_tokens.weight.device
    example = torch.zeros(1, 1, dtype=decoder.embed_tokens.weight.dtype, device=device)
    cos, sin = decoder.rotary_emb(example, torch.arange(context, device=device)[None])
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return torch.stack([cos[0], signed[0]], dim=1)
