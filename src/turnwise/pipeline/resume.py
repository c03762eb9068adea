"""Going on with a run: only where its recipe is the one that it was started with."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.recipe import changed_keys, resolved
from turnwise.store import RunDir

HARMLESS = ("push_to_hub", "threads")
"""Keys that change no result."""
READ_LATER = ("collect.keep", "evaluate.bootstrap", "evaluate.stages", "evaluate.baselines")
"""Keys of a stage's section that are read again after it is finished."""


def check_unchanged(directory: RunDir, recipe: Recipe, *, allowed: bool) -> None:
    """Refuse a recipe that is not the one the run was started with; store it where it is new.

    Args:
        directory: Of the run; its lock must be held.
        recipe: As it is now.
        allowed: Whether the caller wants to go on with a changed recipe.

    Raises:
        RecipeError: Something changed; the message names the keys with both values.
    """
    before = directory.recipe()
    if before is not None:
        changes = [
            change
            for change in changed_keys(yaml.safe_load(before), yaml.safe_load(resolved(recipe)))
            if not change.startswith(HARMLESS)
        ]
        if changes and not allowed:
            raise RecipeError(
                f"{directory.path} was started with another recipe:\n  "
                + "\n  ".join(changes)
                + "\ngive this run another name (name=…), delete the directory, or go on with --changed"
            )
        _refuse_idle(directory, changes)
    directory.write_recipe(resolved(recipe))


def _refuse_idle(directory: RunDir, changes: Sequence[str]) -> None:
    """A change to a stage that is finished would do nothing.

    Raises:
        RecipeError: There is one; the message says how to have the stage run again.
    """
    for stage in directory.finished():
        section = stage.partition("-")[0]
        idle = [one for one in changes if one.startswith(f"{section}.") and not one.startswith(READ_LATER)]
        if idle:
            raise RecipeError(
                f"stage '{stage}' is finished, so this change would do nothing:\n  "
                + "\n  ".join(idle)
                + "\ngive this run another name (name=…); or, to run the stage on from where it stopped, "
                f"delete {directory.path}/done/{stage}.json"
            )
