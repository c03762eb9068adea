"""`play_rows`: the rows of an evaluation, some times each, scored as in training, in the present weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from turnwise.compat.directory import EVALUATION
from turnwise.pipeline.context import Run, sampling_of
from turnwise.pipeline.sink import EpisodeSink
from turnwise.pipeline.tasks import TaskStream
from turnwise.rollout.group import GroupOrder, PlayGroup, play_group
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import Task, TrajectoryGroup


def orders_of(run: Run, rows: Mapping[str, Sequence[Task]], *, size: int) -> list[GroupOrder]:
    """What is played, in the order of the rows, with ids ``eval/<which evaluation>/<environment>/<row>``.

    Args:
        run: The run.
        rows: By environment.
        size: Episodes of each row.
    """
    number = 1 + max([int(one.split("/")[1]) for one in run.directory.ids(EVALUATION)], default=0)
    return [
        GroupOrder(
            id=f"{EVALUATION}/{number}/{env}/{index}",
            env=env,
            task=task,
            seed=TaskStream(env, EVALUATION, own, seed=run.recipe.seed, salt=EVALUATION).seed(index),
            size=size,
        )
        for env, own in rows.items()
        for index, task in enumerate(own)
    ]


async def play_rows(
    run: Run,
    policy: ModelPolicy,
    orders: Sequence[GroupOrder],
    *,
    play: PlayGroup = play_group,
    ended: Callable[[], Awaitable[None]],
) -> list[TrajectoryGroup]:
    """Play them, as many at a time as in training.

    Args:
        run: With ``rl`` settings; its directory's lock must be held.
        policy: Who plays.
        orders: What.
        play: How a group is played.
        ended: Called after each group.

    Raises:
        Exception: What the sink raised, or a defect in playing.
    """
    config = run.recipe.rl
    assert config is not None
    arenas = run.arenas(policy.renderer)
    sampling = sampling_of(config.sampling, seed=run.recipe.seed)
    sink, slots = EpisodeSink(run.directory, EVALUATION), asyncio.Semaphore(config.concurrency)

    async def group(order: GroupOrder) -> TrajectoryGroup:
        played = await play(
            order, arena=arenas[order.env], policy=policy, sampling=sampling, sink=sink, slots=slots
        )
        await ended()
        return played

    tasks = [asyncio.ensure_future(group(order)) for order in orders]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(arena.aclose() for arena in arenas.values()))
