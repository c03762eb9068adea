"""Weights in and out of a model: for engines, for checkpoints, under their checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnwise.errors import LearnError, boundary
from turnwise.learn.model import PolicyModel
from turnwise.learn.quantized import matrices, widened
from turnwise.learn.shards import spread, whole


class LiveWeights:
    """A `WeightSource` over the model that is being trained.

    It is a view, not a copy: read it before the next update. Adapters are merged into one matrix at a time,
    and the training weights are not touched. Weights that are tied are given once, under the name that comes
    first in the model (its embeddings), as checkpoints hold them.
    """

    def __init__(self, model: PolicyModel) -> None:
        self._model = model

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor), on the learner's device; of sharded weights see `whole`."""
        adapted: dict[str, Any] = {}
        if self._model.lora:
            from peft.tuners.lora import LoraLayer

            adapted = {
                name: part for name, part in self._model.causal.named_modules() if isinstance(part, LoraLayer)
            }
        four_bits = {f"{name}.weight": part for name, part in matrices(self._model.causal).items()}
        seen: set[int] = set()
        for key, tensor in self._model.causal.state_dict(keep_vars=True).items():
            owner, _, rest = key.partition(".base_layer.")
            tied = id(tensor) in seen
            seen.add(id(tensor))
            if key in four_bits:
                tensor = widened(four_bits[key])
            elif f"{key.rpartition('.weight.')[0]}.weight" in four_bits:
                continue  # How the bits are to be read.
            if rest:
                layer, key = adapted[owner], f"{owner}.{rest}"
                if rest == "weight":
                    for adapter in layer.active_adapters:
                        tensor = tensor + layer.get_delta_weight(adapter)
            elif any(part.startswith("lora_") for part in key.split(".")):
                continue
            if rest or not tied:
                yield key, whole(tensor.detach())

    def save_adapter(self, directory: Path) -> None:
        """Write the adapters apart from the model, as ``peft`` does.

        Raises:
            LearnError: There are none, or they could not be written.
        """
        if not self._model.lora:
            raise LearnError("this model has no adapters; set model.lora, or send all of its weights")
        with boundary(LearnError, f"writing the adapters to {directory}"):
            self._model.module.save_pretrained(directory, state_dict=self._adapters())

    def _adapters(self) -> dict[str, Tensor] | None:
        """None: the model has them."""
        return None


class HeldWeights(LiveWeights):
    """A copy of sharded weights, whole on the CPU of the first process, which reads it by itself.

    Every process must make one.
    """

    def __init__(self, model: PolicyModel) -> None:
        super().__init__(model)
        self._merged = dict(super().tensors())
        self._apart = weights_to_save(model) if model.lora else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor), on the CPU."""
        yield from self._merged.items()

    def _adapters(self) -> dict[str, Tensor] | None:
        return self._apart


def weights_to_save(model: PolicyModel) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` is to write of a sharded model, whole; None where it finds that by itself."""
    if not model.sharded:
        return None
    named = model.trainable if model.lora else model.module.state_dict(keep_vars=True).items()
    # Tied weights stay one tensor, which is then written once.
    found: dict[int, Tensor] = {}
    return {
        name: found[id(one)] if id(one) in found else found.setdefault(id(one), whole(one.detach()))
        for name, one in named
    }


def load_saved(model: PolicyModel, path: Path) -> None:
    """Put what ``save_pretrained`` wrote into the model."""
    if model.lora:
        from peft import load_peft_weights, set_peft_model_state_dict

        like = model.trainable[0][1]
        saved = load_peft_weights(str(path), device="cpu")
        set_peft_model_state_dict(model.module, {name: spread(one, like) for name, one in saved.items()})
    else:
        mine = model.causal.state_dict()
        saved = type(model.causal).from_pretrained(path, dtype=torch.float32).state_dict()
        model.causal.load_state_dict({name: spread(one, mine.get(name, one)) for name, one in saved.items()})
