"""Going on with a run: only where its recipe, and what the recipe names, is what it was started with.

What ``--changed`` does: stages that are finished stay as they are. In the others, updates after the last
checkpoint are made again under the new recipe from the episodes that were recorded for them, and tell their
metrics anew; finished episodes are taken where they are what would be played now (harness, task, seed,
sampling), and otherwise played again under an id of their own, or, in RL, left out with their group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.recipe import changed_keys, resolved
from turnwise.store import RunDir

if TYPE_CHECKING:
    from turnwise.pipeline.context import Run
    from turnwise.pipeline.run import Planned

HARMLESS = (
    "push_to_hub*", "threads", "engine.max_sequences", "engine.kv_tokens", "engine.prefill_tokens",
    "*.concurrency", "*.checkpoint_every", "*.rows.*", "rl.max_failures", "environments.*.max_excluded",
    "parallel.*",
)  # fmt: skip
"""Keys that change how fast and how safely a run goes, and its results by no more than rounding does."""
READ_LATER = ("collect.keep*", "evaluate.bootstrap", "evaluate.stages", "evaluate.baselines")
"""Keys of a stage's section that are read again after it is finished."""
READ_BY = {
    "init": ("model.scratch*",),
    "collect": ("collect.*",),
    "sft": ("sft.*", "model.name", "model.revision", "model.scratch*"),
    "rl": ("rl.*", "model.name", "model.revision", "model.scratch*", "model.lora*", "model.quantization"),
    "evaluate": ("evaluate.*",),
}
"""Keys that nobody reads any more once the stage is finished."""
_REMEDY = "give this run another name (name=…), delete the directory, or go on with --changed"


def check_unchanged(directory: RunDir, recipe: Recipe, *, allowed: bool) -> None:
    """Refuse a recipe that is not the one the run was started with; store it where it is new.

    Args:
        directory: Of the run; its lock must be held.
        recipe: As it is now.
        allowed: Whether the caller wants to go on with a changed recipe.

    Raises:
        RecipeError: Something changed; the message names the keys with both values. Or it changed in a way
            that the run cannot go on with.
    """
    before = directory.recipe()
    if before is not None:
        changes = [
            change
            for change in changed_keys(yaml.safe_load(before), yaml.safe_load(resolved(recipe)))
            if not _matches(change, HARMLESS)
        ]
        if changes and not allowed:
            raise RecipeError(
                f"{directory.path} was started with another recipe:\n  "
                + "\n  ".join(changes)
                + f"\n{_REMEDY}"
            )
        _refuse_idle(directory, changes)
        if changes:
            _go_back(directory, recipe)
    directory.write_recipe(resolved(recipe))


def check_sources(run: Run, *, allowed: bool) -> None:
    """Refuse environments, reward functions and data that are others under the same name; store them if new.

    Rewards are compared over a run's stages, so what makes them must stay (`turnwise.rollout.harness`).

    Raises:
        RecipeError: Something changed; the message names it.
    """
    now = dict(_sources(run))
    before = run.directory.sources() or {}
    changes = [what for what, found in before.items() if what in now and now[what] != found]
    if changes and not allowed:
        raise RecipeError(
            f"{run.directory.path} was started with the same recipe and other sources:\n  "
            + "\n  ".join(f"{what}: its source or content has changed" for what in changes)
            + f"\nrewards from before and after could not be compared: restore it, {_REMEDY}"
        )
    if now != before:
        run.directory.write_sources(now)


def check_order(run: Run, planned: Sequence[Planned]) -> None:
    """Refuse to make a model anew whose later stages are there: they speak of the model that it replaces.

    Raises:
        RecipeError: There are such; the message names the files.
    """
    directory = run.directory
    models = [one.name for one in planned if one.name in ("init", "sft", "rl")]
    for number, stage in enumerate(models):
        if directory.done(stage) is not None:
            continue
        later = [*models[number + 1 :], *(f"evaluate-{name}" for name in models[number:])]
        if stage == models[0] == "init":
            later.append("evaluate-untrained")
        stale = [
            f"{directory.path}/{name}"
            for one in later
            for name in (f"done/{one}.json", f"trajectories/{one}.jsonl")
            if (directory.path / name).exists()
        ]
        if stale:
            raise RecipeError(
                f"stage '{stage}' is not finished, and later stages have worked with a model of its:\n  "
                + "\n  ".join(stale)
                + "\ndelete these files to have it all made again, or give this run another name (name=…)"
            )


# ---------------------------------------------------------------------------------------------------


def _matches(change: str, patterns: Sequence[str]) -> bool:
    key = change.partition(":")[0]
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _refuse_idle(directory: RunDir, changes: Sequence[str]) -> None:
    """A change to a stage that is finished would do nothing.

    Raises:
        RecipeError: There is one; the message says how to have the stage made again.
    """
    for stage in directory.finished():
        keys = READ_BY.get(stage.partition("-")[0], ())
        idle = [one for one in changes if _matches(one, keys) and not _matches(one, READ_LATER)]
        if idle:
            raise RecipeError(
                f"stage '{stage}' is finished, so this change would do nothing:\n  "
                + "\n  ".join(idle)
                + "\ngive this run another name (name=…); or, to have the stage made again from what it "
                f"recorded, delete {directory.path}/done/{stage}.json"
            )


def _go_back(directory: RunDir, recipe: Recipe) -> None:
    """Let the unfinished stages forget what they told of updates that will be made again, and otherwise.

    Raises:
        RecipeError: A stage has gone further already than it now should.
    """
    for stage, section in (("sft", recipe.sft), ("rl", recipe.rl)):
        if section is None or directory.done(stage) is not None:
            continue
        checkpoint = directory.latest(stage)
        reached = checkpoint.step if checkpoint is not None else 0
        made = max([reached, *(record.step for record in directory.steps(stage))])
        if section.steps < made:
            raise RecipeError(
                f"{stage}.steps: {section.steps} is less than the {made} that are made already; set it to at "
                f"least {made}, or give this run another name (name=…)"
            )
        directory.cut_metrics(stage, after=reached)


def _sources(run: Run) -> Iterator[tuple[str, str]]:
    """(what it is, its fingerprint) of everything besides the recipe that decides what a reward means."""
    from turnwise.rollout.harness import RULES
    from turnwise.rollout.scoring import RewardFunction

    recipe = run.recipe
    yield "Turnwise's rules of an episode", str(RULES)
    for name, spec in run.specs.items():
        yield f"environment '{name}'", spec.fingerprint
        for path in recipe.environments[name].rewards:
            yield f"reward function '{path}' of environment '{name}'", RewardFunction.load(path).identity
    files = {f"data set '{path}' (tasks.{split})": path for split, path in recipe.tasks.items()}
    if recipe.model.chat_template is not None:
        files[f"chat template '{recipe.model.chat_template}'"] = recipe.model.chat_template
    for what, path in files.items():
        yield what, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
