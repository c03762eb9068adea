"""`Player`: what a learner needs of whoever plays for it. `Scheduler` is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

from turnwise.types import TrajectoryGroup


class Player(Protocol):
    """Hands out a step's groups, each episode of which has reached the sink, and is told of new weights."""

    counts: dict[str, int]
    """What it has counted so far, over all runs of a run that was resumed."""
    given_up: tuple[str, ...]
    """Ids of groups that were played for the last step in vain."""

    async def __aenter__(self) -> Self:
        """Begin; nothing is played before the first `next_step`."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is in flight and close the environments."""
        ...

    async def next_step(self) -> list[TrajectoryGroup]:
        """What the next step uses up.

        Raises:
            TooManyFailuresError: Too many episodes failed.
            TaskError: There are no more groups.
        """
        ...

    def advance(self, version: int) -> None:
        """A step was learned from; the policy samples from weights of this version now."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """What is told of every step."""
        ...
