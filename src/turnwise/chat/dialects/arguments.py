"""Arguments that a family writes as bare text: what ``7`` means, only the tool's schema can say.

Such families write strings as they are and everything else as JSON, or as Python does where a template says
no more than ``| string``. So the text is read as a value where the schema allows such a value, and is a
string where it allows strings:

    schema says            text        value
    string                 7           "7"
    integer                7           7
    integer or string      7           7
    string or null         null        None
    integer                seven       "seven"
    nothing                [1, 2]      [1, 2]
    nothing                left        "left"

What fits neither way is kept as it reads, as a value or else as text: whether arguments are any good is
judged where the tool is called, which tells the policy. Nothing is converted: ``3.0`` is no integer and ``1``
no boolean. A parameter that the schema does not know is read as one of which it says nothing.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.chat.dialects.json_text import read_value
from turnwise.types import ToolSchema

_WORDS = {"True": True, "False": False, "None": None}


def parameters_of(name: str, tools: Sequence[ToolSchema]) -> Mapping[str, Any]:
    """The schema of a tool's arguments; an empty one, which says nothing, for a tool that is not there."""
    return next((tool.parameters for tool in tools if tool.name == name), {})


def known_arguments(parameters: Mapping[str, Any]) -> frozenset[str]:
    """The names of the arguments that a schema speaks of."""
    return frozenset(parameters.get("properties") or ())


def read_argument(text: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """The value that bare text stands for.

    Args:
        text: As it was written, without what belongs to the family's form.
        key: The argument's name.
        parameters: The schema of all of the tool's arguments.

    Raises:
        RecursionError: It is nested past what Python reads.
    """
    properties = parameters.get("properties") or {}
    schema = properties[key] if key in properties else parameters.get("additionalProperties", True)
    string = accepts(text, schema, parameters)
    values = _values(text.strip(), python=not string)
    if values and (accepts(values[0], schema, parameters) or not string):
        return values[0]
    return text


def write_argument(value: Any) -> str:
    """The bare text of a value: what `read_argument` reads."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def accepts(value: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a schema allows values of this kind; what is inside of them is not looked at.

    Args:
        value: A JSON value.
        schema: Of the argument.
        root: Holds what ``$ref`` points to.
    """
    if not isinstance(schema, Mapping):
        return schema is not False
    if "$ref" in schema:
        return accepts(value, _resolve(str(schema["$ref"]), root), root)
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema or "const" in schema:
        allowed = schema["enum"] if "enum" in schema else [schema["const"]]
        return bool(_kinds(value) & frozenset().union(*map(_kinds, allowed)))
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return any(accepts(value, part, root) for part in schema[keyword])
    if not all(accepts(value, part, root) for part in schema.get("allOf", ())):
        return False
    kind = schema.get("type", "object" if "properties" in schema else None)
    if kind is None:
        return True
    return bool(_kinds(value) & frozenset([kind] if isinstance(kind, str) else kind))


def _values(text: str, *, python: bool) -> list[Any]:
    """The value that is no string and that the whole text spells; nothing where it spells none."""
    if text in _WORDS:
        return [_WORDS[text]]
    try:
        value, end = read_value(text)
    except ValueError:
        return _literals(text) if python and text.startswith(("[", "{")) else []
    return [value] if end == len(text) and not isinstance(value, str) else []


def _literals(text: str) -> list[Any]:
    """A list or a dict as Python writes it, if all in it are JSON values."""
    try:
        value = ast.literal_eval(text)
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (ValueError, TypeError, SyntaxError, MemoryError):
        return []
    return [value] if same else []


def _kinds(value: Any) -> frozenset[str]:
    """What JSON schema calls a value."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    names = {str: "string", float: "number", list: "array", dict: "object"}
    return frozenset({names[type(value)]})


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What ``#/$defs/Name`` points to; a schema that says nothing where it points nowhere."""
    target: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        target = target.get(part) if isinstance(target, Mapping) else None
    return True if target is None else target
