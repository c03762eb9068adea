"""`play_all`: a finite list of episodes, as many at a time as may be, for collecting and evaluating."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping

from turnwise.errors import TaskError
from turnwise.rollout.arena import Arena
from turnwise.rollout.budget import ErrorBudget
from turnwise.rollout.episode import Sink
from turnwise.rollout.group import play_siblings
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder
from turnwise.types import Sampling, Trajectory


async def play_all(
    orders: Iterable[EpisodeOrder],
    *,
    arenas: Mapping[str, Arena],
    policy: Policy,
    sampling: Sampling,
    sink: Sink,
    concurrency: int = 256,
    max_failures: int = 64,
) -> AsyncGenerator[Trajectory, None]:
    """Play every episode once and yield each as it ends; it has reached the sink by then.

    Reward functions score each episode by itself. Whoever leaves the iteration early closes it
    (``contextlib.aclosing``), so that what is in flight is cancelled then and not at some later time.

    Raises:
        TaskError: An order names no known environment, or two have one id; nothing was played.
        TooManyFailuresError: The error budget is used up.
        Exception: What the sink raised, or a defect in playing.
    """
    waiting = list(orders)
    unknown = sorted({order.env for order in waiting} - set(arenas))
    if unknown:
        raise TaskError(f"episodes of unknown environments {unknown}; known: {sorted(arenas)}")
    if len({order.id for order in waiting}) < len(waiting):
        raise TaskError("two episodes have the same id; ids are unique in a run")
    budget = ErrorBudget(
        max_failures=max_failures, max_excluded={name: arena.max_excluded for name, arena in arenas.items()}
    )
    ended: asyncio.Queue[Trajectory | None] = asyncio.Queue()
    left = iter(waiting)

    def deliver(trajectory: Trajectory) -> None:
        sink(trajectory)
        budget.record(trajectory)
        ended.put_nowait(trajectory)

    async def work() -> None:
        slot = asyncio.Semaphore()
        for order in left:
            await play_siblings(
                [order], arena=arenas[order.env], policy=policy, sampling=sampling, sink=deliver, slots=slot
            )

    workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(waiting)))]
    for worker in workers:
        worker.add_done_callback(lambda _: ended.put_nowait(None))
    try:
        working = len(workers)
        while working:
            trajectory = await ended.get()
            if trajectory is None:
                working -= 1
                for worker in workers:
                    if worker.done():
                        worker.result()
                continue
            budget.check()
            yield trajectory
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.gather(*(arena.aclose() for arena in arenas.values()))
