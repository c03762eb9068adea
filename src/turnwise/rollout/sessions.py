"""`SessionPool`: live environments of one kind, used again from episode to episode."""

from __future__ import annotations

import asyncio
import logging

from turnwise.envs.session import EnvSpec, Limits, Session

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long the end of a run waits for environments that are still being closed."""


class SessionPool:
    """Opens environments when they are needed and keeps healthy ones for the next episode.

    What bounds the number of live environments is the number of episodes in flight; ``keep`` bounds how many
    idle ones are held on to. Broken ones are closed and replaced. Closing never holds up an episode.
    """

    def __init__(self, spec: EnvSpec, limits: Limits, *, keep: int = 256) -> None:
        self.spec, self.limits, self.keep = spec, limits, keep
        self._idle: list[Session] = []
        self._closing: set[asyncio.Task[None]] = set()

    async def acquire(self) -> Session:
        """An idle environment or a new one.

        Raises:
            EnvError: Its constructor raised or hung.
        """
        return self._idle.pop() if self._idle else await self.spec.open(self.limits)

    def release(self, session: Session, *, healthy: bool) -> None:
        """Give an environment back; one that is not healthy, or not needed, is closed in the background."""
        if healthy and len(self._idle) < self.keep:
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
