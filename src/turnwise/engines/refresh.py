"""Refresh a model's weights in place from a `WeightSource`: all of them, or none."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from turnwise.errors import EngineError, boundary
from turnwise.types import WeightSource


def refresh(model: torch.nn.Module, source: WeightSource) -> None:
    """Copy every tensor of ``source`` into ``model``. Nothing is written before everything was checked.

    The source is read twice, to be checked and to be copied, and one tensor at a time: merged adapters are
    made as they are read, and all of them at once would be another model in memory. Names are those of the
    model's state dict. Tied weights may come under one of their names or under all of them.

    Raises:
        EngineError: An unknown or missing name, another shape, or unlike tensors for tied weights.
    """
    targets: dict[str, Tensor] = model.state_dict()
    with boundary(EngineError, "reading the weight source"):
        _check(model, source, targets)
    # What fails from here on leaves weights of two versions: it is no EngineError, and ends the engine.
    with torch.no_grad():
        for name, tensor in source.tensors():
            targets[name].copy_(tensor)


def _check(model: torch.nn.Module, source: WeightSource, targets: dict[str, Tensor]) -> None:
    """Every tensor fits its target; every parameter is there under one of its names, and under equal values
    where it is there under several.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    tied = {name: names[0] for names in names_of.values() if len(names) > 1 for name in names}
    first: dict[str, tuple[str, Tensor]] = {}
    """Of each tied parameter, the name and value that came first: all that is held on to."""
    given: set[str] = set()
    for name, tensor in source.tensors():
        _fits(name, tensor, targets)
        if name in given:
            raise EngineError(f"the weight source has '{name}' twice")
        given.add(name)
        if name in tied:
            before, value = first.setdefault(tied[name], (name, tensor))
            if before != name and not _same(value, tensor):
                raise EngineError(
                    f"'{before}' and '{name}' are tied in the model, but differ in the weight source; "
                    "the weights were left as they were"
                )
    missing = [names[0] for names in names_of.values() if given.isdisjoint(names)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EngineError(
            f"the weight source lacks {', '.join(repr(name) for name in missing[:3])}{more}; "
            "the weights were left as they were"
        )


def _fits(name: str, tensor: Any, targets: dict[str, Tensor]) -> None:
    target = targets.get(name)
    if target is None:
        raise EngineError(f"the weight source has '{name}', which the model has not{_nearest(name, targets)}")
    if not isinstance(tensor, Tensor):
        raise EngineError(f"'{name}' is a {type(tensor).__name__} in the weight source, not a tensor")
    if tensor.shape != target.shape:
        raise EngineError(
            f"'{name}' has shape {tuple(tensor.shape)} in the weight source and {tuple(target.shape)} "
            "in the model; the weights were left as they were"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b))


def _nearest(name: str, known: dict[str, Any]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""
