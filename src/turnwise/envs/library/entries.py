"""reasoning-gym's entries as plain JSON and back, so that an answer can be scored from a task row alone.

Some datasets score with what JSON cannot say: ``arc_agi`` compares grids of tuples, ``graph_color`` looks up
integer keys. Those values are tagged, everything else stays readable:

    {"grid": ((1, 2), (3, 4)), "colors": {0: "red"}}
    {"grid": {"$tuple": [{"$tuple": [1, 2]}, {"$tuple": [3, 4]}]}, "colors": {"$items": [[0, "red"]]}}
"""

from __future__ import annotations

from typing import Any

import numpy as np

TUPLE, SET, ITEMS = "$tuple", "$set", "$items"


def pack(value: Any) -> Any:
    """``value`` as JSON; `unpack` gives an equal value back, numpy's scalars and arrays as plain ones.

    Raises:
        TypeError: It holds something else than JSON values, tuples, sets, mappings, numpy numbers and arrays.
    """
    if isinstance(value, np.generic | np.ndarray):
        return pack(value.tolist())
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {TUPLE: [pack(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {SET: sorted((pack(item) for item in value), key=repr)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): pack(item) for key, item in value.items()}
        return {ITEMS: [[pack(key), pack(item)] for key, item in value.items()]}
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r:.80}")


def unpack(value: Any) -> Any:
    """The value that `pack` was given."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((key, items),) = value.items()
            if key == TUPLE:
                return tuple(unpack(item) for item in items)
            if key == SET:
                return {unpack(item) for item in items}
            if key == ITEMS:
                return {unpack(name): unpack(item) for name, item in items}
        return {key: unpack(item) for key, item in value.items()}
    return value
