"""``turnwise report``: write a run's report again, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="A run directory, such as runs/quickstart.")]) -> None:
    """Write report.html for a run, finished or not."""
    from turnwise.errors import StoreError
    from turnwise.store import RunDir
    from turnwise.view.report import write_report

    if not run.is_dir():
        raise StoreError(f"there is no run directory {run}; a run writes its own, such as runs/quickstart")
    typer.echo(write_report(RunDir(run)))
