"""Requests under way at vLLM servers, and the watch over those whose server says nothing at all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from turnwise.engines.vllm_server import VllmServer
from turnwise.errors import EngineError

PING_SECONDS = 15.0
"""Between two questions to a server that is at a request, and for the answer."""
MISSES = 3
"""Unanswered questions after which a server counts as lost. A busy one answers: they are not the engine's."""


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """A request that a server is at."""

    server: VllmServer
    session: str | None
    name: str
    version: int
    """Asked for."""
    task: asyncio.Task[Any]
    """Waits for it."""
    since: float = field(default_factory=time.monotonic)
    moved: bool = False
    """It was ended by us, to go on as another request."""
    lost: bool = False
    """Its server is; it is to be asked of another."""

    def lose(self) -> None:
        """Stop waiting."""
        self.lost = True
        self.task.cancel()

    def given_up(self) -> bool:
        """Whether the cancellation that has just come is `lose`'s alone, and taken back."""
        return self.lost and self.task.uncancel() == 0


async def watch(flights: Collection[Flight], lose: Callable[[VllmServer, EngineError], None]) -> None:
    """Call ``lose`` with every server that has requests and does not answer; until cancelled."""
    missed: Counter[VllmServer] = Counter()

    async def ping(server: VllmServer) -> None:
        try:
            await server.ping(PING_SECONDS)
            missed[server] = 0
        except EngineError as error:
            missed[server] += 1
            if missed[server] == MISSES:
                missed[server] = 0
                lose(server, error)

    while True:
        await asyncio.sleep(PING_SECONDS)
        now = time.monotonic()
        await asyncio.gather(*map(ping, {one.server for one in flights if now - one.since >= PING_SECONDS}))


async def why_silent(servers: Iterable[VllmServer], seconds: float) -> str:
    """Why there was no reply in time."""
    text = f"no reply within engine.request_seconds={seconds:g}"
    for server in servers:
        with suppress(EngineError):
            reason = await server.idle_reason()
            if reason is not None:
                path = "wake_up" if reason == "asleep" else "resume"
                return f"{text}: {server} is {reason}; POST {server}/{path}"
    return f"{text}; a longer one needs a higher limit, or fewer episodes at once"
