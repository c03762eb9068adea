"""Replies to try an environment with: legal calls drawn from its tools' schemas, and garbage of every
kind.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.types import Message, ToolCall, ToolSchema

HUGE = 200_000
"""Characters of the huge strings among the garbage."""
ODD_VALUES: Mapping[str, Any] = {"null": None, "a list": [[]], "an object": {"a": {}}, "a boolean": True}
"""Tried for every parameter that does not take them."""
DEPTH = 4
"""How deep a drawn value may nest."""


def legal_reply(tools: Sequence[ToolSchema], rng: random.Random) -> Message:
    """A call of any tool with arguments that fit its schema; a few words where there are no tools."""
    if not tools:
        return Message.assistant(_word(rng))
    tool = rng.choice(tools)
    arguments = draw({"type": "object", **tool.parameters}, tool.parameters, rng)
    return Message.assistant("", ToolCall(name=tool.name, arguments=arguments))


def garbage(tools: Sequence[ToolSchema]) -> dict[str, Message]:
    """What a policy may say and should not, by what is wrong with it. No call among it fits its tool's
    schema.
    """
    out = {
        "an empty reply": Message.assistant(""),
        "a huge text": Message.assistant("x" * HUGE),
        "text with control characters": Message.assistant("\x00\x1b[2J\ud7ff �\n\t<tool_call>{"),
        "a malformed call": _call("", {}, error="arguments are not valid JSON", raw='{"name": "'),
        "a call of an unknown tool": _call("no_such_tool", {}),
        "a call of a private method": _call("__init__", {}),
        "a call of reset": _call("reset", {"task": {}}),
    }
    for tool in tools:
        properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        wrong: dict[str, dict[str, Any]] = {
            "an argument too many": {**dict.fromkeys(properties, "x"), "no_such_argument": 1},
        }
        if tool.parameters.get("required"):
            wrong["no arguments"] = {}
        for kind, value in ODD_VALUES.items():
            if properties and not any(_takes(part, value, tool.parameters) for part in properties.values()):
                wrong[f"{kind} for each argument"] = dict.fromkeys(properties, value)
        for kind, arguments in wrong.items():
            out[f"{tool.name} with {kind}"] = _call(tool.name, arguments)
    return out


def extremes(tools: Sequence[ToolSchema]) -> dict[str, Message]:
    """Calls that fit their schema and that few authors think of: huge and empty strings, vast numbers."""
    values: dict[str, dict[str, Any]] = {
        "huge values": {"string": "x" * HUGE, "integer": 10**30, "number": 1e300},
        "empty values": {"string": "", "integer": 0, "number": 0.0},
        "negative values": {"string": "-1", "integer": -1, "number": -1.0},
    }
    out: dict[str, Message] = {}
    for tool in tools:
        properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        if not properties or any(
            set(part) - {"type", "description", "default"} or not isinstance(part.get("type"), str)
            for part in properties.values()
        ):
            continue
        for kind, by_type in values.items():
            if all(part["type"] in by_type for part in properties.values()):
                arguments = {key: by_type[part["type"]] for key, part in properties.items()}
                out[f"{tool.name} with {kind}"] = _call(tool.name, arguments)
    return out


def draw(schema: Any, root: Mapping[str, Any], rng: random.Random, depth: int = DEPTH) -> Any:
    """A JSON value that fits ``schema``; ``root`` holds what ``$ref`` points to."""
    if not isinstance(schema, Mapping):
        return _word(rng)
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target.get(part, {}) if isinstance(target, Mapping) else {}
        return draw(target, root, rng, depth)
    if "enum" in schema:
        return rng.choice(list(schema["enum"]))
    if "const" in schema:
        return schema["const"]
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return draw(rng.choice(list(schema[keyword])), root, rng, depth)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = rng.choice(kind)
    match kind:
        case "integer":
            return rng.randint(*_bounds(schema))
        case "number":
            return float(rng.randint(*_bounds(schema)))
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case "array":
            return _draw_list(schema, root, rng, depth)
        case "object":
            required = schema.get("required", ())
            return {
                key: draw(part, root, rng, depth - 1)
                for key, part in schema.get("properties", {}).items()
                if key in required or (depth > 0 and rng.random() < 0.5)
            }
    text = _word(rng)
    while len(text) < schema.get("minLength", 0):
        text += _word(rng)
    return text[: schema.get("maxLength", len(text))]


def _draw_list(
    schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, depth: int
) -> list[Any]:
    if "prefixItems" in schema:
        return [draw(part, root, rng, depth - 1) for part in schema["prefixItems"]]
    least = schema.get("minItems", 0)
    most = max(least, min(schema.get("maxItems", least + 2), least + 2)) if depth > 0 else least
    return [draw(schema.get("items", {}), root, rng, depth - 1) for _ in range(rng.randint(least, most))]


def _bounds(schema: Mapping[str, Any]) -> tuple[int, int]:
    """A range of whole numbers within the schema's bounds, small where it sets none."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", None))
    high = schema.get("maximum", schema.get("exclusiveMaximum", None))
    if low is None:
        low = min(0, high) if high is not None else 0
    if high is None:
        high = max(10, low + 10)
    least = int(low) + (1 if "exclusiveMinimum" in schema or int(low) < low else 0)
    most = int(high) - (1 if "exclusiveMaximum" in schema and int(high) == high else 0)
    return least, max(least, most)


def _takes(schema: Any, value: Any, root: Mapping[str, Any]) -> bool:
    """Whether the schema might take ``value``; true where it is too involved to say."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if not isinstance(kind, str) or schema.get("nullable"):
        return True
    actual = {type(None): "null", list: "array", dict: "object", bool: "boolean"}[type(value)]
    return kind == actual


def _call(name: str, arguments: Mapping[str, Any], *, error: str | None = None, raw: str = "") -> Message:
    return Message.assistant("", ToolCall(name=name, arguments=arguments, error=error, raw=raw))


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 8)))
