"""The model and the tokenizer of a trainer, from what TRL takes: names, paths, live models, adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import is_torchvision_available

from turnwise.chat.processing import Processing, sees
from turnwise.errors import LearnError, RecipeError, boundary
from turnwise.images import as_json
from turnwise.learn.model import REFERENCE
from turnwise.learn.quantized import make_trainable, quantized, require

log = logging.getLogger(__name__)


def load_policy(
    model: Any,
    *,
    init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    peft_config: Any = None,
    seed: int = 0,
) -> Any:
    """The live model that will be trained, with its adapters on.

    Args:
        model: A name of the Hub, a path, a model of transformers, or a ``PeftModel``.
        init_kwargs: For ``from_pretrained``, of a model by name.
        trust_remote_code: Run code that comes with it.
        quantization_config: For ``from_pretrained`` too; 4 bits by bitsandbytes, under ``peft_config``.
        peft_config: Adapters to train in place of all weights.
        seed: Of the adapters' first weights.

    Raises:
        RecipeError: Arguments exclude each other, or the model is stored in a type that cannot be trained.
        MissingExtraError: bitsandbytes is needed.
        LearnError: ``transformers`` or ``peft`` cannot make it.
    """
    if isinstance(model, str):
        kwargs = dict(init_kwargs or {})
        if quantization_config is not None and "quantization_config" in kwargs:
            raise RecipeError("quantization_config is given twice: leave it out of model_init_kwargs")
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if isinstance(bits := kwargs.get("quantization_config"), dict):
            kwargs["quantization_config"] = bits = AutoQuantizationConfig.from_dict(dict(bits))
        if getattr(bits, "quant_method", None) == "bitsandbytes":
            require()
        kwargs.setdefault("trust_remote_code", trust_remote_code)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        with boundary(LearnError, f"the model {model} cannot be loaded"):
            loaded = _class_of(model, kwargs).from_pretrained(model, **kwargs)
    else:
        for name, value in (("model_init_kwargs", init_kwargs), ("quantization_config", quantization_config)):
            if value:
                raise RecipeError(
                    f"{name} is for a model that the trainer loads by name, and this one is loaded already: "
                    "hand it to from_pretrained, or leave it out"
                )
        loaded = model
    if not isinstance(loaded, torch.nn.Module):
        raise RecipeError(
            f"model is a name, a path or a model of transformers; found {type(loaded).__name__}"
        )
    made = loaded if peft_config is None else _adapted(loaded, peft_config, seed)
    if quantized(made):
        make_trainable(made)
    for config in getattr(made, "peft_config", {}).values():
        _check_adapters(config)
    return made


def _check_adapters(config: Any) -> None:
    """Refuse adapters that the engine could not merge.

    Raises:
        RecipeError: They are of such a kind; the message says which can be trained.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    beyond = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    extra = [name for name in beyond if getattr(config, name, None)]
    if kind != "LORA" or extra:
        found = f"LoRA with {', '.join(extra)}" if extra else kind
        raise RecipeError(
            f"the adapters are {found}: an engine plays with adapters merged into the weights, which is done "
            "for plain LoRA (rsLoRA too). Use peft.LoraConfig without these, or train all weights"
        )


def _class_of(name: str, kwargs: dict[str, Any]) -> Any:
    """The class that the model was saved as; it knows its heads, where an Auto class would have to guess."""
    hub = {
        key: kwargs[key]
        for key in ("revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder")
        if key in kwargs
    }
    config = transformers.AutoConfig.from_pretrained(name, **hub)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM


def _adapted(model: Any, peft_config: Any, seed: int) -> Any:
    import peft

    if not isinstance(peft_config, peft.PeftConfig):
        raise RecipeError(
            f"peft_config is a config of peft, such as peft.LoraConfig; found {type(peft_config).__name__}"
        )
    if isinstance(model, peft.PeftModel):
        raise RecipeError(
            "the model has adapters already: leave out peft_config to train them, or hand over "
            "model.merge_and_unload()"
        )
    with boundary(LearnError, "the adapters of peft_config cannot be put on"), torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft_config)


def load_processing(model: Any, processing: Any, *, trust_remote_code: bool, revision: str | None) -> Any:
    """The tokenizer or processor: what is given, or what was saved beside the model.

    Raises:
        RecipeError: It is neither of these, or there is none beside the model.
    """
    if processing is None:
        name = name_of(model)
        with boundary(
            RecipeError, f"no tokenizer can be loaded for the model '{name}': hand over processing_class"
        ):
            if sees(name, revision) and not is_torchvision_available():
                # Its video processor cannot be made without; tokenizer and image processor can.
                processing = Processing.of(name, revision)
            else:
                processing = transformers.AutoProcessor.from_pretrained(
                    name, revision=revision, trust_remote_code=trust_remote_code
                )
    known = transformers.PreTrainedTokenizerBase | transformers.ProcessorMixin | Processing
    if not isinstance(processing, known):
        raise RecipeError(
            f"processing_class is a tokenizer or a processor; found {type(processing).__name__}"
        )
    tokenizer = getattr(processing, "tokenizer", processing)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing


def image_of(processing: Any) -> Callable[[Any], Any] | None:
    """Stores an image of a row and says what stands for it; None where the model reads text alone."""
    return None if Processing.of(processing).vision is None else as_json


def name_of(model: Any) -> str:
    """Where a model was loaded from; its class where it was made in place."""
    return str(getattr(model.config, "_name_or_path", "")) or type(model).__name__


def keep_starting_adapters(model: Any) -> None:
    """Let adapters that are trained further be compared with themselves as they are now.

    Without it the reference of a KL term would be the model without adapters.
    """
    if REFERENCE in model.peft_config:
        return
    [name] = model.active_adapters
    model.add_adapter(REFERENCE, model.peft_config[name])
    parameters = dict(model.named_parameters())
    for full, parameter in parameters.items():
        if f".{name}." in full:
            parameters[full.replace(f".{name}.", f".{REFERENCE}.")].data.copy_(parameter.data)
    model.set_adapter(name)
