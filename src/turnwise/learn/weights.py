"""`LiveWeights`: the present weights under their checkpoint's names, for engines to load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from turnwise.learn.model import PolicyModel


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
        """(name, float32 tensor), on the learner's device."""
        adapted: dict[str, Any] = {}
        if self._model.lora:
            from peft.tuners.lora import LoraLayer

            adapted = {
                name: part for name, part in self._model.causal.named_modules() if isinstance(part, LoraLayer)
            }
        seen: set[tuple[int, torch.Size]] = set()
        for key, tensor in self._model.causal.state_dict().items():
            owner, _, rest = key.partition(".base_layer.")
            if rest:
                layer, key = adapted[owner], f"{owner}.{rest}"
                if rest == "weight":
                    for adapter in layer.active_adapters:
                        tensor = tensor + layer.get_delta_weight(adapter)
            elif any(part.startswith("lora_") for part in key.split(".")):
                continue
            where = tensor.data_ptr(), tensor.shape
            if rest or where not in seen:
                seen.add(where)
                yield key, tensor
