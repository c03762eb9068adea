"""How ``turnwise env check`` shows a report: one line a finding, the verdict last."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnwise.envs.check import Report

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def show(report: Report, console: Console | None = None) -> None:
    """Print the findings of a report."""
    console = console or Console(highlight=False)
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in report.findings:
        mark, style = MARKS[finding.level]
        message = Text(finding.message, style="" if finding.level == "ok" else style)
        table.add_row(Text(mark, style=style), finding.rule, message)
    console.print(Text(f"{report.env}", style="bold"))
    console.print(table)
    errors, warnings = len(report.errors), len(report.warnings)
    counts = [_count(errors, "error"), _count(warnings, "warning")]
    verdict = ", ".join(count for count in counts if count) or "ready to train on"
    style = MARKS["error" if errors else "warning" if warnings else "ok"][1]
    console.print(Text(verdict, style=style))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}" if number else ""
