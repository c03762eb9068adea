"""Weights spread over processes by torch's FSDP2: each holds a part of every tensor.

Everything here that takes a sharded tensor is collective: every process must call it, in the same order. Of
whole tensors it does nothing, so that callers need not know which they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on the CPU of the first process; elsewhere nothing of it is kept."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    full = gather()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every process has read, what belongs beside ``like``."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(like.device), mesh, like.placements, src_data_rank=None  # type: ignore[attr-defined]
    )  # fmt: skip


def replicate(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole in every process, for what cannot be computed in parts."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Replicate

    replicated: Tensor = tensor.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
    return replicated


class Sharded(nn.Module):
    """A model whose weights are spread over the processes of a mesh, layer by layer.

    Calling it with a function calls that while the weights outside of the layers are whole; each layer
    gathers its own for as long as it computes. Gradients are summed over the processes, not averaged: losses
    are sums whose weights are fixed over the whole step.

    Args:
        module: A model of transformers, or a ``PeftModel`` around one, on any device. It is sharded in place.
        mesh: One-dimensional; the weights move to its devices.
        together: A part that is gathered as one with the rest outside of the layers: a vision tower, whose
            layers only those processes would gather that have an image.
    """

    def __init__(self, module: nn.Module, mesh: Any, *, together: nn.Module | None = None) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__()
        self.module = module
        for layer in _layers(module, without=together):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        for part in self.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                # One operation that every backend has, in place of those with the division built in.
                part.set_force_sum_reduction_for_comms(True)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``."""
        return function(*args, **kwargs)


def _layers(module: nn.Module, *, without: nn.Module | None) -> list[nn.Module]:
    """The blocks that the model's author says must not be split."""
    left_out = set() if without is None else set(without.modules())
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names and part not in left_out]
