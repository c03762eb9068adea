"""What peft puts around a model, and where that can be merged."""

from __future__ import annotations

from typing import Any

from turnwise.errors import RecipeError


def bare(module: Any) -> Any:
    """The model that adapters are on, or the model itself where there are none."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def tied(config: Any) -> bool:
    """Whether a model's head is its embeddings; one that sees says so outside of its text's configuration."""
    return any(getattr(one, "tie_word_embeddings", False) for one in (config, config.get_text_config()))


def check_mergeable(module: Any) -> None:
    """Refuse adapters on one of two layers that share their matrix: merged, they would move the other too.

    Raises:
        RecipeError: There are some.
    """
    from peft.tuners.lora import LoraLayer

    causal = bare(module)
    ends = causal.get_input_embeddings(), causal.get_output_embeddings()
    if tied(causal.config) and any(isinstance(end, LoraLayer) for end in ends):
        raise RecipeError(
            "the adapters are on embeddings that are tied to the head, or on that: leave both out of "
            "target_modules (all-linear does)"
        )
