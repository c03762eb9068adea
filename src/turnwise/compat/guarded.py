"""`Guarded`: plays groups as `play_group` does, and ends the run where an environment fails in all of one.

    play = Guarded()
    Scheduler(play=play, …)

An environment in which nothing has gone well yet, and all of whose first siblings fail alike, is broken: so
is one whose code is wrong (`DEFECTS`) for all siblings of any group. The error says so, with the traceback.
Other episodes that an environment breaks are left out, and told of once for each kind. (What reward functions
break is decided by `turnwise.rollout.faults`.)
"""

from __future__ import annotations

import asyncio
import logging
import re

from turnwise.errors import EnvError, PolicyError
from turnwise.rollout.arena import Arena
from turnwise.rollout.episode import Sink
from turnwise.rollout.faults import DEFECTS
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policy import Policy
from turnwise.types import Failure, Sampling, StopReason, TrajectoryGroup

log = logging.getLogger(__name__)

_DEFECT = re.compile(rf"^({'|'.join(one.__name__ for one in DEFECTS)})\b", re.MULTILINE)
"""In a traceback."""


class Guarded:
    """A `turnwise.rollout.group.PlayGroup`."""

    def __init__(self) -> None:
        self._sound: set[str] = set()
        """Environments in which an episode went well."""
        self._told: set[tuple[str, str]] = set()

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
        """See `play_group`.

        Raises:
            EnvError, PolicyError: All siblings failed alike.
        """
        group = await play_group(
            order, arena=arena, policy=policy, sampling=sampling, sink=sink, slots=slots, version=version
        )
        failures = [
            one.error
            for one in group.trajectories
            if one.stop_reason.faulty and one.stop_reason is not StopReason.PROMPT_TOO_LONG and one.error
        ]
        everyone = len(failures) == len(group.trajectories)
        if failures and everyone and self._is_broken(group.env, failures):
            raise _error(failures[0], len(failures))
        if not everyone:
            self._sound.add(group.env)
        for failure in failures:
            self._tell(failure)
        return group

    def _is_broken(self, env: str, failures: list[Failure]) -> bool:
        alike = len({(one.kind, one.where) for one in failures}) == 1
        if not alike or failures[0].where.startswith("reward "):
            return False
        return env not in self._sound or all(_DEFECT.search(one.traceback) for one in failures)

    def _tell(self, failure: Failure) -> None:
        kind = failure.where, failure.kind
        if failure.where.startswith("environment ") and kind not in self._told:
            self._told.add(kind)
            log.warning(
                "%s failed, and its episode is left out; of %s there this is told once:\n%s",
                failure.where, failure.kind, failure.traceback.rstrip(),
            )  # fmt: skip


def _error(failure: Failure, count: int) -> EnvError | PolicyError:
    kind = EnvError if failure.where.startswith("environment ") else PolicyError
    error = kind(f"{failure.message} (in all {count} episodes of a group)")
    error.add_note(failure.traceback.rstrip())
    return error
