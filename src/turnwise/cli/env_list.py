"""How ``turnwise env list`` shows what comes with Turnwise."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnwise.envs.registry import BUILTIN, available
from turnwise.errors import EnvSpecError


def show_library(console: Console | None = None) -> None:
    """Print a table: names as recipes take them, one line each, arguments with their defaults."""
    console = console or Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("environment", style="bold cyan", no_wrap=True)
    table.add_column("what it is", ratio=3)
    table.add_column("arguments", style="dim", ratio=2)
    for name, description in available().items():
        table.add_row(Text(name), Text(description), Text(_arguments(name)))
    console.print(table)
    console.print()
    console.print(
        Text("your own: path/to/file.py:Class or package.module:Class; turnwise env new NAME writes one")
    )
    console.print(Text("datasets: turnwise env list reasoning_gym"))


def show_datasets(source: str, console: Console | None = None) -> None:
    """Print the names of the datasets of a scheme.

    Raises:
        EnvSpecError: It has no list.
        MissingExtraError: Its package is not installed.
    """
    console = console or Console(highlight=False)
    if source.partition(":")[0] != "reasoning_gym":
        raise EnvSpecError(f"there is no list of {source!r}; there is one of reasoning_gym")
    from turnwise.envs.library.reasoning_gym import dataset_names

    names = dataset_names()
    console.print(Columns([Text(name) for name in names], padding=(0, 2), column_first=True, equal=True))
    console.print()
    console.print(Text(f"{len(names)} datasets; play one with turnwise env play reasoning_gym:{names[0]}"))


def _arguments(name: str) -> str:
    if name not in BUILTIN:
        return "size=500 test_share=0.2 …, and the dataset's own"
    module, _, attribute = BUILTIN[name][0].partition(":")
    env_class: Any = getattr(importlib.import_module(module), attribute)
    return " ".join(
        f"{parameter.name}={parameter.default}"
        for parameter in inspect.signature(env_class).parameters.values()
    )
