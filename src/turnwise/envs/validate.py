"""Arguments against a tool's schema, before the tool is called: `direction="up"` never becomes "right".

    check_arguments({"direction": "up"}, schema)
    ArgumentsError: move: direction: expected one of "left", "right"; found "up"

A model learns from what it is told, so every problem says what was expected and what was found, and all
problems of a call are told at once. There is one coercion, because small models drop quotes all the time: a
JSON number given for a ``string`` is taken as its text, and counted. ``true`` is no integer, and neither is
``3.0``. Objects with named properties are closed unless their schema says ``additionalProperties``.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.types import ToolSchema

log = logging.getLogger(__name__)

Json = Mapping[str, Any]

TYPE_NAMES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "a boolean",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
CHECKED = {
    "$ref", "type", "nullable", "enum", "const", "anyOf", "oneOf", "allOf",
    "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
ANNOTATIONS = {
    "$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default", "examples",
    "format", "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip
FOUND_LIMIT = 80
"""Characters of a wrong value that are quoted back."""


class ArgumentsError(ValueError):
    """Arguments that do not fit; the message is meant for the model."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Arguments that fit their schema."""

    arguments: dict[str, Any]
    coerced: int
    """How many numbers were taken as text."""


def check_arguments(arguments: Any, schema: ToolSchema) -> Checked:
    """Validate the arguments of one call; what is returned shares nothing with what was given.

    The call stands in the trajectory, so a tool that changes its arguments must not change what was said.

    Raises:
        ArgumentsError: What does not fit, and the form that the tool expects.
    """
    checker = _Checker(schema.parameters, coerce=True)
    closed = {"type": "object", "additionalProperties": False, **schema.parameters}
    checked = checker.check(arguments, closed, "")
    if checker.problems:
        told = f"{schema.name}: {'; '.join(checker.problems)}"
        told += "" if told.endswith("?") else "."
        if len(checker.problems) > 1:
            told += f" The form is {call_form(schema)}."
        raise ArgumentsError(told)
    return Checked(_unshared(checked), checker.coerced)


def fits(value: Any, schema: Json, root: Json) -> bool:
    """Whether ``value`` fits ``schema`` without coercion; ``root`` holds what ``$ref`` points to."""
    checker = _Checker(root, coerce=False)
    checker.check(value, schema, "")
    return not checker.problems


def call_form(schema: ToolSchema) -> str:
    """How a call looks, in one line: ``price(item: a string, count: an integer, optional)``."""
    properties = schema.parameters.get("properties", {})
    required = schema.parameters.get("required", ())
    parts = [
        f"{name}: {expectation(part, schema.parameters)}{'' if name in required else ', optional'}"
        for name, part in properties.items()
    ]
    return f"{schema.name}({'; '.join(parts)})"


def unchecked_keywords(schema: Any) -> set[str]:
    """Keywords somewhere in ``schema`` that constrain values in ways that are not checked here."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return set().union(*(unchecked_keywords(part) for part in schema))
    if not isinstance(schema, Mapping):
        return set()
    unknown = set(schema) - CHECKED - ANNOTATIONS
    for keyword in ("properties", "$defs", "definitions"):
        for part in schema.get(keyword, {}).values():
            unknown |= unchecked_keywords(part)
    for keyword in ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"):
        unknown |= unchecked_keywords(schema.get(keyword))
    return unknown


def expectation(schema: Any, root: Json) -> str:
    """What ``schema`` asks for, in words: ``a list of integers``, ``one of "left", "right"``."""
    if not isinstance(schema, Mapping):
        return "nothing" if schema is False else "any value"
    if "$ref" in schema:
        target = _resolve(schema["$ref"], root)
        return "an object" if target.get("type") == "object" else expectation(target, root)
    if schema.get("nullable"):
        return _either([expectation({**schema, "nullable": False}, root), "null"])
    if "enum" in schema:
        values = [_json(value) for value in schema["enum"]]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if "const" in schema:
        return _json(schema["const"])
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return _either([expectation(part, root) for part in schema[keyword]])
    kind = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kind, list):
        return _either([expectation({**schema, "type": one}, root) for one in kind])
    if kind == "array" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        return f"a list, each {expectation(schema['items'], root)}"
    if kind == "array" and "prefixItems" in schema:
        return f"a list of {', '.join(expectation(part, root) for part in schema['prefixItems'])}"
    if kind == "object" and schema.get("properties"):
        return f"an object with {', '.join(_quoted(schema['properties']))}"
    bounds = [
        f"{word} {schema[keyword]}"
        for keyword, word in (
            ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if keyword in schema
    ]  # fmt: skip
    return " ".join([TYPE_NAMES.get(str(kind), "any value"), *bounds])


def found(value: Any) -> str:
    """A wrong value as the model is told of it: its JSON text, cut, and its type where that helps."""
    kind = _kind(value)
    text = _json(value)
    if len(text) > FOUND_LIMIT:
        text = text[:FOUND_LIMIT] + "…"
    return text if kind in ("null", "boolean", "object") else f"{text} ({TYPE_NAMES[kind]})"


class _Checker:
    """One pass over one value; collects every problem."""

    __slots__ = ("coerce", "coerced", "problems", "root")

    def __init__(self, root: Json, *, coerce: bool) -> None:
        self.root = root
        self.coerce = coerce
        self.coerced = 0
        self.problems: list[str] = []

    def check(self, value: Any, schema: Any, path: str) -> Any:
        """The value, numbers for strings replaced; problems are noted under ``path``."""
        if not isinstance(schema, Mapping):
            if schema is False:
                self._wrong(value, schema, path)
            return value
        if "$ref" in schema:
            return self.check(value, _resolve(schema["$ref"], self.root), path)
        if value is None and schema.get("nullable"):
            return None
        if "enum" in schema or "const" in schema:
            allowed = schema["enum"] if "enum" in schema else [schema["const"]]
            if not any(_same(value, one) for one in allowed):
                self._wrong(value, schema, path)
            return value
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._alternatives(value, [(part, part) for part in schema[keyword]], schema, path)
        for part in schema.get("allOf", ()):
            value = self.check(value, part, path)
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, str):
            return self._typed(value, kind, schema, path)
        if isinstance(kind, Sequence):
            return self._alternatives(value, [({**schema, "type": one}, one) for one in kind], schema, path)
        return value

    def _typed(self, value: Any, kind: str, schema: Json, path: str) -> Any:
        actual = _kind(value)
        if kind == "string" and actual in ("integer", "number") and self.coerce:
            value, actual = _json(value), "string"
            self.coerced += 1
        if kind == "number" and actual == "integer":
            actual = "number"
        if actual != kind:
            self._wrong(value, schema, path)
        elif kind == "object":
            return self._object(value, schema, path)
        elif kind == "array":
            return self._array(value, schema, path)
        elif kind == "string":
            self._string(value, schema, path)
        elif kind in ("integer", "number"):
            self._number(value, schema, path)
        return value

    def _object(self, value: Mapping[str, Any], schema: Json, path: str) -> dict[str, Any]:
        properties: Json = schema.get("properties", {})
        extra = schema.get("additionalProperties", not properties)
        out: dict[str, Any] = {}
        for key, part in value.items():
            at = f"{path}.{key}" if path else str(key)
            if key in properties:
                out[key] = self.check(part, properties[key], at)
            elif extra is not False:
                out[key] = self.check(part, extra, at)
            else:
                self.problems.append(_no_such(at, str(key), properties, whole=path == ""))
        for key in schema.get("required", ()):
            if key not in value:
                at = f"{path}.{key}" if path else key
                self.problems.append(
                    f"{at} is missing; expected {expectation(properties.get(key), self.root)}"
                )
        return out

    def _array(self, value: Sequence[Any], schema: Json, path: str) -> list[Any]:
        parts = schema.get("prefixItems")
        if parts is not None and "items" not in schema and len(value) != len(parts):
            self.problems.append(f"{path}: expected {len(parts)} items; found {len(value)}")
            return list(value)
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not least <= len(value) <= most:
            bound = f"at least {least}" if len(value) < least else f"at most {most}"
            self.problems.append(f"{path}: expected {bound} items; found {len(value)}")
        parts = parts or ()
        rest = schema.get("items")
        return [
            self.check(item, parts[i] if i < len(parts) else rest, f"{path}[{i}]")
            for i, item in enumerate(value)
        ]

    def _string(self, value: str, schema: Json, path: str) -> None:
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if not least <= len(value) <= most:
            bound = f"at least {least}" if len(value) < least else f"at most {most}"
            self.problems.append(f"{path}: expected {bound} characters; found {len(value)}")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            self.problems.append(f"{path}: expected text matching {schema['pattern']}; found {found(value)}")

    def _number(self, value: float, schema: Json, path: str) -> None:
        # An integer may be too large to be asked: `math.isfinite` would make a float of it.
        within = (
            (isinstance(value, int) or math.isfinite(value))
            and value >= schema.get("minimum", -math.inf)
            and value <= schema.get("maximum", math.inf)
            and value > schema.get("exclusiveMinimum", -math.inf)
            and value < schema.get("exclusiveMaximum", math.inf)
        )
        if not within:
            self._wrong(value, schema, path)
        elif "multipleOf" in schema and not _is_multiple(value, schema["multipleOf"]):
            self.problems.append(f"{path}: expected a multiple of {schema['multipleOf']}; found {value}")

    def _alternatives(self, value: Any, parts: list[tuple[Any, Any]], schema: Json, path: str) -> Any:
        """The first alternative that fits as it is; else the first that fits with a number taken as text."""
        for part, _ in parts:
            if fits(value, part, self.root):
                return value
        if self.coerce:
            for part, _ in parts:
                trial = _Checker(self.root, coerce=True)
                changed = trial.check(value, part, path)
                if not trial.problems:
                    self.coerced += trial.coerced
                    return changed
        self._wrong(value, schema, path)
        return value

    def _wrong(self, value: Any, schema: Any, path: str) -> None:
        text = found(value)
        if isinstance(value, str) and isinstance(schema, Mapping) and "enum" in schema:
            text = text.removesuffix(" (a string)")
        self.problems.append(
            f"{path or 'arguments'}: expected {expectation(schema, self.root)}; found {text}"
        )


def _is_multiple(value: float, of: float) -> bool:
    try:
        return value % of == 0
    except OverflowError:  # An integer that no float can hold, against a step that is one.
        return False


def _unshared(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value) if isinstance(value, list | dict) else value
        for name, value in arguments.items()
    }


def _no_such(at: str, key: str, properties: Json, *, whole: bool) -> str:
    near = difflib.get_close_matches(key, properties, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    elif properties:
        hint = f"allowed: {', '.join(properties)}"
    else:
        hint = "it takes none" if whole else "none is allowed"
    return f"{at} is no {'parameter' if whole else 'known key'}; {hint}"


def _resolve(reference: str, root: Json) -> Json:
    """What ``#/$defs/Name`` points to; anything where it points nowhere, as the schema then says nothing."""
    target: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        target = target.get(part) if isinstance(target, Mapping) else None
    if not isinstance(target, Mapping):
        log.warning("schema reference %s points nowhere: the value is not checked", reference)
        return {}
    return target


def _kind(value: Any) -> str:
    """The JSON type of a parsed value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "object" if isinstance(value, Mapping) else "array"


def _same(value: Any, allowed: Any) -> bool:
    """Equality of JSON values: 1, 1.0 and true are three."""
    if isinstance(value, str) or isinstance(allowed, str):
        return bool(value == allowed)
    return _json(value) == _json(allowed)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)


def _either(parts: list[str]) -> str:
    return " or ".join(dict.fromkeys(parts))


def _quoted(names: Mapping[str, Any]) -> list[str]:
    return [json.dumps(name, ensure_ascii=False) for name in names]
