"""YAML as recipes are written in it: a mapping, each key once, scalars by YAML 1.2's rules.

PyYAML follows YAML 1.1, in which ``1e-6`` and ``2E5`` are text, ``no`` and ``on`` are booleans, ``010`` is
eight and ``1:30`` is ninety. None of that is what the author of a recipe means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from turnwise.errors import RecipeError

_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"<<"), "<"),
)
"""YAML 1.2.2, §10.3.2: tag, what is written so, and what it may begin with."""


_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:+-]*(?<!:)")


class _Loader(yaml.SafeLoader):
    """Keys are text and stand once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as yaml declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"line {line}: a key must be text, found {key!r}; quote it")
            if key in lines:
                raise RecipeError(f"line {line}: the key '{key}' stands on line {lines[key]} already")
            lines[key] = line
        return super().construct_mapping(node, deep=deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _tag, _pattern, _first in _CORE_SCHEMA:
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(_tag, _whole, ["" if char == "\0" else char for char in _first])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


def parse_value(text: str) -> Any:
    """One YAML value, such as an override's.

    Raises:
        RecipeError: It is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as cause:
        raise RecipeError(f"{text!r} is not YAML: {_problem(cause)}") from cause


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping in ``text``.

    Args:
        text: YAML.
        source: What it is called in messages: the file's path.

    Raises:
        RecipeError: It is not YAML, not a mapping, empty, or holds a key twice.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as cause:
        raise RecipeError(f"{source} is not YAML: {_problem(cause)}") from cause
    except RecipeError as error:
        raise RecipeError(f"{source}, {error}") from None
    if data is None:
        raise RecipeError(f"{source} is empty; a recipe is a mapping that begins with 'name: …'")
    if not isinstance(data, dict):
        raise RecipeError(f"{source} must be a mapping of keys to values, found a {type(data).__name__}")
    return data


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line of each key, by its place: ``{("rl", "steps"): 12}``; of text that `parse_mapping` takes."""
    found: dict[tuple[str, ...], int] = {}

    def visit(node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*at, key.value)] = key.start_mark.line + 1
                visit(value, (*at, key.value))

    visit(yaml.compose(text, Loader=_Loader), ())
    return found


def inline(value: Any) -> str:
    """``value`` as YAML on one line, which YAML 1.1 and 1.2 read alike."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inline(key)}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, float):
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and parse_value(text) == text and yaml.safe_load(text) == text:
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', width=10**9, allow_unicode=True)
    return quoted.removesuffix("\n")


def _problem(cause: yaml.YAMLError) -> str:
    mark = getattr(cause, "problem_mark", None)
    problem = getattr(cause, "problem", None) or str(cause)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
