"""`SessionPool`: live environments of one kind, used again from episode to episode.

`HeldSessions` keeps some of them as their episodes left them, for reward functions that look at them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from weakref import WeakKeyDictionary

from turnwise.envs.session import EnvSpec, Limits, Session

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long the end of a run waits for environments that are still being closed."""


class SessionPool:
    """Opens environments when they are needed and keeps healthy ones for the next episode.

    What bounds the number of live environments is the number of episodes in flight. Broken ones are closed
    and replaced. Closing never holds up an episode.

    Args:
        spec: Opens them.
        limits: Of every episode.
        keep: How many idle ones are held on to.
        reuse: Episodes that one plays before it is replaced, so that what its class leaks does not add up
            over a run.
    """

    def __init__(self, spec: EnvSpec, limits: Limits, *, keep: int = 256, reuse: int = 256) -> None:
        self.spec, self.limits, self.keep, self.reuse = spec, limits, keep, reuse
        self._idle: list[Session] = []
        self._played: WeakKeyDictionary[Session, int] = WeakKeyDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    async def acquire(self) -> Session:
        """An idle environment or a new one.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        while self._idle:
            session = self._idle.pop()
            if session.alive:
                return session
            self.release(session, healthy=False)
        return await self.spec.open(self.limits)

    def release(self, session: Session, *, healthy: bool) -> None:
        """Give an environment back; one that is not healthy, or not needed, is closed in the background."""
        played = self._played[session] = self._played.get(session, 0) + 1
        if healthy and played < self.reuse and len(self._idle) < self.keep:
            self._idle.append(session)
            return
        task = asyncio.get_running_loop().create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Close every idle environment and wait, within bounds, for those being closed.

        The pool may be used again afterwards, also from another event loop.
        """
        while self._idle:
            self.release(self._idle.pop(), healthy=False)
        if not self._closing:
            return
        _, slow = await asyncio.wait(self._closing, timeout=CLOSE_SECONDS)
        for task in slow:
            task.cancel()
        if slow:
            log.warning("%d environments of '%s' did not close in time", len(slow), self.spec.name)


class HeldSessions:
    """Environments of siblings that have ended, kept as they are until the siblings are scored.

    What is held plays no other episode, so there are more live environments than episodes in flight: those of
    the siblings that wait for their group's slowest. One whose instance is out of reach, on a server or in
    another process, is given back at once: there is nothing to look at, and siblings may wait for its place.

    Args:
        pool: Where they go afterwards.
    """

    def __init__(self, pool: SessionPool) -> None:
        self._pool = pool
        self._held: dict[str, tuple[Session, bool]] = {}
        self._instances: dict[str, Any] = {}

    def keep(self, episode: str, session: Session, *, healthy: bool) -> None:
        """Take over a session from the episode that ends; ``healthy`` as for `SessionPool.release`."""
        assert episode not in self._instances, f"{episode} ends twice"
        self._instances[episode] = session.instance
        if session.instance is None:
            self._pool.release(session, healthy=healthy)
        else:
            self._held[episode] = session, healthy

    @property
    def instances(self) -> dict[str, Any]:
        """The authors' own objects by the episodes' ids; None where one lives in another process."""
        return dict(self._instances)

    def release(self) -> None:
        """Give all of them back."""
        while self._held:
            _, (session, healthy) = self._held.popitem()
            self._pool.release(session, healthy=healthy)
