"""Supervised learning on recorded trajectories: what collect kept, and whatever else the recipe names.

    trajectories ──> samples (loss on the policy's own tokens) ──> learner ──> a model directory

Which trajectories an update learns from follows from the recipe's seed and the update's number alone, so a
killed run goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from turnwise.config import SftConfig
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import cross_entropy
from turnwise.learn.normalise import weigh
from turnwise.learn.samples import Demonstrations
from turnwise.pipeline.collect import STAGE as COLLECT
from turnwise.pipeline.collect import kept, place_of
from turnwise.pipeline.context import Run
from turnwise.pipeline.evaluate import evaluation_stage
from turnwise.pipeline.given import StepEnd, Watcher
from turnwise.pipeline.learning import load_latest, open_learner, save_model, save_state
from turnwise.pipeline.shuffle import EndlessShuffle
from turnwise.store import RunDir, read_trajectories
from turnwise.types import Sample, Trajectory
from turnwise.view.events import Progress, StepLine

STAGE = "sft"


async def sft(run: Run) -> None:
    """Train, from the last checkpoint where there is one."""
    config, watcher = run.recipe.sft, run.given.watcher
    assert config is not None
    model = run.model_before(STAGE)
    with run.stage(STAGE, total=config.steps, unit="updates") as info:
        learner = open_learner(
            run, model, optimizer=config.optimizer, rows=config.rows, total_steps=config.steps
        )
        done = await asyncio.to_thread(load_latest, run, STAGE, learner)
        await watcher.opened(learner, done)
        lessons = run.given.lessons or _recorded(run, config, Demonstrations(run.renderer(model)), info)
        for step in range(done + 1, config.steps + 1):
            done = step
            await watcher.step_began(step)
            metrics = await asyncio.to_thread(_update, learner, lessons(step - 1), config, watcher)
            run.directory.metrics(STAGE, step, metrics)
            run.emit(StepLine(stage=STAGE, step=step, metrics=metrics))
            run.emit(Progress(stage=STAGE, done=step, metrics={"nll": metrics["nll"]}))
            wish = await watcher.step_ended(StepEnd(step=step, metrics=metrics))
            goes_on = not wish.stop
            if wish.save or (step % config.checkpoint_every == 0 and step < config.steps):
                path = await asyncio.to_thread(save_state, run, STAGE, step, learner, wish.files)
                goes_on &= await watcher.saved(step, path)
            if not goes_on:
                break
        save_model(run, STAGE, done, learner)
        info["steps"] = done


Lessons = Callable[[int], Sequence[Sample]]
"""What an update learns from, counted from 0."""


class LessonOrder:
    """Which trajectories each update learns from: each pass over them is a permutation of its own.

    Args:
        available: Trajectories of each environment.
        batch: How many of each environment make an update.
        seed: The recipe's.
    """

    def __init__(self, available: dict[str, int], batch: dict[str, int], seed: int) -> None:
        self.batch = batch
        self._orders = {
            env: EndlessShuffle(available[env], [seed, *f"sft/{env}".encode()])
            for env, count in batch.items()
            if count
        }

    def update(self, number: int) -> Iterator[tuple[str, int]]:
        """(environment, index) of update ``number``, counted from 0."""
        for env, order in self._orders.items():
            count = self.batch[env]
            for place in range(number * count, (number + 1) * count):
                yield env, order[place]


def _update(
    learner: Learner, samples: Sequence[Sample], config: SftConfig, watcher: Watcher
) -> dict[str, float]:
    """One update on ``samples``: the mean over what ``weighting`` says counts equally."""
    began = time.monotonic()
    weighed = weigh(
        samples, "sequence" if config.weighting == "sample" else "token", by_env=config.weighting == "env"
    )
    metrics = learner.forward_backward(weighed, cross_entropy, accuracy=True)
    metrics |= learner.optim_step(watcher.moving())
    watcher.updated(metrics)
    seconds = time.monotonic() - began
    return {**metrics, "learn_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}


def _recorded(run: Run, config: SftConfig, demonstrations: Demonstrations, info: dict[str, Any]) -> Lessons:
    """What was collected and what the recipe's sources have, in the order of the recipe's seed."""
    lessons = _lessons(run, config, demonstrations)
    info["trajectories"] = {env: len(found) for env, found in lessons.items()}
    order = LessonOrder({env: len(found) for env, found in lessons.items()}, config.batch, run.recipe.seed)
    return lambda update: [sample for env, i in order.update(update) for sample in lessons[env][i]]


def _lessons(run: Run, config: SftConfig, demonstrations: Demonstrations) -> dict[str, list[list[Sample]]]:
    """Samples of each trajectory, by environment.

    Raises:
        RecipeError: There is nothing to learn from for an environment of the batch.
    """
    found: dict[str, list[tuple[tuple[int, int], list[Sample]]]] = defaultdict(list)
    for place, trajectory in _trajectories(run, config):
        if config.batch.get(trajectory.env):
            found[trajectory.env].append((place, demonstrations.samples(trajectory)))
    for env, count in config.batch.items():
        if count and not found[env]:
            raise RecipeError(
                f"sft.batch asks for {count} trajectories of '{env}' and there are none: collect some "
                "(--stage collect) or name files in sft.sources"
            )
    return {
        env: [samples for _, samples in sorted(own, key=lambda one: one[0])] for env, own in found.items()
    }


def _trajectories(run: Run, config: SftConfig) -> Iterator[tuple[tuple[int, int], Trajectory]]:
    """What collect kept, and every scored episode of the sources, each with its place in the order."""
    if run.recipe.collect is not None:
        if run.directory.done(COLLECT) is None:
            raise RecipeError(
                f"stage '{COLLECT}' of run '{run.recipe.name}' is not finished, and sft learns from all "
                f"of it: run it first with --stage {COLLECT}, or the whole recipe"
            )
        yield from (((0, place_of(one)), one) for one in kept(run))
    sources = chain.from_iterable(_source(Path(source)) for source in config.sources)
    yield from (((1, place), one) for place, one in enumerate(sources) if one.reward is not None)


def _source(path: Path) -> Iterator[Trajectory]:
    """A file, or a run directory without its held-out episodes: learning from those would spoil them."""
    if path.is_file():
        yield from read_trajectories(path)
        return
    directory = RunDir(path)
    stages = [stage for stage in directory.stages() if not stage.startswith(evaluation_stage(""))]
    if not stages:
        raise RecipeError(f"sft.sources names '{path}': there is no such file, and no run with trajectories")
    for stage in stages:
        yield from directory.read(stage)
