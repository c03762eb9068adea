"""``turnwise env validate``: what there is to know of a server before training on it, as a table or JSON."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnwise.errors import EnvSpecError
from turnwise.openenv.validate import Report

MARKS = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "error": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}


def target_of(text: str) -> str | Path:
    """A folder where there is one of that name, else an address.

    Raises:
        EnvSpecError: Neither.
    """
    folder = Path(text)
    if folder.is_dir():
        return folder
    if "://" in text or ":" in text:
        return text
    raise EnvSpecError(f"{text!r} is no folder, and no address such as http://127.0.0.1:8000")


def read_action(text: str | None) -> dict[str, Any] | None:
    """An action's fields.

    Raises:
        EnvSpecError: No JSON object.
    """
    if text is None:
        return None
    try:
        action = json.loads(text)
    except ValueError as error:
        raise EnvSpecError(f"--action {text!r} is no JSON: {error}") from error
    if not isinstance(action, dict):
        raise EnvSpecError(f"--action is an object of the action's fields; this is {type(action).__name__}")
    return action


def show(report: Report, console: Console | None = None) -> None:
    """Print the findings by topic, with what to do about them, and the verdict."""
    console = console or Console(highlight=False)
    console.print(Text(report.target, style="bold"))
    for topic, findings in groupby(report.findings, key=lambda finding: finding.topic):
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(style="bold", min_width=14)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = MARKS[finding.outcome]
            told = Text(finding.found, style="" if finding.outcome == "ok" else style)
            if finding.advice:
                told.append(f"\n→ {finding.advice}", style="default not bold")
            table.add_row(Text(mark, style=style), finding.id, told)
        console.print(Text(f"\n{topic}", style="italic"))
        console.print(table)
    counts = report.as_json()
    named = [
        f"{counts[noun]} {noun if counts[noun] > 1 else noun[:-1]}"
        for noun in ("errors", "warnings")
        if counts[noun]
    ]
    style = MARKS["error" if counts["errors"] else "warning" if counts["warnings"] else "ok"][1]
    console.print(Text(f"\n{', '.join(named) or 'ready to train on'}", style=style))
