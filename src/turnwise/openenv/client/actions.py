"""`TypedAction`: the JSON schema of a server's actions as tools.

{"properties": {"column": …}}                    one tool
{"oneOf": [{"$ref": "#/$defs/Move"}, …]}         one for each member of the union, told by its constants
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turnwise.errors import EnvSpecError
from turnwise.types import ToolSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedAction:
    """The tool that stands for a server's actions, or for one kind of them."""

    schema: ToolSchema
    constants: Mapping[str, Any]
    """Fields of the action that have one value only, which the policy is not asked for."""


def action_schema(said: Any, url: str) -> Mapping[str, Any]:
    """The JSON schema of a server's actions; one that is a ``$ref`` is what that names.

    Raises:
        EnvSpecError: It is none.
    """
    action = _named(mapping(said), said)
    kinds = [action, *(members(action) or ())]
    parts = [part for kind in kinds for part in (kind.get("properties", {}), kind.get("$defs", {}))]
    well = all(
        isinstance(part, Mapping) and all(isinstance(one, Mapping) for one in part.values()) for part in parts
    ) and all(isinstance(kind.get("required", []), list) for kind in kinds)
    if not (isinstance(said, Mapping) and well):
        raise EnvSpecError(f"{url}/schema: the action's is no JSON schema of an object: {said!r:.200}")
    return action


def members(action: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The schemas that an action which is a union is one of; None where it is none."""
    if _union(action) is None:
        return None
    found: list[Mapping[str, Any]] = []
    left, seen = [dict(action)], set[str]()
    while left:
        part = left.pop(0)
        if (where := str(part.get("$ref", ""))) in seen:
            continue
        seen |= {where} - {""}
        part = _named(part, action)
        if (union := _union(part)) is not None:
            left += map(mapping, union)
        else:
            found.append({**part, "$defs": mapping(action.get("$defs"))})
    return found


def typed_actions(action: Mapping[str, Any], url: str) -> tuple[TypedAction, ...]:
    """A tool from the JSON schema of an environment's actions; of a union one for each member.

    A member is told by the constants that it has, such as ``kind``; those of MCP are left to MCP.

    Raises:
        EnvSpecError: The schema is that of no object with fields, or two members have one name.
    """
    kinds = members(action)
    if kinds is None:
        return (typed_action(action, url),)
    typed = tuple(typed_action(kind, url, alone=False) for kind in kinds if not is_mcp(kind))
    names = [one.schema.name for one in typed]
    if not names or len(set(names)) < len(names):
        found = f"two of one name: {', '.join(names)}" if names else "none that is no MCP tool call"
        raise EnvSpecError(f"{url}: the environment's action is one of several, of which there are {found}")
    return typed


def typed_action(action: Mapping[str, Any], url: str, *, alone: bool = True) -> TypedAction:
    """One tool from a JSON schema; ranges, choices and defaults are kept.

    Args:
        action: Of all actions, or of a member of their union.
        url: The server, for errors.
        alone: There is no other: it must have fields to choose.

    Raises:
        EnvSpecError: The schema is that of no object with fields.
    """
    properties = dict(action.get("properties", {}))
    required = list(action.get("required", ()))
    if "metadata" not in required:
        properties.pop("metadata", None)  # OpenEnv's own, on every action.
    constants = {name: part["const"] for name, part in properties.items() if "const" in part}
    shown = {name: untitled(part) for name, part in properties.items() if name not in constants}
    if not shown and (alone or not constants):
        raise EnvSpecError(
            f"{url}: the environment lists no MCP tools, and its actions have no fields to make a tool of"
        )
    parameters: dict[str, Any] = {"type": "object", "properties": shown}
    if needed := [name for name in required if name in shown]:
        parameters["required"] = needed
    if defs := _needed(shown, mapping(action.get("$defs"))):
        parameters["$defs"] = {name: untitled(part) for name, part in defs.items()}
    if "additionalProperties" in action:
        parameters["additionalProperties"] = action["additionalProperties"]
    title = re.sub(r"Action$", "", str(action.get("title", "")))
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", title).lower()
    description = str(action.get("description") or "Act in the environment.")
    schema = ToolSchema(
        name=re.sub(r"\W+", "_", name).strip("_") or "act", description=description, parameters=parameters
    )
    return TypedAction(schema=schema, constants=constants)


def _named(schema: dict[str, Any], within: Any) -> dict[str, Any]:
    """What a ``$ref`` among the ``$defs`` names, or the schema itself."""
    where = schema.get("$ref")
    if not isinstance(where, str):
        return schema
    named = mapping(mapping(mapping(within).get("$defs")).get(where.removeprefix("#/$defs/")))
    return {**schema, **named}


def _needed(part: Any, defs: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions that a schema refers to, and those that they do."""
    found: dict[str, Any] = {}
    left = [part]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            left += part.values()
            name = str(part.get("$ref", "")).removeprefix("#/$defs/")
            if name in defs and name not in found:
                found[name] = defs[name]
                left.append(defs[name])
        elif isinstance(part, list):
            left += part
    return {name: defs[name] for name in defs if name in found}


def _union(schema: Mapping[str, Any]) -> list[Any] | None:
    union = schema.get("oneOf", schema.get("anyOf"))
    return union if isinstance(union, list) and not schema.get("properties") else None


def is_mcp(member: Mapping[str, Any]) -> bool:
    """Whether an action is `CallToolAction` or `ListToolsAction`."""
    properties = mapping(member.get("properties"))
    kind = mapping(properties.get("type")).get("const")
    return kind == "list_tools" or properties.keys() >= {"tool_name", "arguments"}


def untitled(schema: Any) -> Any:
    """A schema without the titles that pydantic writes, which say what names say already."""
    if isinstance(schema, list):
        return [untitled(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for key, part in schema.items():
        if key == "title" and isinstance(part, str):
            continue
        if key in ("properties", "$defs", "definitions") and isinstance(part, Mapping):
            out[key] = {name: untitled(one) for name, one in part.items()}
        elif key in ("default", "const", "enum", "examples"):
            out[key] = part
        else:
            out[key] = untitled(part)
    return out


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    return value if isinstance(value, dict) else {}
