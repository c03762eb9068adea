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

    Names are those of the model's state dict. Tied weights may come under one of their names or under all of
    them.

    Raises:
        EngineError: An unknown or missing name, another shape, or unlike tensors for tied weights.
    """
    targets: dict[str, Tensor] = model.state_dict()
    with boundary(EngineError, "reading the weight source"):
        given = _read(source, targets)
        _check_complete(model, given)
    # What fails from here on leaves weights of two versions: it is no EngineError, and ends the engine.
    with torch.no_grad():
        for name, tensor in given.items():
            targets[name].copy_(tensor)


def _read(source: WeightSource, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors, each of which fits its target."""
    given: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        target = targets.get(name)
        if target is None:
            raise EngineError(
                f"the weight source has '{name}', which the model has not{_nearest(name, targets)}"
            )
        if name in given:
            raise EngineError(f"the weight source has '{name}' twice")
        if not isinstance(tensor, Tensor):
            raise EngineError(f"'{name}' is a {type(tensor).__name__} in the weight source, not a tensor")
        if tensor.shape != target.shape:
            raise EngineError(
                f"'{name}' has shape {tuple(tensor.shape)} in the weight source and {tuple(target.shape)} "
                "in the model; the weights were left as they were"
            )
        given[name] = tensor
    return given


def _check_complete(model: torch.nn.Module, given: dict[str, Tensor]) -> None:
    """Every parameter is there under one of its names, and under equal values where it is there under
    several.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    missing = []
    for names in aliases.values():
        found = [name for name in names if name in given]
        if not found:
            missing.append(names[0])
        for name in found[1:]:
            if not _same(given[found[0]], given[name]):
                raise EngineError(
                    f"'{found[0]}' and '{name}' are tied in the model, but differ in the weight source; "
                    "the weights were left as they were"
                )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EngineError(
            f"the weight source lacks {', '.join(repr(name) for name in missing[:3])}{more}; "
            "the weights were left as they were"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b))


def _nearest(name: str, known: dict[str, Any]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""
