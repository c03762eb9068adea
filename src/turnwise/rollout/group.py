"""`play_group`: siblings of one task from one seed, side by side, none waiting for another.

Where the arena has reward functions, siblings are scored together, and an episode counts as finished (it
reaches the sink) when its group is scored. Without functions each reaches the sink the moment it ends.

A sibling whose environment was lost (its server is gone, its process died) is played again, after a pause and
under an id of its own, ``…/s1~1``; the group holds both, and only the one that has a reward is learned from.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from turnwise.errors import EnvLostError
from turnwise.rollout.arena import Arena
from turnwise.rollout.columns import Live
from turnwise.rollout.episode import Sink, play_episode
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder, Start, attempt_of, episode_of
from turnwise.rollout.scoring import score_siblings
from turnwise.rollout.sessions import HeldSessions
from turnwise.types import Sampling, StopReason, Task, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE_SECONDS = 1.0
"""Before a lost sibling is played again, at most; twice as long before each further time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOrder:
    """One group to play. Sibling k has the id ``{id}/s{k}``."""

    id: str
    """Unique in the run, and the same when the run is resumed: ``rl/12/catch/3``."""
    env: str
    task: Task
    seed: int
    size: int
    finished: tuple[Trajectory, ...] = ()
    """Siblings that are on disk already: not played again, save cancelled ones, which never finished."""
    retries: int = 0
    """How often a sibling whose environment was lost is played again, each time as ``{id}/s{k}~{n}``."""

    @property
    def done(self) -> dict[str, Trajectory]:
        """Finished siblings by id."""
        return {one.id: one for one in self.finished if one.stop_reason is not StopReason.CANCELLED}

    def episodes(self) -> list[EpisodeOrder]:
        """All siblings, in order."""
        return [
            EpisodeOrder(
                id=f"{self.id}/s{k}",
                group_id=self.id,
                env=self.env,
                task=self.task,
                seed=self.seed,
                sibling=k,
            )
            for k in range(self.size)
        ]

    def missing(self) -> list[EpisodeOrder]:
        """What is to be played: siblings that have not finished, or are lost and may be played again."""
        done, missing = self.done, []
        for episode in self.episodes():
            while (one := done.get(episode.id)) is not None and self._again(one):
                episode = episode.again()
            if episode.id not in done:
                missing.append(episode)
        return missing

    def _again(self, one: Trajectory) -> bool:
        return lost(one) and attempt_of(one.id) < self.retries


def lost(trajectory: Trajectory) -> bool:
    """Whether an episode's environment was lost, which another try may change; not an `UnscoredError`."""
    error = trajectory.error
    gone = error is not None and error.kind == EnvLostError.__name__
    return gone and trajectory.stop_reason is StopReason.ENV_FAILED


class PlayGroup(Protocol):
    """Plays groups as `play_group` does, which says what the arguments are, and what may be raised."""

    async def __call__(
        self,
        order: GroupOrder,
        *,
        arena: Arena,
        policy: Policy,
        sampling: Sampling,
        sink: Sink,
        slots: asyncio.Semaphore | None = None,
        version: int = 0,
    ) -> TrajectoryGroup:
        """Play what is missing of a group; every sibling that was begun reaches the sink once."""
        ...


async def play_group(
    order: GroupOrder,
    *,
    arena: Arena,
    policy: Policy,
    sampling: Sampling,
    sink: Sink,
    slots: asyncio.Semaphore | None = None,
    version: int = 0,
) -> TrajectoryGroup:
    """Play what is missing of a group.

    Args:
        order: The task, and which siblings there are already.
        arena: Where.
        policy: Who answers.
        sampling: How.
        sink: Called once for each sibling that is played here, whatever becomes of it.
        slots: Bounds the episodes in flight, over all groups.
        version: The weights that are current now.

    Raises:
        CancelledError: After every sibling that had started was ended and reached the sink.
        Exception: What the sink raised, or a defect; the siblings were ended as if cancelled.
    """
    finished = tuple(order.done.values())
    played = await play_siblings(
        order.missing(),
        finished,
        arena=arena,
        policy=policy,
        sampling=sampling,
        sink=sink,
        slots=slots or asyncio.Semaphore(order.size),
        retries=order.retries,
    )
    if any(one.metrics.get("start_differs") for one in played):
        log.warning(
            "group %s: siblings of one task and seed saw different first messages; "
            "environment '%s' must draw from self.rng alone", order.id, order.env,
        )  # fmt: skip
    place = {episode.id: number for number, episode in enumerate(order.episodes())}
    return TrajectoryGroup(
        id=order.id,
        env=order.env,
        task=order.task,
        trajectories=tuple(
            sorted([*finished, *played], key=lambda one: (place[episode_of(one.id)], attempt_of(one.id)))
        ),
        version=version,
    )


async def play_siblings(
    episodes: Sequence[EpisodeOrder],
    finished: Sequence[Trajectory] = (),
    *,
    arena: Arena,
    policy: Policy,
    sampling: Sampling,
    sink: Sink,
    slots: asyncio.Semaphore,
    retries: int = 0,
) -> list[Trajectory]:
    """Play episodes of one task side by side and score them together with those that are ``finished``.

    Where ``retries`` are allowed, lost episodes and what was played in their place are all returned.

    Raises:
        CancelledError, Exception: As for `play_group`.
    """
    start = Start(next((one.segments[0].prompt for one in finished if one.segments), None))
    held: list[Trajectory] = []
    deliver: Sink = held.append if arena.functions else sink
    sessions = HeldSessions(arena.sessions) if arena.holds else None

    async def play(episode: EpisodeOrder) -> list[Trajectory]:
        attempts: list[Trajectory] = []
        while True:
            async with slots:
                one = await play_episode(
                    episode,
                    arena=arena,
                    policy=policy,
                    sampling=sampling,
                    sink=deliver,
                    start=start,
                    sessions=sessions,
                )
            attempts.append(one)
            before = attempt_of(one.id)
            if not lost(one) or before >= retries:
                return attempts
            await asyncio.sleep(PAUSE_SECONDS * 2**before * random.uniform(0.5, 1.0))
            episode = episode.again()

    try:
        attempts = await _all([play(episode) for episode in episodes])
        played = [one for each in attempts for one in each]
        if arena.functions:
            ours = {one.id for one in played}
            instances = sessions.instances if sessions is not None else {}
            live = {id: Live(environment=one) for id, one in instances.items()}
            scored = await score_siblings([*finished, *played], arena.functions, arena.spec.forfeit, live)
            played = held = [one for one in scored if one.id in ours]
    except BaseException:
        # Scores that were never given are no scores: what had ended by then counts as cancelled.
        held = [one if one.stop_reason.failed else _cancelled(one) for one in held]
        raise
    finally:
        if sessions is not None:
            sessions.release()
        if arena.functions:
            for one in held:
                sink(one)
    return played


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one raises, or this is cancelled, the others are cancelled and awaited."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _cancelled(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, stop_reason=StopReason.CANCELLED)
