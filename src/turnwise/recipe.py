"""Loading recipes: YAML and overrides in, a checked `Recipe` out; errors name the file, line and remedy.

    recipe = load_recipe("recipes/quickstart.yaml", ["rl.steps=10", "environments.catch.args={rows: 4}"])
    print(resolved(recipe))         # the same recipe with every default filled in

Keys and types are `turnwise.config`'s; what may not stand together is `turnwise.recipe_rules`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import orjson
from pydantic import BaseModel, ValidationError

from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.recipe_rules import idle_keys, made_stages, nearest, problems
from turnwise.recipe_yaml import inline, key_lines, parse_mapping, parse_value

if TYPE_CHECKING:
    from rich.console import Console

Place = tuple[str, ...]
"""Where a key stands: ``("rl", "optimizer", "lr")``."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, change and check a recipe.

    Args:
        path: A YAML file (YAML 1.2's rules: ``1e-6`` is a number, ``no`` and ``on`` are text).
        overrides: ``a.b=value`` each, the value in YAML; ``rl=null`` takes a section away.

    Raises:
        RecipeError: The file cannot be read or is no YAML mapping, a key is unknown or stands twice, a value
            has another type, or settings contradict one another. All that was found is in one message.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise RecipeError(f"cannot read the recipe {path}: {cause}") from cause
    data = parse_mapping(text, str(path))
    overridden = [_override(data, override) for override in overrides]
    try:
        # By way of JSON: pydantic's strict mode then takes a list for a tuple, and nothing else for anything.
        recipe = Recipe.model_validate_json(orjson.dumps(data), strict=True)
    except orjson.JSONEncodeError as cause:
        raise RecipeError(f"{path}: holds what a recipe cannot: {cause}") from cause
    except ValidationError as error:
        lines_of = {place: line for place, line in key_lines(text).items() if place not in overridden}
        raise RecipeError(_message(path, _explain(error, data, lines_of))) from None
    if found := problems(recipe):
        raise RecipeError(_message(path, found))
    return recipe


def _override(data: dict[str, Any], override: str) -> Place:
    key, equals, text = override.partition("=")
    place = tuple(key.strip().split("."))
    if not equals or not all(place):
        raise RecipeError(f"an override is key=value, such as rl.steps=10; found {override!r}")
    section = data
    for depth, part in enumerate(place[:-1], 1):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(place[:depth])} is {inline(inner)}, which has no keys"
            )
        section = inner
    section[place[-1]] = parse_value(text)
    return place


# ---------------------------------------------------------------------------------------------------
# Errors


def _message(path: Path, found: Sequence[str]) -> str:
    if len(found) == 1:
        return f"{path}: {found[0]}"
    return "\n  ".join([f"{path}: {len(found)} problems", *found])


def _explain(error: ValidationError, data: dict[str, Any], lines_of: Mapping[Place, int]) -> list[str]:
    """One message for each key, in the words of recipes."""
    found: dict[Place, list[str]] = {}
    for detail in error.errors(include_url=False):
        place = _place(detail["loc"], data, missing=detail["type"] == "missing")
        if detail["type"] == "extra_forbidden":
            text = "unknown key" + _remedy(place)
        elif detail["type"] == "missing":
            text = "is required"
        else:
            text = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            text = (
                text.replace("an object", "a mapping")
                .replace("a valid ", "a ")
                .replace("a integer", "an integer")
            )
            text = text.replace("must have at least 1 item", "must not be empty")
        found.setdefault(place, []).append(text)
    messages = []
    for place, texts in found.items():
        value = _value_at(data, place)
        text = " or ".join(dict.fromkeys(texts)).replace(" or must be", " or")
        if text.startswith("must"):
            text += f"; found {inline(value)}"
        line = lines_of.get(place)
        name = ".".join(place) or "recipe"
        messages.append(f"line {line}: {name}: {text}" if line else f"{name}: {text}")
    return messages


def _place(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> Place:
    """A location of pydantic's without the names of union members that it puts in between."""
    place: list[str] = []
    for number, part in enumerate(loc):
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
        elif not (missing and number == len(loc) - 1):
            continue
        place.append(str(part))
    return tuple(place)


def _value_at(data: Any, place: Place) -> Any:
    for part in place:
        if isinstance(data, list):
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
    return data


def _remedy(place: Place) -> str:
    """What the author of an unknown key may have meant: a key spelt alike here, or of this name elsewhere."""
    section: Any = Recipe
    for part in place[:-1]:
        section = _inner(section, part)
    allowed = list(section.model_fields)
    text = nearest(place[-1], allowed)
    if not text:
        alike = [known for known in _places(Recipe) if known[-1] == place[-1]]
        if alike:
            text = f"; did you mean {' or '.join('.'.join(known) for known in alike[:3])}?"
    return f"{text or ';'} allowed {'here are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}"


def _inner(section: Any, key: str) -> Any:
    """The section under ``key``: a field of a section, or an entry of a mapping of sections."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        section = section.model_fields[key].annotation
        if get_origin(section) in (Union, UnionType):
            section = next(member for member in get_args(section) if member is not type(None))
        return section
    return get_args(section)[1]


def _places(section: type[BaseModel], at: Place = ()) -> Iterator[Place]:
    for name in section.model_fields:
        place = (*at, name)
        yield place
        inner = _inner(section, name)
        if get_origin(inner) is dict:
            inner, place = get_args(inner)[1], (*place, "<name>")
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _places(inner, place)


# ---------------------------------------------------------------------------------------------------
# Writing a recipe out

_NONE: Any = object()
"""The default of a key that must be given."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a resolved recipe."""

    depth: int
    key: str
    value: str
    """YAML; empty where deeper lines follow."""
    changed: bool
    """Whether it differs from the default, or has none."""


def lines(recipe: Recipe) -> Iterator[Line]:
    """The recipe with every default filled in, in the order of its fields.

    What does nothing in the chosen modes is left out, so that the lines load as the same recipe again.
    """
    return _lines(recipe, None, (), idle_keys(recipe).keys(), made_stages(recipe))


def _lines(
    section: BaseModel, usual: BaseModel | None, at: Place, idle: Collection[str], made: Sequence[str]
) -> Iterator[Line]:
    """The lines of a section; ``usual`` is what stands there where the recipe says nothing."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, place = getattr(section, name), (*at, name)
        if ".".join(place) in idle:
            continue
        if isinstance(usual, type(section)):
            default = getattr(usual, name)
        else:
            default = _NONE if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            inner = list(_lines(value, default, place, idle, made))
            if inner:
                yield Line(len(at), name, "", value != default)
                yield from inner
        elif isinstance(value, dict) and any(isinstance(entry, BaseModel) for entry in value.values()):
            yield Line(len(at), name, "", True)
            for key, entry in value.items():
                yield Line(len(place), inline(key), "", True)
                yield from _lines(entry, None, (*place, key), idle, made)
        else:
            shown = plain[name]
            if place == ("evaluate", "stages"):
                shown = [stage for stage in shown if stage in made]
            yield Line(len(at), name, inline(shown), value != default)


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in: loads as the same recipe again."""
    return "".join(f"{'  ' * line.depth}{line.key}: {line.value}".rstrip() + "\n" for line in lines(recipe))


def show(recipe: Recipe, console: Console | None = None) -> None:
    """Print the recipe, resolved; on a terminal what differs from the defaults stands out."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    text = Text()
    for line in lines(recipe):
        style = "" if not line.value else "bold green" if line.changed else "dim"
        text.append(f"{'  ' * line.depth}{line.key}:")
        text.append(f" {line.value}\n" if line.value else "\n", style=style)
    console.print(text, end="", soft_wrap=True)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two resolved recipes: ``rl.steps: 40 before, 60 now``.

    Args:
        old: The mapping of a run's ``recipe.yaml``; it may be from another version of Turnwise.
        new: That of `resolved` of the recipe at hand.
    """
    before, now = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {inline(before[key]) if key in before else 'not there'} before, "
        f"{inline(now[key]) if key in now else 'not there'} now"
        for key in {**before, **now}
        if key not in before or key not in now or before[key] != now[key]
    ]


def _flat(data: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
