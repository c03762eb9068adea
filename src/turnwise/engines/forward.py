"""The model call behind one small interface: a packed `Step` and the KV cache in, logits out.

`HfForward` calls any transformers model whose attention goes through transformers' ``AttentionInterface``,
with an attention function of ours that reads and writes the slots. `turnwise.engines.lean` is a leaner one
for some families. Neither is believed before `check` has seen it agree with the plain model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from turnwise.engines.kv import Geometry, SlotCache, Step
from turnwise.engines.lean import LeanForward
from turnwise.engines.vision import ImageProbe, VisionForward
from turnwise.errors import EngineError, boundary

_log = logging.getLogger(__name__)

ATTENTION = "turnwise_slots"
"""Name of our attention function among transformers' attention implementations."""

_PROBE_TOKENS = 24
_PROBE_KEPT = 15
"""The probe runs whole and cut in two here, so that the second part must read what the first has stored."""


class Forward(Protocol):
    """Computes a step: stores the KV of all of its tokens and returns the logits that it asks for."""

    def __call__(self, step: Step, cache: SlotCache) -> Tensor:
        """Logits ``[R, vocabulary]`` of the rows in ``step.outputs``."""
        ...

    def refresh(self) -> None:
        """The module's weights have changed, in place."""
        ...


class HfForward:
    """The transformers module itself."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.geometry = _measure(model)

    def __call__(self, step: Step, cache: SlotCache) -> Tensor:
        """Logits of the wanted rows."""
        logits: Tensor = self._model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.outputs,
            turnwise_step=step,
            turnwise_cache=cache,
        ).logits
        return logits[0]

    def refresh(self) -> None:
        """Nothing to do: the module reads its own weights."""


def build_forward(model: Any, context: int) -> tuple[Forward, Geometry]:
    """Route the model's attention to KV slots, for good, and prove that its answers stay what they were.

    Args:
        model: Whose parameters may be laid out anew.
        context: Positions that will be used.

    Raises:
        EngineError: The model does not use transformers' attention interface, or does what the slots
            cannot follow.
    """
    _refuse_unfit(model)
    sees = VisionForward.fits(model)
    probe = ImageProbe(model) if sees else None
    _set_attention(model, "eager", sees)
    reference = _reference_logits(model)
    shown = None if probe is None else probe.reference()
    _set_attention(model, ATTENTION, sees)
    plain = HfForward(model)
    forward, geometry = VisionForward(model) if sees else plain, plain.geometry
    with _explained(model):
        difference = check(forward, model, geometry, reference)
        if probe is not None and shown is not None and isinstance(forward, VisionForward):
            difference = max(difference, probe.check(forward, geometry, shown))
    if not difference <= tolerance(reference.dtype):
        raise EngineError(
            f"{type(model).__name__} answers differently over KV slots (by {difference:.2g} of its logits' "
            "spread): it keeps state that the embedded engine does not know of. Use the vllm engine"
        )
    if LeanForward.fits(model):
        lean = LeanForward(model, geometry, context)
        difference = check(lean, model, geometry, reference)
        if difference <= tolerance(reference.dtype):
            return lean, geometry
        _log.warning(
            "the lean forward differs from %s by %.2g of its logits' spread: not used, steps are slower",
            type(model).__name__,
            difference,
        )
    return forward, geometry


@torch.inference_mode()
def check(forward: Forward, model: Any, geometry: Geometry, reference: Tensor) -> float:
    """Run the probe in every way that the engine will use, and compare.

    Two slots of three hold it; it is prefilled in two parts and then token by token, both slots at once.

    Returns:
        The largest difference to ``reference`` over all logits, relative to their spread.
    """
    ids = _probe(model)
    total = len(ids)
    parameter = next(model.parameters())
    cache = SlotCache(geometry, slots=3, context=total, dtype=parameter.dtype, device=parameter.device)
    found = []
    nobody = np.empty(0, dtype=np.int64)
    for start, stop in ((0, _PROBE_KEPT // 2), (_PROBE_KEPT // 2, _PROBE_KEPT)):
        step = cache.plan(
            decode_slots=nobody,
            decode_positions=nobody,
            chunks=[(0, start, stop - start), (2, start, stop - start)],
            token_ids=np.tile(ids[start:stop], 2),
            outputs=np.arange(stop - start) + (stop - start),
        )
        found.append(forward(step, cache))
    slots = np.array([0, 2], dtype=np.int64)
    for position in range(_PROBE_KEPT, total):
        step = cache.plan(
            decode_slots=slots,
            decode_positions=np.full(2, position, dtype=np.int64),
            chunks=[],
            token_ids=ids[[position, position]],
            outputs=np.array([1], dtype=np.int64),
        )
        found.append(forward(step, cache))
    difference = (torch.cat(found).float() - reference.float()).abs().max()
    return float(difference / reference.float().std().clamp(min=1e-6))


def tolerance(dtype: torch.dtype) -> float:
    """How far `check` may be off: sums in another order, at this precision."""
    return {torch.float32: 1e-3, torch.float16: 5e-2}.get(dtype, 0.25)


# ---------------------------------------------------------------------------------------------------


def _probe(model: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ids that every model knows, in no pattern."""
    return np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, _PROBE_TOKENS)


def _refuse_unfit(model: Any) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise EngineError(
            f"{name} does not go through transformers' attention interface, which the embedded engine needs; "
            "serve it with the vllm engine, or use a model family such as Qwen3, Qwen2 or Llama"
        )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise EngineError(
            f"{name} uses {rope['rope_type']} rotary scaling, which changes with the longest sequence of a "
            "batch: kept KV would not fit it. Set rope_parameters to a fixed type such as 'yarn', or use the "
            "vllm engine"
        )


def _set_attention(model: Any, name: str, sees: bool) -> None:
    """For the language half; a vision tower attends as it does everywhere."""
    model.set_attn_implementation({"text_config": name, "vision_config": "sdpa"} if sees else name)


@torch.inference_mode()
def _reference_logits(model: Any) -> Tensor:
    """The plain model's logits ``[tokens, vocabulary]`` for the probe."""
    ids = torch.from_numpy(_probe(model)).to(next(model.parameters()).device)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _slots_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: ``[1, heads, N, head_dim]`` in, ``[1, N, heads, head_dim]``
    out.
    """
    step: Step = kwargs["turnwise_step"]
    cache: SlotCache | _Shapes = kwargs["turnwise_cache"]
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise EngineError(
                f"{type(module).__name__} asks its attention for '{name}', which the embedded engine does "
                "not compute; serve the model with the vllm engine"
            )
    tokens, heads = query.shape[2], query.shape[1]
    layer: int = module.layer_idx  # type: ignore[assignment]  # on every module that uses the interface
    cache.store(layer, torch.cat([key[0], value[0]]).transpose(0, 1), step)
    out = cache.attend(
        layer,
        query[0].transpose(0, 1),
        step,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
    )
    return out.view(1, tokens, heads, -1), None


AttentionInterface.register(ATTENTION, _slots_attention)


class _Shapes:
    """Stands in for the cache to see the shapes of a model's keys and values."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, int]] = {}

    def store(self, layer: int, kv: Tensor, step: Step | None) -> None:
        """Note the shape."""
        self.seen[layer] = (kv.shape[1] // 2, kv.shape[2])

    def attend(
        self, layer: int, queries: Tensor, step: Step | None, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """An answer of the right shape that means nothing."""
        return queries.reshape(len(queries), -1)


@torch.inference_mode()
def _measure(model: Any) -> Geometry:
    """The geometry of the model's KV, seen in one call on one token."""
    shapes = _Shapes()
    one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with _explained(model):
        model(input_ids=one, position_ids=one, use_cache=False, turnwise_step=None, turnwise_cache=shapes)
    kinds = set(shapes.seen.values())
    if len(kinds) != 1 or sorted(shapes.seen) != list(range(len(shapes.seen))):
        raise EngineError(
            f"{type(model).__name__} has layers of unlike keys and values ({sorted(kinds)} as kv_heads × "
            f"head_dim, in layers {sorted(shapes.seen)}); the embedded engine needs them alike. "
            "Use the vllm engine"
        )
    ((kv_heads, head_dim),) = kinds
    return Geometry(layers=len(shapes.seen), kv_heads=kv_heads, head_dim=head_dim)


@contextmanager
def _explained(model: Any) -> Iterator[None]:
    with boundary(EngineError, f"{type(model).__name__} cannot run over the embedded engine's KV slots"):
        yield
