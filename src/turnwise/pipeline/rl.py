"""Online reinforcement learning: play, credit, learn, publish. The loop is `_train`; the rest serves it.

    source ──> Scheduler.next_step ──> groups ──> Selector ──> updates_of ──> Learner ──> weights, v+1 ──┐
                  ^                 (each episode is on disk before it is used)                          │
                  └──────────────────────── engine, policy <─────────────────────────────────────────────┘

What a step used up is recorded before it is learned from, what was not selected included. A killed run loads
its last checkpoint, makes the recorded updates again from disk, and plays only what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from turnwise.config import RlConfig
from turnwise.errors import LearnError, NonFiniteError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import make_loss
from turnwise.pipeline.context import Run, sampling_of
from turnwise.pipeline.given import StepEnd, Watcher, Wish
from turnwise.pipeline.kl_reward import with_kl_reward
from turnwise.pipeline.learning import load_latest, open_learner, save_model, save_state
from turnwise.pipeline.selection import Selection, Selector
from turnwise.pipeline.sink import EpisodeSink
from turnwise.pipeline.source import GroupSource
from turnwise.pipeline.updates import Update, group_metrics, updates_of
from turnwise.rollout.player import Player
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.scheduler import Scheduler
from turnwise.store import StepRecord
from turnwise.types import Sample, TrajectoryGroup
from turnwise.view.events import Progress, StepLine

log = logging.getLogger(__name__)

STAGE = "rl"


async def rl(run: Run) -> None:
    """Train, from the last checkpoint and the recorded steps where there are any."""
    config = run.recipe.rl
    assert config is not None
    model = run.model_before(STAGE)
    with run.stage(STAGE, total=config.steps, unit="steps") as info:
        learner = open_learner(
            run,
            model,
            optimizer=config.optimizer,
            rows=config.rows,
            total_steps=run.given.updates or config.steps * config.minibatches * config.epochs,
            reference=config.kl > 0,
        )
        arenas = run.arenas(run.renderer(model))
        harness = {name: arena.harness for name, arena in arenas.items()}
        source, selector = GroupSource(run, STAGE, config, harness), Selector(run.recipe)
        step, counts, stopped = await _redo(run, config, learner, source, selector)
        if step < config.steps and not stopped:
            async with run.engine(model) as engine:
                # An engine reads weights as they were before any update, and before they were rounded.
                if learner.version or learner.model.quantized:
                    await engine.load_weights(learner.publish(), learner.version)
                policy = ModelPolicy(engine, run.renderer(model))
                await run.given.watcher.playing(policy)
                step = await _train(run, config, learner, source, selector, policy, step, counts)
        save_model(run, STAGE, step, learner)
        info["steps"] = step
        info["version"] = learner.version


async def _train(
    run: Run,
    config: RlConfig,
    learner: Learner,
    source: GroupSource,
    selector: Selector,
    policy: ModelPolicy,
    done: int,
    counts: Mapping[str, int],
) -> int:
    """From step ``done + 1`` to the last; ``counts`` is what the scheduler had counted before.

    Returns:
        The last step, an earlier one than planned where whoever watches wanted that.
    """
    refills = config.flat_groups == "refill"
    make_player: Callable[..., Player] = run.given.player or Scheduler
    async with make_player(
        arenas=run.arenas(policy.renderer),
        policy=policy,
        sampling=sampling_of(config.sampling, seed=run.recipe.seed),
        source=source,
        finished=source.finished,
        groups_per_step=config.groups,
        useful=selector.useful if refills else None,
        refill_limit=config.refill_limit if refills else 1,
        sink=EpisodeSink(run.directory, STAGE),
        staleness=config.staleness,
        concurrency=config.concurrency,
        version=learner.version,
        steps=config.steps - done,
        counts=counts,
        max_failures=config.max_failures,
    ) as player:
        for step in range(done + 1, config.steps + 1):
            began = time.monotonic()
            await run.given.watcher.step_began(step)
            groups = await player.next_step()
            played = time.monotonic()
            await run.given.watcher.played(groups)
            version = learner.version
            selection = selector.select(groups)
            record = _record(step, groups, selection, player)
            run.directory.append_step(record)
            learned = await asyncio.to_thread(
                _learn, learner, selection.groups, config, run.recipe.seed, step, run.given.watcher
            )
            updated = time.monotonic()
            # On a thread, for with weights that are spread over processes it gathers them.
            weights = await asyncio.to_thread(learner.publish)
            await policy.engine.load_weights(weights, learner.version)
            published = time.monotonic()
            metrics = {
                **_step_metrics(learned, groups, selection, record, version=version, learner=learner),
                "rollout_seconds": played - began,
                "learn_seconds": updated - played,
                "publish_seconds": published - updated,
            }
            _warn(step, metrics, config)
            _tell(run, step, metrics)
            wish = await run.given.watcher.step_ended(StepEnd(step=step, metrics=metrics))
            if not wish.stop:  # What is played next, while a checkpoint is written, is of the next step.
                player.advance(learner.version)
            if not await _keep(run, config, learner, step, wish):
                return step
    return config.steps


def _learn(
    learner: Learner,
    groups: Sequence[TrajectoryGroup],
    config: RlConfig,
    seed: int,
    step: int,
    watcher: Watcher | None = None,
) -> dict[str, float]:
    """All updates of one step, or as many as whoever watches wants.

    Raises:
        LearnError: Every one of them was refused.
    """
    watcher = watcher or Watcher()
    loss = make_loss(config)
    told: dict[str, float] = {}
    if config.kl > 0 and config.kl_in == "reward":
        groups, told = with_kl_reward(learner, groups, config)
    updates = list(updates_of(groups, config, seed=seed, step=step))
    if config.correction.kind != "none" and len(updates) > 1:
        # Before a single one the old weights are the present ones.
        updates = _with_old_logprobs(learner, updates)
    in_loss = config.kl > 0 and config.kl_in == "loss"
    found: list[dict[str, float]] = []
    refused: list[NonFiniteError] = []
    for update in updates:
        learned: dict[str, float] | None = {}
        if update.samples:
            samples = learner.with_reference(update.samples) if in_loss else update.samples
            try:
                learned = learner.forward_backward(samples, loss, entropy_gradient=config.entropy > 0)
                learned |= learner.optim_step(watcher.moving())
                found.append(learned)
            except NonFiniteError as error:
                # The weights are as they were. One bad batch is left out; a step of nothing else is no
                # accident.
                log.warning("step %d: %s", step, error)
                refused.append(error)
                learned = None
        if not learned:
            rates = learner.skip_step()
            learned = None if learned is None else rates
        if not watcher.updated(learned):
            break
    if refused and not found:
        raise LearnError(
            f"every update of rl step {step} was refused, the last because {refused[-1]}. Lower "
            "rl.optimizer.lr or rl.optimizer.max_grad_norm and go on from the last checkpoint with --changed"
        )
    return {
        **_over_updates(found),
        **told,
        **_credit_metrics(updates[: config.minibatches]),
        "updates": float(len(found)),
        "refused_updates": float(len(refused)),
    }


def _with_old_logprobs(learner: Learner, updates: Sequence[Update]) -> list[Update]:
    """The updates with ``old_logprobs_T``, under the weights before the first of them.

    Each row is scored once, in however many updates it is.
    """

    def row(sample: Sample) -> tuple[str, bytes, tuple[str, ...]]:
        # Segments may differ in their images alone: those of one size have the same placeholders.
        return sample.trajectory_id, sample.token_ids_T.tobytes(), sample.images

    rows = {row(sample): sample for update in updates for sample in update.samples}
    old = dict(zip(rows, learner.logprobs(list(rows.values())), strict=True))
    return [
        replace(update, samples=tuple(replace(one, old_logprobs_T=old[row(one)]) for one in update.samples))
        for update in updates
    ]


def _step_metrics(
    learned: Mapping[str, float],
    groups: Sequence[TrajectoryGroup],
    selection: Selection,
    record: StepRecord,
    *,
    version: int,
    learner: Learner,
) -> dict[str, float]:
    """All that is told of a step but how long it took; ``version`` was current before its updates."""
    return {
        **learned,
        **group_metrics(groups, version=version, learned=selection.groups),
        **selection.metrics,
        **record.info.get("metrics", {}),
        "version": float(learner.version),
    }


def _over_updates(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step's metrics from those of its updates: counts add up, maxima stay maxima, the rest is averaged.

    The sampler's mismatch is told by the first update alone, as only that one is on the policy that played.
    """
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if name in one]
        if name in ("tokens", "loss_tokens"):
            metrics[name] = sum(values)
        elif name.endswith("_max"):
            metrics[name] = max(values)
        else:
            metrics[name] = sum(values) / len(values)
    return metrics


def _credit_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Of the first epoch's updates: the others are over the same samples."""
    return {
        **updates[0].credit,
        "samples": float(sum(len(update.samples) for update in updates)),
        "left_out_samples": float(sum(update.left_out for update in updates)),
    }


async def _redo(
    run: Run, config: RlConfig, learner: Learner, source: GroupSource, selector: Selector
) -> tuple[int, Mapping[str, int], bool]:
    """Load the last checkpoint and make the updates that were recorded after it again, from disk.

    Returns:
        The last step that is done, what the scheduler had counted by then, and whether whoever watches
        wants no further one.
    """
    counts: Mapping[str, int] = {}
    watcher = run.given.watcher
    step = await asyncio.to_thread(load_latest, run, STAGE, learner)
    await watcher.opened(learner, step)
    told = {line["step"] for line in run.directory.read_metrics(STAGE)}
    for record in run.directory.steps(STAGE):
        source.spend(record.trajectory_ids, record.info.get("given_up", ()))
        counts = record.info.get("counts", {})
        if record.step <= step:
            continue
        assert record.step == step + 1, f"steps.jsonl goes from {step} to {record.step}"
        step, version = record.step, learner.version
        await watcher.step_began(step)
        groups = source.recorded(record.trajectory_ids)
        await watcher.played(groups)
        selection = selector.select(groups)
        learned = await asyncio.to_thread(
            _learn, learner, selection.groups, config, run.recipe.seed, step, watcher
        )
        learner.publish()
        metrics = _step_metrics(learned, groups, selection, record, version=version, learner=learner)
        if step in told:
            run.emit(Progress(stage=STAGE, done=step, metrics={}))
        else:  # The run was killed between the record of the step and its metrics.
            _warn(step, metrics, config)
            _tell(run, step, metrics)
        wish = await watcher.step_ended(StepEnd(step=step, metrics=metrics, redone=True))
        if not await _keep(run, config, learner, step, wish):
            return step, counts, True
    return step, counts, False


async def _keep(run: Run, config: RlConfig, learner: Learner, step: int, wish: Wish) -> bool:
    """Write a checkpoint where one is due, or wanted now; returns whether the run goes on."""
    goes_on = not wish.stop
    if wish.save or (step % config.checkpoint_every == 0 and step < config.steps):
        path = await asyncio.to_thread(save_state, run, STAGE, step, learner, wish.files)
        goes_on &= await run.given.watcher.saved(step, path)
    return goes_on


def _warn(step: int, metrics: Mapping[str, float], config: RlConfig) -> None:
    """Say so where a step is not what was asked for."""
    if missing := metrics.get("missing_groups"):
        log.warning(
            "step %d: %d of its %d groups are missing: it has played rl.refill_limit=%d times as many, and "
            "%d were dropped: nothing sets their siblings apart, or rl.overlong.mask leaves none",
            step, missing, sum(config.groups.values()), config.refill_limit, metrics["dropped_groups"],
        )  # fmt: skip
    if not metrics["updates"]:
        log.warning("step %d: there was nothing to learn, and the weights are as they were", step)


def _tell(run: Run, step: int, metrics: dict[str, float]) -> None:
    run.directory.metrics(STAGE, step, metrics)
    run.emit(StepLine(stage=STAGE, step=step, metrics=metrics))
    run.emit(Progress(stage=STAGE, done=step, metrics={}))


def _record(step: int, groups: Sequence[TrajectoryGroup], selection: Selection, player: Player) -> StepRecord:
    """What `_redo` needs: every trajectory that the step used up, failed ones and dropped groups included,
    and the groups that were given up.
    """
    info: dict[str, Any] = {"counts": dict(player.counts), "metrics": dict(player.metrics)}
    if selection.dropped:
        info["dropped"] = list(selection.dropped)
    if player.given_up:
        info["given_up"] = list(player.given_up)
    return StepRecord(
        stage=STAGE,
        step=step,
        trajectory_ids=tuple(one.id for group in groups for one in group.trajectories),
        info=info,
    )
