"""Evaluate: play held-out tasks with each stage's model, under the harness that trained it, and compare.

Every model plays the same tasks from the same seeds, so stages are compared task by task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import aclosing
from typing import Any

from turnwise.config import EvaluateConfig
from turnwise.errors import EnvError, boundary
from turnwise.pipeline.attempts import unfinished
from turnwise.pipeline.context import Means, ModelSource, Run, sampling_of
from turnwise.pipeline.sink import EpisodeSink
from turnwise.pipeline.summary import BASELINES, GREEDY, MODEL_STAGES, is_greedy, summarise
from turnwise.rollout.arena import Arena
from turnwise.rollout.play import play_all
from turnwise.rollout.policies import BaselinePolicy, ModelPolicy
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder
from turnwise.types import Sampling, Trajectory
from turnwise.view.events import Progress

Play = tuple[Policy, Sampling, list[EpisodeOrder]]
"""Who plays what, and how tokens are drawn."""


def evaluation_stage(model_stage: str) -> str:
    """The name under which a model's (or baseline's) held-out episodes are stored."""
    return f"evaluate-{model_stage}"


async def evaluate(run: Run, model_stage: str, model: ModelSource) -> None:
    """Play the held-out tasks with one model, sampled and greedy."""
    config = run.recipe.evaluate
    assert config is not None
    renderer = run.renderer(model)
    async with run.engine(model) as engine:
        policy = ModelPolicy(engine, renderer)
        arenas = run.arenas(renderer)
        sampled = sampling_of(config.sampling, seed=run.recipe.seed)
        plays: list[Play] = [(policy, sampled, list(_orders(run, config, model_stage, range(config.seeds))))]
        if config.greedy:
            greedy = sampling_of(config.sampling, seed=run.recipe.seed, greedy=True)
            plays.append((policy, greedy, list(_orders(run, config, model_stage, [GREEDY]))))
        await _play(run, model_stage, arenas, plays)


async def evaluate_baselines(run: Run) -> None:
    """Play the held-out tasks by chance and with the one most frequent answer, where environments do that."""
    config = run.recipe.evaluate
    assert config is not None
    arenas = run.arenas()
    for kind in BASELINES:
        plays: list[Play] = []
        for env, policy in _baseline_policies(run, kind):
            orders = _orders(run, config, kind, range(config.seeds))
            sampling = sampling_of(config.sampling, seed=run.recipe.seed)
            plays.append((policy, sampling, [order for order in orders if order.env == env]))
        if plays:
            await _play(run, kind, arenas, plays)
        else:
            run.directory.mark_done(evaluation_stage(kind), {"episodes": 0})


def summary(run: Run) -> dict[str, Any]:
    """The run's summary, over everything that was played for evaluation so far."""
    config = run.recipe.evaluate
    assert config is not None
    episodes = (
        (stage, trajectory)
        for stage in (*MODEL_STAGES, *BASELINES)
        for trajectory in run.directory.read(evaluation_stage(stage))
    )
    return summarise(episodes, resamples=config.bootstrap, seed=run.recipe.seed)


# ---------------------------------------------------------------------------------------------------


def _orders(
    run: Run, config: EvaluateConfig, model_stage: str, siblings: Iterable[int | str]
) -> Iterator[EpisodeOrder]:
    """Ids differ between stages in the stage's name alone."""
    names = list(siblings)
    for env, count in config.tasks.items():
        stream = run.tasks(env, config.split, "evaluate")
        if count > len(stream):
            run.note(
                "warning",
                f"evaluate.tasks.{env} is {count} and split '{config.split}' has {len(stream)} tasks: "
                f"all {len(stream)} are played",
            )
        for i in range(min(count, len(stream))):
            group = f"evaluate/{model_stage}/{env}/{i}"
            for k, name in enumerate(names):
                yield EpisodeOrder(
                    id=f"{group}/{name if isinstance(name, str) else f's{name}'}",
                    group_id=group,
                    env=env,
                    task=stream[i],
                    seed=stream.seed(i),
                    sibling=k,
                )


async def _play(
    run: Run,
    model_stage: str,
    arenas: dict[str, Arena],
    plays: list[Play],
) -> None:
    stage = evaluation_stage(model_stage)
    sink = EpisodeSink(run.directory, stage)
    rewards = Means()
    harness = {name: arena.harness for name, arena in arenas.items()}
    missing = [
        unfinished(run.directory, stage, orders, harness=harness, sampling=sampling)
        for _, sampling, orders in plays
    ]
    with run.stage(stage, total=sum(len(orders) for *_, orders in plays), unit="episodes") as info:
        done = sum(len(orders) for *_, orders in plays) - sum(map(len, missing))
        for (policy, sampling, _), orders in zip(plays, missing, strict=True):
            playing = play_all(
                orders,
                arenas=arenas,
                policy=policy,
                sampling=sampling,
                sink=sink,
                concurrency=_concurrency(run),
            )
            async with aclosing(playing):
                async for trajectory in playing:
                    done += 1
                    _count(rewards, trajectory)
                    run.emit(Progress(stage=stage, done=done, metrics=rewards.so_far))
        info["episodes"] = done


def _count(rewards: Means, trajectory: Trajectory) -> None:
    if trajectory.reward is not None and not is_greedy(trajectory.id):
        rewards.add(trajectory.env, trajectory.reward)


def _concurrency(run: Run) -> int:
    assert run.recipe.evaluate is not None
    return run.recipe.evaluate.concurrency


def _baseline_policies(run: Run, kind: str) -> Iterator[tuple[str, Policy]]:
    """(environment, policy) of those environments that say what this baseline replies."""
    from turnwise.envs.baselines import baselines

    assert run.recipe.evaluate is not None
    for env in run.recipe.evaluate.tasks:
        spec: Any = run.specs[env]
        env_class = getattr(spec, "env_class", None)
        if env_class is None:  # Not a class in this process: nothing to ask.
            continue
        with boundary(EnvError, f"environment {env}: constructor"):
            instance = env_class(**spec.args)
        reply = baselines(instance).get(kind)
        if reply is not None:
            yield env, BaselinePolicy(kind, reply)
