"""``turnwise run``: run a recipe, or go on where it was stopped."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change: rl.steps=10 model.name=./my-model")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Run this stage alone: init, collect, sft, rl, evaluate, export.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe, resolved, and stop.")] = False,
    runs: Annotated[Path, typer.Option(help="Where run directories are.")] = Path("runs"),
    changed: Annotated[
        bool, typer.Option("--changed", help="Go on with a run whose recipe or sources have changed since.")
    ] = False,
) -> None:
    """Run a recipe: collect, sft, rl, evaluate. Stages that are done are skipped; a stopped one goes on."""
    from turnwise.recipe import load_recipe, show

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        show(loaded)
        return

    from turnwise.pipeline.given import Given
    from turnwise.pipeline.ranks import joined
    from turnwise.pipeline.resume import check_unchanged
    from turnwise.pipeline.run import run_recipe
    from turnwise.store import RunDir
    from turnwise.view.events import Interrupted
    from turnwise.view.live import Live

    directory = RunDir(runs / loaded.name)
    # A terminal that goes away, or a scheduler's SIGTERM, is treated as Ctrl-C: what is finished is on disk.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with joined(loaded.parallel, loaded.model.device) as ranks:
        if ranks is not None and not ranks.first:
            return
        with directory.lock():
            check_unchanged(directory, loaded, allowed=changed)
            with Live(loaded, directory) as live:
                try:
                    given = Given(ranks=ranks)
                    summary = run_recipe(loaded, directory, live, stage=stage, changed=changed, given=given)
                except KeyboardInterrupt:
                    again = ["torchrun", f"--nproc-per-node={ranks.count}", "-m"] if ranks else []
                    live(Interrupted(resume_command=shlex.join([*again, "turnwise", *sys.argv[1:]])))
                    raise typer.Exit(130) from None
                live.conclude(summary)
