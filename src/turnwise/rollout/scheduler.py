"""`Scheduler`: which groups are played when, and which of them an update may learn from.

    async with Scheduler(arenas=arenas, policy=policy, …) as scheduler:
        for step in range(steps):
            groups = await scheduler.next_step()         # the exact number of useful ones of each environment
            …                                            # one update
            scheduler.advance(version)                   # its weights are published

At dispatch the rule is soft: of each environment at most (updates + 1 + staleness) times the groups per
step may have been dispatched. At consumption it is hard: a group with a token older than
``version - staleness`` is dropped, and its quota goes back, so that another takes its place. Staleness 0 is
synchronous training, by the same code.

A group that is not ``useful`` gives its quota back too, while the step's refills last: the step plays on
until it is full. After that such a group takes a place itself, so that a step ends whatever is played. At
staleness 0 a step's groups follow from what they are worth alone, not from the order in which they end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from turnwise.errors import TaskError
from turnwise.rollout.arena import Arena
from turnwise.rollout.budget import ErrorBudget
from turnwise.rollout.episode import Sink
from turnwise.rollout.group import GroupOrder, PlayGroup, play_group
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import episode_of
from turnwise.types import Sampling, StopReason, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

Source = Callable[[str, int], GroupOrder | None]
"""The n-th group of an environment, n = 0, 1, 2, …; None skips one that a step has used already."""
Finished = Callable[[str], tuple[Trajectory, ...]]
"""The siblings of a group that are on disk, by the group's id."""
Useful = Callable[[TrajectoryGroup], bool]
"""Whether an update can learn anything from a group."""

COUNTED = (
    "stale_groups", "refilled_groups", "retried_groups", "replaced_groups",
    "replayed_siblings", "short_groups", "start_differs",
)  # fmt: skip
"""What a scheduler counts; the last three are of consumed groups: siblings that were played again as their
environment was lost, groups in which some sibling has no score in the end, siblings that saw other first
messages."""
MOST_SKIPPED = 1_000_000
"""Groups in a row that a source may skip; one that skips more has none left."""


@dataclass(frozen=True, slots=True)
class _Ready:
    index: int
    oldest: int
    group: TrajectoryGroup
    useful: bool


class Scheduler:
    """Plays groups ahead of the learner, as far as staleness allows.

    Must be made and used on one event loop. Leaving its context cancels what is in flight; every episode that
    had started has then reached the sink.

    Args:
        arenas: By environment name.
        policy: Who answers.
        sampling: How.
        source: What to play.
        groups_per_step: How many useful groups of each environment make one step.
        sink: Takes every episode once, in the order they end.
        staleness: How many versions old a consumed token may be.
        concurrency: Episodes in flight.
        version: The weights that are current now.
        steps: How many steps will be asked for: nothing is played beyond them. None is without end.
        counts: What an earlier run had counted; see `counts`.
        finished: Siblings that an earlier run has played: they are taken as they are.
        useful: Which groups fill a step; all of them if None.
        refill_limit: A step plays at most so many times its groups; 1 fills it with whatever comes.
        retries: How often a sibling is played again whose environment was lost, as ``{id}/s0~1``, and then a
            group whose siblings all failed, as ``{id}~1/s0``, before another takes its place.
        max_failures: Episodes in a row that may fail with none succeeding.
        play: Plays a group.

    Raises:
        TaskError: ``groups_per_step`` names an environment that is not among the arenas.
    """

    def __init__(
        self,
        *,
        arenas: Mapping[str, Arena],
        policy: Policy,
        sampling: Sampling,
        source: Source,
        groups_per_step: Mapping[str, int],
        sink: Sink,
        finished: Finished | None = None,
        useful: Useful | None = None,
        refill_limit: int = 1,
        staleness: int = 0,
        concurrency: int = 256,
        version: int = 0,
        steps: int | None = None,
        counts: Mapping[str, int] | None = None,
        retries: int = 2,
        max_failures: int = 64,
        play: PlayGroup = play_group,
    ) -> None:
        unknown = sorted(set(groups_per_step) - set(arenas))
        if unknown:
            raise TaskError(f"groups of unknown environments {unknown}; known: {sorted(arenas)}")
        self.arenas, self.policy, self.sampling, self.source = arenas, policy, sampling, source
        self.groups_per_step = {env: count for env, count in groups_per_step.items() if count > 0}
        self.staleness, self.version, self.retries = staleness, version, retries
        self.budget = ErrorBudget(
            max_failures=max_failures,
            max_excluded={name: arena.max_excluded for name, arena in arenas.items()},
        )
        self.counts: dict[str, int] = {**dict.fromkeys(COUNTED, 0), **(counts or {})}
        """How often so far, by the names in `COUNTED`."""
        self.given_up: tuple[str, ...] = ()
        """Groups that neither the last step used nor any other will: all siblings failed, or they came too
        late. They are counted; a later run that plays them from disk again would count them twice."""
        self._given_up: list[str] = []
        self._sink, self._finished, self._useful, self._play_group = sink, finished, useful, play
        self._refills = {env: (refill_limit - 1) * count for env, count in self.groups_per_step.items()}
        """Groups that are not useful and give their quota back, at most, in each step."""
        self._slots = asyncio.Semaphore(concurrency)
        self._updates, self._steps = 0, steps
        self._next = dict.fromkeys(self.groups_per_step, 0)
        self._spent = dict.fromkeys(self.groups_per_step, 0)
        """Quota in use: groups dispatched, without those that were dropped."""
        self._ready: dict[str, list[_Ready]] = {env: [] for env in self.groups_per_step}
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        """Groups dispatched that are neither ready nor given up."""
        self._problem: BaseException | None = None
        self._closed = False
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Playing starts with the first `next_step`."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is in flight."""
        await self.aclose()

    async def next_step(self) -> list[TrajectoryGroup]:
        """What the next step uses up, in the order of environments and indices.

        Of each environment these are as many useful groups as were asked for, or fewer where the step's
        refills did not suffice, and all that were found not to be useful since the last step. At staleness 0
        the next step can only be had after `advance`.

        Raises:
            TooManyFailuresError: The error budget is used up.
            TaskError: The source has no more groups.
            Exception: What the sink or the source raised, or a defect in playing.
        """
        assert not self._closed, "the scheduler is closed"
        while True:
            self._check()
            self._sweep()
            self._dispatch()
            self._check()
            if all(self._places(env) >= count for env, count in self.groups_per_step.items()):
                return self._take()
            assert self._tasks, "nothing is in flight and nothing may be dispatched: advance() comes first"
            self._changed.clear()
            await self._changed.wait()

    def advance(self, version: int) -> None:
        """A step was learned from; the policy samples from weights of this version now.

        The version may be the same as before, where there was nothing in the step to learn.
        """
        assert version >= self.version, f"versions do not go back: {version} after {self.version}"
        self.version = version
        self._updates += 1
        self._dispatch()

    async def aclose(self) -> None:
        """Cancel what is in flight, wait for it, close the environments. May be called twice."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(arena.aclose() for arena in self.arenas.values()))

    @property
    def metrics(self) -> dict[str, float]:
        """Counts since the beginning, and groups in flight and waiting."""
        return {
            **{f"scheduler/{name}": float(value) for name, value in self.counts.items()},
            "scheduler/groups_in_flight": float(self._in_flight),
            "scheduler/groups_ready": float(sum(map(len, self._ready.values()))),
        }

    # -- dispatch ----------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Start what the quotas allow, one group of each environment after another."""
        started = not self._closed and self._problem is None
        steps = self._updates + 1 + self.staleness
        if self._steps is not None:
            steps = min(steps, self._steps)
        while started:
            started = False
            for env, count in self.groups_per_step.items():
                if self._spent[env] >= steps * count:
                    continue
                index, order = self._next_order(env)
                self._spent[env] += 1
                self._in_flight += 1
                task = asyncio.ensure_future(self._play(index, order))
                self._tasks.add(task)
                task.add_done_callback(self._ended)
                started = True

    def _next_order(self, env: str) -> tuple[int, GroupOrder]:
        first = self._next[env]
        for index in range(first, first + MOST_SKIPPED):
            order = self.source(env, index)
            if order is not None:
                self._next[env] = index + 1
                return index, order
        raise TaskError(
            f"the source has no group of '{env}' from {first} to {first + MOST_SKIPPED - 1}; it must go on "
            "without end: begin the tasks anew where they are through"
        )

    async def _play(self, index: int, order: GroupOrder) -> None:
        """Play a group until it is of use, within bounds; where it never is, its quota goes back."""
        first = order.id
        order = replace(order, retries=self.retries)
        for attempt in range(self.retries + 1):
            if attempt:
                order = replace(order, id=f"{first}~{attempt}", finished=())
            if self._finished is not None:
                order = replace(order, finished=(*order.finished, *self._finished(order.id)))
            group = await self._play_group(
                order,
                arena=self.arenas[order.env],
                policy=self.policy,
                sampling=self.sampling,
                sink=self._deliver,
                slots=self._slots,
                version=self.version,
            )
            reasons = {one.stop_reason for one in group.trajectories}
            if not all(reason.failed for reason in reasons):
                self._arrive(index, group)
                return
            if reasons == {StopReason.PROMPT_TOO_LONG}:
                break  # It will not get shorter.
            self.budget.check()
            self.counts["retried_groups"] += attempt < self.retries
        log.warning("group %s: all siblings failed; another group takes its place", first)
        self.counts["replaced_groups"] += 1
        self._given_up.append(first)
        self._in_flight -= 1
        self._spent[order.env] -= 1

    def _arrive(self, index: int, group: TrajectoryGroup) -> None:
        """A group is played; one that is not useful gives its quota back while the step's refills last."""
        self._in_flight -= 1
        useful = self._useful is None or self._useful(group)
        if not useful and self._useless(group.env) < self._refills[group.env]:
            self._spent[group.env] -= 1
            self.counts["refilled_groups"] += 1
        self._ready[group.env].append(_Ready(index, oldest_version(group), group, useful))

    def _deliver(self, trajectory: Trajectory) -> None:
        self._sink(trajectory)
        self.budget.record(trajectory)
        if trajectory.stop_reason.failed:  # The budget may be used up before any group ends.
            self._changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._problem = self._problem or task.exception()
        self._changed.set()

    # -- consumption -------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._problem is not None:
            raise self._problem
        self.budget.check()

    def _sweep(self) -> None:
        """Drop what is too old to learn from; what teaches nothing was dropped when it came."""
        oldest = self.version - self.staleness
        for env, ready in self._ready.items():
            fresh = [one for one in ready if one.oldest >= oldest or not one.useful]
            stale = [one.group.id for one in ready if one.oldest < oldest and one.useful]
            if stale:
                log.info("dropped %d groups of '%s': older than version %d", len(stale), env, oldest)
                self.counts["stale_groups"] += len(stale)
                self._given_up += stale
                self._spent[env] -= len(stale)
                self._ready[env] = fresh

    def _useless(self, env: str) -> int:
        """Groups since the last step that are not useful."""
        return sum(not one.useful for one in self._ready[env])

    def _places(self, env: str) -> int:
        """How many places of the next step can be filled: by useful groups, or by others past the refills."""
        useless = self._useless(env)
        return len(self._ready[env]) - useless + max(0, useless - self._refills[env])

    def _take(self) -> list[TrajectoryGroup]:
        taken: list[TrajectoryGroup] = []
        for env, count in self.groups_per_step.items():
            ready = sorted(self._ready[env], key=lambda one: one.index)
            last = [one.index for one in ready if one.useful][:count]
            later = [one for one in ready if one.useful][count:]
            taken += [one.group for one in ready if not one.useful or one.index in last]
            # A step uses its own quota, no more: playing ahead, more places may have been filled by now.
            self._spent[env] -= self._places(env) - len(later) - count
            self._ready[env] = later
        self._count(taken)
        self.given_up, self._given_up = tuple(self._given_up), []
        return taken

    def _count(self, taken: Sequence[TrajectoryGroup]) -> None:
        for group in taken:
            siblings = len({episode_of(one.id) for one in group.trajectories})
            self.counts["replayed_siblings"] += len(group.trajectories) - siblings
            self.counts["short_groups"] += len(group.scored) < siblings
            self.counts["start_differs"] += sum(
                bool(one.metrics.get("start_differs")) for one in group.trajectories
            )


def oldest_version(group: TrajectoryGroup) -> int:
    """The weights that drew a group's oldest token; those of its dispatch where replies have no tokens."""
    versions = [min(turn.versions) for one in group.scored for turn in one.turns if turn.versions]
    return min(versions, default=group.version)
