"""Weights in 4 bits, frozen under adapters that are trained (QLoRA).

bitsandbytes holds them, in an eighth of float32's memory. What is trained and what plays is the same model:
an engine gets the whole matrices that the bits stand for, with the adapters merged.

Source: QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnwise.errors import LearnError, MissingExtraError, RecipeError, boundary
from turnwise.learn.adapters import bare, tied

# It misses, wherever peft imports it, a kernel for processors that computes in bfloat16; none is used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def four_bits(kind: str, compute: torch.dtype) -> Any:
    """A ``quantization_config`` for ``from_pretrained``.

    Args:
        kind: ``nf4`` or ``fp4``. The scales of the blocks are quantized too.
        compute: What the matrices are widened to, one at a time, as they are used.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    require()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def require() -> None:
    """See to it that bitsandbytes is there.

    Raises:
        MissingExtraError: It is not.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError("bitsandbytes", "quantization", "a model in 4 bits") from None


def quantized(module: Any) -> bool:
    """Whether some of a model's weights are in fewer bits than they are trained in."""
    causal = bare(module)
    return getattr(causal, "hf_quantizer", None) is not None or bool(getattr(causal, "is_quantized", False))


def matrices(module: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are in 4 bits, by name."""
    if not quantized(module):
        return {}
    from bitsandbytes.nn.modules import Linear4bit

    return {name: part for name, part in module.named_modules() if isinstance(part, Linear4bit)}


def widened(layer: Any) -> Tensor:
    """The matrix ``[out, in]`` that a layer of 4 bits stands for, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32  # As layers compute, whatever type the weights were loaded in.
    return dequantize_4bit(layer.weight.data, state)


def check_kind(module: Any, asked: str) -> None:
    """See to it that weights are held as the recipe says: those that were saved quantized stay as they are.

    Raises:
        RecipeError: They are of another kind.
    """
    found = getattr(module.config.quantization_config, "bnb_4bit_quant_type", None)
    if found != asked:
        raise RecipeError(
            f"model.quantization is {asked}, and the model was saved quantized, by "
            f"{_method(module)}{f' as {found}' if found else ''}; leave model.quantization out to train it "
            "as it is, where it has 4 bits, or name one with whole weights"
        )


def make_trainable(module: Any) -> None:
    """Ready a quantized model with adapters to be trained: what is not in 4 bits becomes float32.

    Raises:
        RecipeError: Its bits are of another kind, or there are no adapters to train.
    """
    causal = bare(module)
    if not getattr(causal, "is_loaded_in_4bit", False):
        raise RecipeError(
            f"the model is quantized by {_method(causal)}, which no engine here plays exactly as it is "
            "trained; name one with whole weights, and hold them in 4 bits by "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True) with peft_config, or by "
            "model.quantization in a recipe"
        )
    four = matrices(causal)
    if not four or any(_transposed(layer) for layer in four.values()):
        found = "are transposed" if four else "are none that bitsandbytes knows"
        raise RecipeError(
            f"the matrices of {type(causal).__name__} {found}: load it without quantization_config"
        )
    head = causal.get_output_embeddings()
    if head in four.values() and tied(causal.config):
        raise RecipeError(
            "the head is tied to the embeddings, which are not in 4 bits: add 'lm_head' to "
            "llm_int8_skip_modules, or leave that out"
        )
    if causal is module:
        raise RecipeError(
            "weights in 4 bits cannot be trained themselves: add adapters (peft_config=LoraConfig(…), or "
            "model.lora in a recipe), or load the model without quantization"
        )
    for layer in four.values():
        # On processors with AVX512-BF16 its forward without gradients repacks the bits in place, after which
        # it computes in bfloat16, and has no gradient either.
        cast(Any, layer).support_avx512bf16_for_cpu = False
    bits = {id(layer.weight) for layer in four.values()}
    for parameter in module.parameters():
        if parameter.is_floating_point() and id(parameter) not in bits:
            parameter.data = parameter.data.float()


def unquantized(module: Any, weights: Mapping[str, Tensor]) -> Any:
    """A model of the same architecture around whole weights.

    Args:
        module: Quantized, with or without adapters.
        weights: What `turnwise.learn.weights.LiveWeights` gives of it; they are not copied.

    Raises:
        LearnError: It cannot be made from the model's configuration, or lacks a weight.
    """
    causal = bare(module)
    config = copy.deepcopy(causal.config)
    del config.quantization_config
    with boundary(LearnError, f"an unquantized {type(causal).__name__} cannot be made"):
        with torch.device("meta"):
            plain = type(causal)(config)
        plain.load_state_dict(weights, strict=False, assign=True)
        plain.tie_weights()
        plain.generation_config = copy.deepcopy(causal.generation_config)
        for name, buffer in causal.named_buffers():  # Such as frequencies, which no checkpoint has.
            owner, _, own = name.rpartition(".")
            part = plain.get_submodule(owner)
            if own in part._buffers:
                part._buffers[own] = buffer
    missing = [name for name, one in (*plain.named_parameters(), *plain.named_buffers()) if one.is_meta]
    if missing:
        raise LearnError(f"an unquantized {type(causal).__name__} lacks {', '.join(missing[:3])}")
    return plain.eval()


def _transposed(layer: Any) -> bool:
    """Whether it stands for a matrix ``[in, out]``, as those of GPT-2 are."""
    from transformers.pytorch_utils import Conv1D

    return getattr(layer, "source_cls", None) is Conv1D


def _method(module: Any) -> str:
    config = module.config.quantization_config
    if getattr(config, "load_in_8bit", False):
        return "bitsandbytes in 8 bits"
    return str(getattr(getattr(config, "quant_method", None), "value", type(config).__name__))
