"""What each of TRL's arguments does here: honoured, and where, or refused, and what to use instead.

    python -m turnwise.compat.fields            # writes the tables into docs/trl.md

Nothing is ignored in silence. A field that is not honoured is refused when it is set to something else than
its default; of those that could only make TRL faster or smaller, what is set is told at the run's start, and
so is what does nothing beside another setting (`Plan.notes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from turnwise.errors import RecipeError

BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
"""Around the tables in docs/trl.md."""


@dataclass(frozen=True, slots=True)
class Honoured:
    """A field that does what it does in TRL, or the nearest to it, which ``by`` then says."""

    by: str
    """What it is here."""
    at: str = "plan"
    """Where that is seen: ``plan`` for what `turnwise.compat.translate` makes of it, ``compat`` for what the
    trainers read, the module of transformers that does; ``config`` where making the config is all; ``script``
    for what transformers leaves to whoever calls the trainer."""


@dataclass(frozen=True, slots=True)
class Told:
    """A field that would only change how fast something is done, or in how much memory, and does nothing."""

    why: str
    also: tuple[Any, ...] = ()
    """Values beside the default of which nothing need be told."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is not taken."""

    why: str
    """And what to use instead."""
    also: tuple[Any, ...] = ()
    """Values beside the default that ask for what is done anyway."""


Field = Honoured | Told | Refused
Fields = Mapping[str, Field]


def fields_of(config: type) -> Fields:
    """What a config's fields do, by name.

    Args:
        config: One of ours, TRL's own, or a class made from one.
    """
    from turnwise.compat.fields_rl import GRPO, ONLINE, OWN, RLOO
    from turnwise.compat.fields_sft import SFT
    from turnwise.compat.fields_training import TRAINING

    tables = {
        "GRPOConfig": {**TRAINING, **ONLINE, **OWN, **GRPO},
        "RLOOConfig": {**TRAINING, **ONLINE, **OWN, **RLOO},
        "SFTConfig": {**TRAINING, **SFT},
    }
    for base in config.__mro__:
        if base.__name__ in tables:
            return tables[base.__name__]
    raise TypeError(f"{config.__name__} is none of {', '.join(tables)}")


def defaults(config: type) -> Mapping[str, Any]:
    """Every field's default, by name."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }


def is_set(args: Any, name: str) -> bool:
    """Whether a field has another value than its default; one that the config does not have was not given."""
    own = defaults(type(args))
    return name in own and _plain(getattr(args, name)) != _plain(own[name])


def check(args: Any) -> None:
    """Refuse what is not taken.

    Raises:
        RecipeError: Fields are set that are refused; the message has a line for each.
    """
    found = [
        f"{name}={_plain(getattr(args, name))!r}: {field.why}"
        for name, field in fields_of(type(args)).items()
        if isinstance(field, Refused) and _differs(args, name, field)
    ]
    if found:
        what = "an argument is" if len(found) == 1 else f"{len(found)} arguments are"
        raise RecipeError("\n  ".join([f"{type(args).__name__}: {what} not taken:", *found]))


def told(args: Any) -> list[str]:
    """What is set and does nothing, one line each."""
    return [
        f"{name} does nothing: {field.why}"
        for name, field in fields_of(type(args)).items()
        if isinstance(field, Told) and _differs(args, name, field)
    ]


def _differs(args: Any, name: str, field: Told | Refused) -> bool:
    value = getattr(args, name)
    derived = getattr(args, "_derived", {})
    if name in derived and derived[name] == value:
        return False  # As transformers has made it of other settings.
    return is_set(args, name) and _plain(value) not in field.also


def _plain(value: Any) -> Any:
    """Enums by what they stand for, and settings of which none is set by None: transformers makes these."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value == type(value)():
        return None
    return value


# -- docs ---------------------------------------------------------------------------------------------

PARTS = {
    "All trainers: transformers' `TrainingArguments`": ("turnwise.compat.fields_training", "TRAINING"),
    "`GRPOConfig` and `RLOOConfig`": ("turnwise.compat.fields_rl", "ONLINE"),
    "`GRPOConfig` and `RLOOConfig`: Turnwise's own": ("turnwise.compat.fields_rl", "OWN"),
    "`GRPOConfig` alone": ("turnwise.compat.fields_rl", "GRPO"),
    "`RLOOConfig` alone": ("turnwise.compat.fields_rl", "RLOO"),
    "`SFTConfig`": ("turnwise.compat.fields_sft", "SFT"),
}


def tables() -> str:
    """The tables of docs/trl.md."""
    return "\n\n".join("\n".join(_table(title, *place)) for title, place in PARTS.items()) + "\n"


def _table(title: str, module: str, name: str) -> Iterator[str]:
    import importlib

    fields: Fields = getattr(importlib.import_module(module), name)
    yield f"### {title}"
    yield ""
    yield "| field | | |"
    yield "|---|---|---|"
    for key, field in sorted(fields.items(), key=lambda one: (_KINDS.index(type(one[1])), one[0])):
        match field:
            case Honoured(by):
                yield f"| `{key}` | honoured | {by} |"
            case Told(why, _):
                yield f"| `{key}` | told | {why} |"
            case Refused(why, also):
                alike = ", ".join(f"`{one}`" for one in also)
                yield f"| `{key}` | refused | {why}{f' ({alike} may stand there)' if alike else ''} |"


_KINDS = [Honoured, Told, Refused]


def with_tables(page: str) -> str:
    """A page with the present tables between its markers.

    Raises:
        ValueError: It has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END} to put the tables between")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> None:
    """Write the tables into docs/trl.md of the working directory."""
    path = Path("docs/trl.md")
    page = path.read_text(encoding="utf-8") if path.exists() else f"# TRL's arguments\n\n{BEGIN}\n{END}\n"
    path.write_text(with_tables(page), encoding="utf-8")


if __name__ == "__main__":
    # The module that the tables were made with, which this one is not when it is run.
    from turnwise.compat import fields

    fields.main()
