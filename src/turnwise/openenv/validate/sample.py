"""A JSON value that a schema allows: what a player who knows nothing of a game does in it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

DEEPEST = 8
FAR = 10**18
SPREAD = 100
"""Of numbers without an upper bound, so that different ones are tried."""


def sample(schema: Mapping[str, Any], rng: random.Random) -> Any:
    """A value of ``schema``, with required fields alone.

    Args:
        schema: JSON Schema, as pydantic writes it; ``$ref`` points into it.
        rng: Where choices come from.
    """
    return _sample(schema, rng, schema, DEEPEST)


def _sample(schema: Any, rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    if depth == 0 or not isinstance(schema, Mapping):  # `true` allows anything
        return None
    if "$ref" in schema:
        return _sample(_target(root, str(schema["$ref"])), rng, root, depth - 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return rng.choice(list(schema["enum"]))
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _sample(schema[key][0], rng, root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or "properties" in schema:
        fields = schema.get("properties", {})
        # A field that tells kinds of actions apart has a default, and is needed all the same.
        wanted = [
            *schema.get("required", ()),
            *(name for name, part in fields.items() if isinstance(part, Mapping) and "const" in part),
        ]
        return {name: _sample(fields.get(name, {}), rng, root, depth - 1) for name in dict.fromkeys(wanted)}
    if kind == "array":
        return [
            _sample(schema.get("items", {}), rng, root, depth - 1) for _ in range(schema.get("minItems", 0))
        ]
    return _leaf(kind, schema, rng)


def _leaf(kind: Any, schema: Mapping[str, Any], rng: random.Random) -> Any:
    if kind in ("integer", "number"):
        return _number(schema, rng)
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "null":
        return None
    return "a" * max(1, int(schema.get("minLength", 1)))


def _number(schema: Mapping[str, Any], rng: random.Random) -> float:
    """A whole number within the bounds; a fraction where there is none between them."""
    least, above = schema.get("minimum", -FAR), schema.get("exclusiveMinimum", -FAR)
    most, below = schema.get("maximum", FAR), schema.get("exclusiveMaximum", FAR)
    first, last = max(math.ceil(least), math.floor(above) + 1), min(math.floor(most), math.ceil(below) - 1)
    if not {"minimum", "exclusiveMinimum"} & set(schema):
        first = min(0, last)
    if not {"maximum", "exclusiveMaximum"} & set(schema):
        last = first + SPREAD
    if first <= last:
        return rng.randint(first, last)
    return float(max(least, above) + min(most, below)) / 2


def _target(root: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}
