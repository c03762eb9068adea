"""Going on with a run: only where its recipe is the one that it was started with."""

from __future__ import annotations

import yaml

from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.recipe import changed_keys, resolved
from turnwise.store import RunDir

HARMLESS = ("push_to_hub", "threads")
"""Keys that change no result."""


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
    if before is not None and not allowed:
        changes = [
            change
            for change in changed_keys(yaml.safe_load(before), yaml.safe_load(resolved(recipe)))
            if not change.startswith(HARMLESS)
        ]
        if changes:
            raise RecipeError(
                f"{directory.path} was started with another recipe:\n  "
                + "\n  ".join(changes)
                + "\ngive this run another name (name=…), delete the directory, or go on with --changed"
            )
    directory.write_recipe(resolved(recipe))
