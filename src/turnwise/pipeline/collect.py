"""Collect: play episodes to learn from, by the environments' teachers, the present model, or an endpoint.

    tasks ──> episodes ──> trajectories/collect.jsonl      (every one of them, kept or not)

What is kept is decided when it is read (`kept`), so changing ``collect.keep`` costs no new episode.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

from turnwise.config import CollectConfig
from turnwise.errors import RecipeError
from turnwise.pipeline.attempts import last_attempts, unfinished
from turnwise.pipeline.context import Means, Run, sampling_of
from turnwise.pipeline.sink import EpisodeSink
from turnwise.rollout.arena import Arena
from turnwise.rollout.play import play_all
from turnwise.rollout.policies import ModelPolicy, TeacherPolicy
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder
from turnwise.types import Trajectory
from turnwise.view.events import Progress

STAGE = "collect"


async def collect(run: Run) -> None:
    """Play what is not on disk yet."""
    config = run.recipe.collect
    assert config is not None
    orders = list(collect_orders(run, config))
    sampling = sampling_of(config.sampling, seed=run.recipe.seed)
    sink = EpisodeSink(run.directory, STAGE)
    rewards = Means()
    with run.stage(STAGE, total=sum(config.episodes.values()), unit="episodes") as info:
        async with collecting_policy(run, config) as (policy, arenas):
            harness = {name: arena.harness for name, arena in arenas.items()}
            missing = unfinished(run.directory, STAGE, orders, harness=harness, sampling=sampling)
            playing = play_all(
                missing,
                arenas=arenas,
                policy=policy,
                sampling=sampling,
                sink=sink,
                concurrency=config.concurrency,
            )
            async with aclosing(playing):
                done = len(orders) - len(missing)
                async for trajectory in playing:
                    done += 1
                    if trajectory.reward is not None:
                        rewards.add(trajectory.env, trajectory.reward)
                    run.emit(Progress(stage=STAGE, done=done, metrics=rewards.so_far))
        info["kept"] = dict.fromkeys(config.episodes, 0)
        for trajectory in kept(run):
            info["kept"][trajectory.env] += 1
        info["played"] = dict(config.episodes)
        for env, count in info["kept"].items():
            if config.episodes[env] and not count:
                raise RecipeError(
                    f"collect.keep leaves none of the {config.episodes[env]} episodes of '{env}': lower it, "
                    f"or look at {run.directory.path}/trajectories/{STAGE}.jsonl"
                )


def kept(run: Run) -> Iterator[Trajectory]:
    """The collected episodes that are worth learning from: scored, and with at least ``collect.keep``."""
    config = run.recipe.collect
    assert config is not None
    for trajectory in last_attempts(run.directory, STAGE):
        if trajectory.env not in config.episodes or trajectory.reward is None:
            continue
        least = config.keep.get(trajectory.env) if isinstance(config.keep, dict) else config.keep
        if least is None or trajectory.reward >= least:
            yield trajectory


def collect_orders(run: Run, config: CollectConfig) -> Iterator[EpisodeOrder]:
    """The stage's episodes, the environments taking turns so that all of them progress."""
    streams = {env: run.tasks(env, "train", STAGE) for env in config.episodes}
    for i in range(max(config.episodes.values(), default=0)):
        for env, stream in streams.items():
            if i < config.episodes[env]:
                group = f"collect/{env}/{i}"
                yield EpisodeOrder(
                    id=f"{group}/s0", group_id=group, env=env, task=stream[i], seed=stream.seed(i)
                )


def place_of(trajectory: Trajectory) -> int:
    """Which of its environment's collected episodes this is: they end in any order, and count in this one."""
    return int(trajectory.group_id.rpartition("/")[2])


@asynccontextmanager
async def collecting_policy(
    run: Run, config: CollectConfig
) -> AsyncIterator[tuple[Policy, dict[str, Arena]]]:
    """Who plays, and where; the harness names the renderer where there is one."""
    if config.policy == "teacher":
        yield TeacherPolicy(), run.arenas()
    elif config.policy == "engine":
        model = run.model_before("sft")
        renderer = run.renderer(model)
        async with run.engine(model) as engine:
            yield ModelPolicy(engine, renderer), run.arenas(renderer)
    elif config.policy.startswith("endpoint:"):
        from turnwise.rollout.endpoint import EndpointPolicy

        url, _, model_name = config.policy.removeprefix("endpoint:").partition("#")
        policy = EndpointPolicy(url, model_name)
        try:
            yield policy, run.arenas()
        finally:
            await policy.aclose()
    else:
        raise RecipeError(
            f"collect.policy is '{config.policy}'; allowed are 'teacher', 'engine' and 'endpoint:URL#model'"
        )
