"""A tool's schema from its signature and docstring.

    @tool
    def move(self, direction: Literal["left", "right"], steps: int = 1) -> str:
        "Move the paddle."

    {"type": "object", "required": ["direction"], "properties": {
        "direction": {"type": "string", "enum": ["left", "right"]},
        "steps": {"type": "integer", "default": 1}}}

Schemas have the form that ``transformers.utils.get_json_schema`` makes (``nullable``, type lists), because
chat templates are written for it; a default is added. One docstring line is enough. All of it is read when
the class is loaded, so that a missing type hint is an error then, not in the middle of a run.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, Required, Union

from turnwise.envs.validate import fits, log, unchecked_keywords
from turnwise.errors import EnvSpecError
from turnwise.types import ToolSchema

Build = Callable[[Any], Any]
"""Makes the Python value that the hint promises (an enum member, a dataclass) out of a checked JSON value."""

SCALARS: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
}  # fmt: skip
BOUNDS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
    "min_length": "minLength", "max_length": "maxLength", "multiple_of": "multipleOf",
}  # fmt: skip
"""Attributes of ``annotated-types`` metadata (pydantic's ``Field``), and the keywords that mean the same."""
LIST_BOUNDS = {"minLength": "minItems", "maxLength": "maxItems"}
SECTION = re.compile(
    r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?|Attributes|Warnings?|See Also):\s*$"
)
ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
SUPPORTED = (
    "str, int, float, bool, None, Any, Literal, Enum, list, tuple, dict[str, …], Optional, Union, Annotated, "
    "TypedDict, dataclass, pydantic model"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A function as a tool: what the model sees, and how checked arguments become Python values."""

    schema: ToolSchema
    builders: Mapping[str, Build]
    """For the parameters that are not plain JSON."""


def describe_function(
    function: Callable[..., Any], *, name: str | None = None, owner: type | None = None, method: bool = True
) -> Described:
    """The schema of ``function``.

    Args:
        function: A function, or a method taken from its class.
        name: What the model calls it by; its own name if not given.
        owner: The class that it belongs to.
        method: Its first parameter is ``self`` and is not shown.

    Raises:
        EnvSpecError: A parameter has no type hint, or one that no JSON value can satisfy; no docstring.
    """
    where = f"{owner.__name__}.{function.__name__}" if owner else function.__name__
    parameters = list(inspect.signature(function).parameters.values())[1 if method else 0 :]
    hints = _hints(function, owner, where)
    description, documented = parse_docstring(function.__doc__ or "")
    if not description:
        raise EnvSpecError(f"tool {where} has no docstring: write one line that tells the model what it does")
    properties: dict[str, Any] = {}
    builders: dict[str, Build] = {}
    definitions: dict[str, Any] = {}
    for parameter in parameters:
        here = f"tool {where}: parameter '{parameter.name}'"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise EnvSpecError(
                f"{here} is {parameter.kind.description}: tools are called by keyword, name each"
            )
        if parameter.name not in hints:
            raise EnvSpecError(f"{here} has no type hint: add one, such as '{parameter.name}: str'")
        schema, build = describe_hint(hints[parameter.name], here)
        definitions.update(schema.pop("$defs", {}))
        if parameter.name in documented:
            schema["description"] = documented[parameter.name]
        if parameter.default not in (parameter.empty, None):
            default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
            if _is_json(default):
                schema["default"] = default
        properties[parameter.name] = schema
        if build is not None:
            builders[parameter.name] = build
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    whole: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        whole["required"] = required
    if definitions:
        whole["$defs"] = definitions
    return Described(
        schema=ToolSchema(name=name or function.__name__, description=description, parameters=whole),
        builders=builders,
    )


def explicit_schema(declared: Any, where: str) -> ToolSchema:
    """A schema written by hand: ``{name, description, parameters}``, bare or as ``{"type": "function", …}``.

    MCP's ``inputSchema`` and Anthropic's ``input_schema`` are taken for ``parameters``.

    Raises:
        EnvSpecError: It is not such a mapping.
    """
    if isinstance(declared, Mapping) and isinstance(declared.get("function"), Mapping):
        declared = declared["function"]
    if not isinstance(declared, Mapping) or not isinstance(declared.get("name"), str):
        raise EnvSpecError(
            f"{where}: a tool is a mapping with 'name', 'description' and 'parameters'; found {declared!r}"
        )
    name = declared["name"]
    parameters: Any = {"type": "object", "properties": {}}
    for key in ("parameters", "inputSchema", "input_schema"):
        if key in declared:
            parameters = declared[key]
            break
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise EnvSpecError(
            f"{where}: tool '{name}': 'parameters' must be a schema of type 'object'; found {parameters!r}"
        )
    unchecked = unchecked_keywords(parameters)
    if unchecked:
        log.warning("%s: tool '%s': not checked before calls: %s", where, name, ", ".join(sorted(unchecked)))
    description = declared.get("description") or ""
    return ToolSchema(
        name=name,
        description=str(description).strip(),
        parameters={"type": "object", "properties": {}, **parameters},
    )


# ---------------------------------------------------------------------------------------------------
# Type hints


def describe_hint(hint: Any, where: str) -> tuple[dict[str, Any], Build | None]:
    """The JSON schema of a type hint, and what makes its value where that is not plain JSON.

    Raises:
        EnvSpecError: No JSON value can satisfy the hint.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}, None
    if hint in SCALARS:
        return {"type": SCALARS[hint]}, None
    if origin is Annotated:
        return _annotated(args, where)
    if origin in (Required, NotRequired):
        return describe_hint(args[0], where)
    if origin in (Union, types.UnionType):
        return _union(args, where)
    if origin is Literal:
        return _choices(list(args), where), None
    if origin in (tuple,) or hint is tuple:
        return _tuple(args, where)
    if origin in (list, abc.Sequence) or hint in (list, abc.Sequence):
        return _list(args, where)
    if origin in (dict, abc.Mapping) or hint in (dict, abc.Mapping):
        return _dict(args, where)
    if isinstance(hint, typing.NewType):
        return describe_hint(hint.__supertype__, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choices([member.value for member in hint], where), hint
    if typing.is_typeddict(hint):
        return _typed_dict(hint, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint, where)
    if isinstance(hint, type) and hasattr(hint, "model_json_schema") and hasattr(hint, "model_validate"):
        return dict(hint.model_json_schema()), hint.model_validate
    raise EnvSpecError(f"{where}: no JSON value is a {_name(hint)}; supported are {SUPPORTED}")


def _annotated(args: tuple[Any, ...], where: str) -> tuple[dict[str, Any], Build | None]:
    schema, build = describe_hint(args[0], where)
    marks = [mark for outer in args[1:] for mark in (outer, *getattr(outer, "metadata", ()))]
    for mark in marks:
        text = mark if isinstance(mark, str) else getattr(mark, "description", None)
        if isinstance(text, str):
            schema["description"] = text
        for attribute, keyword in BOUNDS.items():
            bound = getattr(mark, attribute, None)
            if isinstance(bound, int | float):
                schema[LIST_BOUNDS.get(keyword, keyword) if schema.get("type") == "array" else keyword] = (
                    bound
                )
    return schema, build


def _union(args: tuple[Any, ...], where: str) -> tuple[dict[str, Any], Build | None]:
    parts = [describe_hint(arg, where) for arg in args if arg is not type(None)]
    definitions: dict[str, Any] = {}
    for part, _ in parts:
        definitions.update(part.pop("$defs", {}))
    if len(parts) == 1:
        schema, build = parts[0]
    elif all(set(part) == {"type"} and isinstance(part["type"], str) for part, _ in parts):
        schema, build = {"type": sorted({part["type"] for part, _ in parts})}, None
    else:
        schema, build = {"anyOf": [part for part, _ in parts]}, _build_union(parts, {"$defs": definitions})
    if type(None) in args:
        schema = {**schema, "nullable": True}
        build = _unless_none(build) if build else None
    return ({**schema, "$defs": definitions} if definitions else schema), build


def _build_union(parts: list[tuple[dict[str, Any], Build | None]], root: Mapping[str, Any]) -> Build | None:
    if all(build is None for _, build in parts):
        return None

    def build_first_that_fits(value: Any) -> Any:
        for schema, build in parts:
            if fits(value, schema, root):
                return build(value) if build else value
        return value

    return build_first_that_fits


def _unless_none(build: Build) -> Build:
    return lambda value: None if value is None else build(value)


def _choices(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise EnvSpecError(f"{where}: choices must be strings, numbers, booleans or None; found {values!r}")
    kinds = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _list(args: tuple[Any, ...], where: str) -> tuple[dict[str, Any], Build | None]:
    if not args:
        return {"type": "array"}, None
    items, build = describe_hint(args[0], where)
    schema = _lift({"type": "array", "items": items}, items)
    return schema, (lambda value: [build(item) for item in value]) if build else None


def _tuple(args: tuple[Any, ...], where: str) -> tuple[dict[str, Any], Build | None]:
    if not args:
        return {"type": "array"}, tuple
    if len(args) == 2 and args[1] is Ellipsis:
        schema, build = _list(args[:1], where)
        return schema, (lambda value: tuple(build(value))) if build else tuple
    parts = [describe_hint(arg, where) for arg in args]
    schema = _lift(
        {"type": "array", "prefixItems": [part for part, _ in parts]}, *(part for part, _ in parts)
    )
    return schema, lambda value: tuple(
        build(item) if build else item for item, (_, build) in zip(value, parts, strict=True)
    )


def _dict(args: tuple[Any, ...], where: str) -> tuple[dict[str, Any], Build | None]:
    if not args:
        return {"type": "object"}, None
    if args[0] is not str:
        raise EnvSpecError(f"{where}: the keys of a JSON object are strings; found dict[{_name(args[0])}, …]")
    values, build = describe_hint(args[1], where)
    schema = _lift({"type": "object", "additionalProperties": values or True}, values)
    return schema, (lambda value: {key: build(part) for key, part in value.items()}) if build else None


def _typed_dict(hint: Any, where: str) -> tuple[dict[str, Any], Build | None]:
    fields = typing.get_type_hints(hint, include_extras=True)
    # `__required_keys__` does not see NotRequired in a module with postponed annotations; the hints do.
    required = [
        name
        for name, part in fields.items()
        if typing.get_origin(part) is Required
        or (name in hint.__required_keys__ and typing.get_origin(part) is not NotRequired)
    ]
    schema, builders = _fields(fields, required, where)
    return schema, (lambda value: _build_fields(value, builders)) if builders else None


def _dataclass(hint: Any, where: str) -> tuple[dict[str, Any], Build | None]:
    hints = typing.get_type_hints(hint, include_extras=True)
    fields = [field for field in dataclasses.fields(hint) if field.init]
    missing = dataclasses.MISSING
    required = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    schema, builders = _fields({field.name: hints[field.name] for field in fields}, required, where)
    return schema, lambda value: hint(**_build_fields(value, builders))


def _fields(
    hints: Mapping[str, Any], required: list[str], where: str
) -> tuple[dict[str, Any], dict[str, Build]]:
    parts = {name: describe_hint(hint, f"{where}: field '{name}'") for name, hint in hints.items()}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: part for name, (part, _) in parts.items()},
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    builders = {name: build for name, (_, build) in parts.items() if build}
    return _lift(schema, *(part for part, _ in parts.values())), builders


def _build_fields(value: Mapping[str, Any], builders: Mapping[str, Build]) -> dict[str, Any]:
    return {name: builders[name](part) if name in builders else part for name, part in value.items()}


def _lift(schema: dict[str, Any], *parts: dict[str, Any]) -> dict[str, Any]:
    """Move the parts' definitions up, since references count from the whole schema's root."""
    definitions: dict[str, Any] = {}
    for part in parts:
        definitions.update(part.pop("$defs", {}))
    return {**schema, "$defs": definitions} if definitions else schema


# ---------------------------------------------------------------------------------------------------
# Signatures and docstrings


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the entries of ``Args:``, of a Google-style docstring."""
    lines = inspect.cleandoc(docstring).splitlines()
    head: list[str] = []
    entries: dict[str, list[str]] = {}
    section, current, indent = "", "", 0
    for line in lines:
        match = SECTION.match(line)
        if match:
            section, current, indent = match[1], "", 0
        elif not section:
            head.append(line.rstrip())
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            entry = ENTRY.match(line.strip()) if depth <= indent else None
            if entry:
                current = entry[1]
                entries[current] = [entry[2]]
            elif current:
                entries[current].append(line.strip())
    described = {name: " ".join(part for part in parts if part) for name, parts in entries.items()}
    return "\n".join(head).strip(), {name: text for name, text in described.items() if text}


def _hints(function: Callable[..., Any], owner: type | None, where: str) -> dict[str, Any]:
    """The parameters' type hints; types nested in the class are found, as in the class's own body."""
    nested = {
        key: value
        for klass in reversed(owner.__mro__ if owner else ())
        for key, value in vars(klass).items()
        if isinstance(value, type)
    }
    try:
        hints = typing.get_type_hints(function, localns=nested, include_extras=True)
    except NameError as cause:
        raise EnvSpecError(
            f"tool {where}: a type hint names '{cause.name}', which its module does not define: "
            "hints of tools must be importable at the top of the module"
        ) from cause
    except TypeError as cause:
        raise EnvSpecError(f"tool {where}: a type hint cannot be read: {cause}") from cause
    hints.pop("return", None)
    return hints


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
