"""``turnwise``: the command line. Each verb is a file of its own and imports what it needs when called."""

from __future__ import annotations

import os
import sys

import typer

from turnwise.cli import doctor, env, report, run, vllm
from turnwise.errors import TurnwiseError

app = typer.Typer(
    name="turnwise",
    help="Train language-model agents on whole trajectories.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(env.app, name="env")
app.add_typer(vllm.app, name="vllm")


def main() -> None:
    """Entry point: errors that users can cause are one message, not a traceback.

    Environments and rewards named ``pkg.module:Class`` are found from the directory that it runs in, as with
    ``python -m``.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        app()
    except TurnwiseError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
