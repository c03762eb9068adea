"""What SFT and RL share: a learner on the stage's first model, checkpoints, the finished model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from turnwise.chat.renderer import TemplateRenderer
from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.learn.learner import Learner
from turnwise.learn.model import load_model
from turnwise.pipeline.context import ModelSource, Run, final


def open_learner(
    run: Run,
    model: ModelSource,
    *,
    optimizer: OptimizerConfig,
    rows: BatchConfig,
    total_steps: int,
    reference: bool = False,
) -> Learner:
    """A learner that has taken no step yet.

    Args:
        run: The run.
        model: What the stage starts from.
        optimizer: The stage's.
        rows: The stage's.
        total_steps: Updates that the schedule spans.
        reference: Keep the starting weights, for a KL term.
    """
    config = run.recipe.model
    # By its name: a path given beside it would be a directory, which has no revisions.
    started_from = config.model_copy(update={"name": model.name, "revision": model.revision, "scratch": None})
    renderer = run.renderer(model)
    processing = renderer.processing
    if isinstance(renderer, TemplateRenderer) and config.chat_template is not None:
        # Whoever serves the model must ask as it was asked in training.
        processing.set_template(renderer.template.source)
    if run.given.ranks is not None:
        from turnwise.learn.worker import Opening, open_everywhere

        opening = Opening(
            model=started_from,
            optimizer=optimizer,
            rows=rows,
            total_steps=total_steps,
            seed=run.recipe.seed,
            reference=reference,
            vision=renderer.vision,
            images=run.directory.images,
        )
        return open_everywhere(run.given.ranks, opening, tokenizer=processing, module=run.given.model)
    if run.recipe.parallel.kind != "ddp":
        run.note("warning", "parallel.kind does nothing in one process: start several with torchrun")
    policy = load_model(started_from, module=run.given.model, seed=run.recipe.seed, vision=renderer.vision)
    if reference:
        policy.keep_reference()
    return Learner(
        policy, processing, optimizer=optimizer, rows=rows, total_steps=total_steps, seed=run.recipe.seed
    )


def load_latest(run: Run, stage: str, learner: Learner) -> int:
    """Put the learner where the stage's last checkpoint left it.

    Returns:
        The step of that checkpoint; 0 where there is none.
    """
    latest = run.directory.latest(stage)
    if latest is None:
        return 0
    learner.load(latest.path)
    return latest.step


def save_state(
    run: Run, stage: str, step: int, learner: Learner, files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a checkpoint to go on from, with more ``files`` in it, and drop those that are too many.

    Raises:
        StoreError: The disk is full; the checkpoint before is intact.
    """
    with run.directory.checkpoint(stage, step) as path:
        learner.save(path)
        for name, content in (files or {}).items():
            (path / name).write_bytes(content)
    if run.given.kept_checkpoints is not None:
        run.directory.prune(stage, run.given.kept_checkpoints)
    written = run.directory.latest(stage)
    assert written is not None
    return written.path


def save_model(run: Run, stage: str, step: int, learner: Learner) -> None:
    """Write the stage's finished model as an ordinary model directory, adapters merged.

    It takes the place of one that the stage made before, with fewer or more steps.
    """
    if not run.given.export:
        return
    with run.directory.checkpoint(final(stage), step) as path:
        learner.export(path)
    for other in run.directory.checkpoints(final(stage)):
        if other.step != step:
            run.directory.drop(other)
