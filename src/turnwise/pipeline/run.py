"""The run: a recipe's stages, one after the other, each skipped where it is done.

init ─> evaluate untrained ─> collect ─> sft ─> evaluate sft ─> rl ─> evaluate rl ─> export
                                                                         └─> summary.json, report.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given
from turnwise.pipeline.resume import check_order, check_sources
from turnwise.store import RunDir
from turnwise.view.events import Event

Stage = Callable[[Run], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """One stage of a run's plan."""

    name: str
    """Of its done marker; several may belong to one ``--stage``."""
    stage: str
    """What ``--stage`` calls it."""
    run: Stage


def run_recipe(
    recipe: Recipe,
    directory: RunDir,
    emit: Callable[[Event], None],
    *,
    stage: str | None = None,
    changed: bool = False,
    given: Given | None = None,
) -> dict[str, Any] | None:
    """Run what is not done of a recipe. The directory's lock must be held.

    Args:
        recipe: The recipe.
        directory: Its run directory.
        emit: Takes events.
        stage: Only this one: ``init``, ``collect``, ``sft``, ``rl``, ``evaluate`` or ``export``.
        changed: Go on although environments, reward functions or data have changed; of the recipe itself see
            `turnwise.pipeline.resume.check_unchanged`.
        given: Live objects in place of what the recipe names.

    Returns:
        The summary, where the recipe evaluates.

    Raises:
        RecipeError: The recipe has no such stage, one before it is not done, or what it names has changed.
        TaskError, TemplateError: A task or the chat template cannot be used; nothing was played.
        TurnwiseError: What went wrong in a stage; everything finished is on disk.
    """
    if recipe.threads is not None:
        import torch

        torch.set_num_threads(recipe.threads)
    from transformers.utils import logging

    # A run shows its own progress; these bars would be drawn across it.
    logging.disable_progress_bar()
    run = Run(recipe, directory, emit, given)
    planned = list(plan(recipe))
    allowed = list(dict.fromkeys(one.stage for one in planned))
    if stage is not None and stage not in allowed:
        raise RecipeError(f"recipe '{recipe.name}' has no stage '{stage}'; it has: {', '.join(allowed)}")
    left = [one for one in planned if stage in (None, one.stage) and directory.done(one.name) is None]
    if any(one.stage != "export" for one in left):
        run.check()
        check_sources(run, allowed=changed)
        check_order(run, planned)
    for one in planned:
        if one in left:
            one.run(run)
        if directory.done(one.name) is not None:
            directory.prune(one.name, keep=0)  # Nothing goes on from its last state any more.
    return _conclude(run)


def plan(recipe: Recipe) -> Iterator[Planned]:
    """The stages that a recipe asks for, in order."""
    from turnwise.pipeline.collect import collect
    from turnwise.pipeline.evaluate import evaluate, evaluate_baselines, evaluation_stage
    from turnwise.pipeline.summary import BASELINES

    evaluation = recipe.evaluate

    def evaluating(model_stage: str, after: str | None) -> Iterator[Planned]:
        if evaluation is None or model_stage not in evaluation.stages:
            return

        def play(run: Run) -> None:
            model = run.model_before("sft") if after is None else run.model_after(after)
            asyncio.run(evaluate(run, model_stage, model))

        yield Planned(evaluation_stage(model_stage), "evaluate", play)

    if recipe.model.scratch is not None:
        from turnwise.pipeline.init import init

        yield Planned("init", "init", lambda run: asyncio.run(init(run)))
    yield from evaluating("untrained", None)
    if recipe.collect is not None:
        yield Planned("collect", "collect", lambda run: asyncio.run(collect(run)))
    if recipe.sft is not None:
        from turnwise.pipeline.sft import sft

        yield Planned("sft", "sft", lambda run: asyncio.run(sft(run)))
        yield from evaluating("sft", "sft")
    if recipe.rl is not None:
        from turnwise.pipeline.rl import rl

        yield Planned("rl", "rl", lambda run: asyncio.run(rl(run)))
        yield from evaluating("rl", "rl")
    if evaluation is not None and evaluation.baselines:
        yield Planned(
            evaluation_stage(BASELINES[-1]), "evaluate", lambda run: asyncio.run(evaluate_baselines(run))
        )
    if recipe.push_to_hub is not None:
        from turnwise.pipeline.export import export

        yield Planned("export", "export", export)


def _conclude(run: Run) -> dict[str, Any] | None:
    """Write the summary and the report over all that is there."""
    from turnwise.pipeline.evaluate import summary
    from turnwise.view.report import write_report

    found = None
    if run.recipe.evaluate is not None:
        found = summary(run)
        run.directory.write_summary(found)
    write_report(run.directory)
    return found
