"""The engine of a run, as its recipe chooses: in this process, or on vLLM servers."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from turnwise.chat.vision import Vision
from turnwise.config import Recipe
from turnwise.engines.base import Engine
from turnwise.errors import RecipeError
from turnwise.types import WeightSource


async def open_engine(
    recipe: Recipe,
    name: str,
    revision: str | None,
    *,
    module: Any = None,
    vision: Vision | None = None,
    directory: Path,
) -> Engine:
    """An engine on a model; whoever asks for it closes it.

    Args:
        recipe: The run's.
        name: Hub name or directory of the model.
        revision: Of a model of the Hub.
        module: A model that is loaded already: its weights are taken in place of those of ``name``.
        vision: The image side of the model's processor, for a model that sees.
        directory: The run's, by which servers know the run again when it is resumed.

    Raises:
        EngineError: It cannot be had; the message says what to do.
        RecipeError: ``engine.weights`` does not go with ``module``.
    """
    if recipe.engine.kind == "vllm":
        return await _vllm(recipe, name, revision, module, directory)
    from turnwise.engines.transformers import TransformersEngine
    from turnwise.learn.quantized import quantized, unquantized

    config = recipe.engine
    dtype = config.dtype or recipe.model.dtype or default_dtype(config.device)
    options: dict[str, Any] = {
        "device": config.device or default_device(),
        "dtype": dtype,
        "max_sequences": config.max_sequences,
        "max_context": config.max_context,
        "kv_tokens": config.kv_tokens,
        "prefill_tokens": config.prefill_tokens,
        "vision": vision,
    }
    if module is not None and quantized(module):
        plain = await asyncio.to_thread(lambda: unquantized(module, _copied(_weights_of(module), dtype)))
        return await asyncio.to_thread(TransformersEngine, plain, copy=False, **options)
    if hasattr(module, "merge_and_unload"):  # It plays with one matrix where the learner has two more.
        merged = await asyncio.to_thread(lambda: copy.deepcopy(module).merge_and_unload())
        return await asyncio.to_thread(TransformersEngine, merged, copy=False, **options)
    if module is not None:
        return await asyncio.to_thread(TransformersEngine, module, **options)
    return await TransformersEngine.load(name, revision=revision, **options)


async def _vllm(recipe: Recipe, name: str, revision: str | None, module: Any, directory: Path) -> Engine:
    from turnwise.engines.vllm import VllmEngine

    config = recipe.engine
    # Adapters that a model comes with are part of its version 0: beside it they would count twice.
    adapted = hasattr(module, "get_base_model")
    same_base = recipe.model.lora is not None and recipe.model.quantization is None and not adapted
    if adapted and config.weights == "adapter":
        raise RecipeError(
            "engine.weights: adapter sends adapters that start from nothing, and this model comes with some; "
            "use file, which merges them"
        )
    where = f"{socket.gethostname()}:{directory.resolve()}"
    return await VllmEngine.connect(
        config.urls,
        model=name,
        revision=revision,
        config=None if module is None else module.config,
        initial=None if module is None else _weights_of(module),
        weights=config.weights or ("adapter" if same_base else "file"),
        weights_dir=config.weights_dir,
        nccl_port=config.nccl_port,
        dtype=recipe.model.dtype or default_dtype(None),
        holder=f"{recipe.name}-{hashlib.blake2b(where.encode(), digest_size=4).hexdigest()}",
        max_context=config.max_context,
        start_seconds=config.start_seconds,
        request_seconds=config.request_seconds,
    )


def _weights_of(module: Any) -> WeightSource:
    """Of a model with or without adapters, which are merged."""
    from turnwise.learn.adapters import bare
    from turnwise.learn.weights import LiveWeights

    causal = bare(module)
    # peft marks the model that it puts adapters into, too.
    view: Any = SimpleNamespace(causal=causal, lora=hasattr(causal, "peft_config"))
    return LiveWeights(view)


def _copied(source: WeightSource, dtype: str) -> dict[str, Any]:
    """All weights in the engine's type, made one by one: in the learner's they might not fit beside it."""
    import torch

    return {name: one.to(getattr(torch, dtype), copy=True) for name, one in source.tensors()}


def default_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str | None) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if (device or default_device()).startswith("cuda") else "float32"
