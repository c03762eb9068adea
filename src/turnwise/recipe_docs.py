"""``docs/recipes.md``: every key of a recipe with its type, default and help, made from `turnwise.config`.

python -m turnwise.recipe_docs > docs/recipes.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from turnwise.config import Recipe
from turnwise.recipe_yaml import inline

HEAD = """\
# Recipes

A recipe is one YAML file: a model, environments, and the stages to go through. Stages that it does not name
are left out. `turnwise run RECIPE --dry-run` prints it resolved, with every default filled in;
`turnwise run RECIPE rl.steps=10` changes a key for one run (the value is YAML; `rl=null` takes a section
away).

- Keys are closed: an unknown one is an error that names the nearest. So is a key that stands twice, a value
  of another type (nothing is coerced: `"5"` is not 5), and a setting that would do nothing in the chosen
  modes.
- Scalars follow YAML 1.2: `1e-6` is a number, `no` and `on` are text.
- A section that is given starts from the defaults of its own table, not from what the stage would use without
  it: `sft: {optimizer: {lr: 0.001}}` has the optimizer's own constant schedule.

This page is made by `python -m turnwise.recipe_docs > docs/recipes.md`; the text is the fields' own help.
"""


def recipe_docs() -> str:
    """The whole page."""
    return HEAD + "".join(_section(Recipe, "", "The recipe", set()))


def _section(section: type[BaseModel], path: str, title: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    """A table for ``section``, then for the sections in it; one that occurs twice is described once."""
    seen.add(section)
    yield f"\n## {title}\n\n{_one_line(section.__doc__)}\n\n| key | type | default | |\n|---|---|---|---|\n"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        found, through = _inner(field.annotation)
        if found is not None:
            inner.append((f"{path}{name}{through}", found))
        cells = (f"`{name}`", _type(field), _default(field), _one_line(field.description))
        yield f"| {' | '.join(map(_cell, cells))} |\n"
    for place, found in inner:
        if found not in seen:
            yield from _section(found, f"{place}.", f"`{place}`", seen)


def _type(field: FieldInfo) -> str:
    text = _type_name(field.annotation)
    bounds = []
    for bound in field.metadata:
        match bound:
            case Ge(ge=value):
                bounds.append(f"≥ {value}")
            case Gt(gt=value):
                bounds.append(f"> {value}")
            case Le(le=value):
                bounds.append(f"≤ {value}")
            case Lt(lt=value):
                bounds.append(f"< {value}")
    return " ".join([text, ", ".join(bounds)]).strip()


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_name(arg) for arg in args if arg is not NoneType))
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is dict:
        return f"name: {_type_name(args[1])}"
    if origin in (list, tuple):
        return f"list of {_type_name(args[0])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "true, false"}.get(hint, "anything")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump(include=value.model_fields_set)
        return f"`{inline(given)}`" if given else ""
    return "" if value is None else f"`{inline(value)}`"


def _inner(hint: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, and how its place goes on: ``.<name>`` where it holds several."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint, ""
    if get_origin(hint) is dict:
        return _inner(get_args(hint)[1])[0], ".<name>"
    for arg in get_args(hint):
        found, through = _inner(arg)
        if found is not None:
            return found, through
    return None, ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(recipe_docs())
