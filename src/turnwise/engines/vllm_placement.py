"""Which vLLM server a request goes to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from turnwise.engines.vllm_server import VllmServer

SHUN_SECONDS = 30.0
"""How long a server that could not be reached gets nothing that another could take."""


class Placement:
    """Keeps a session with the server that has its context cached; a new one goes where there are fewest."""

    def __init__(self, servers: Sequence[VllmServer]) -> None:
        self._servers = list(servers)
        self._home: dict[str, VllmServer] = {}
        self._unreached: dict[VllmServer, float] = {}
        self.behind: set[VllmServer] = set()
        """Servers that missed the present weights."""

    @property
    def current(self) -> list[VllmServer]:
        """Servers with the present weights."""
        return [server for server in self._servers if server not in self.behind]

    def place(self, session: str | None, busy: Iterable[VllmServer]) -> VllmServer:
        """The server for a session's next request, or for one without a session.

        Args:
            session: Its name.
            busy: The server of each request under way that has no session.
        """
        now = time.monotonic()
        current = self.current or self._servers
        fit = [one for one in current if now - self._unreached.get(one, -SHUN_SECONDS) >= SHUN_SECONDS]
        home = None if session is None else self._home.get(session)
        if home is not None and (home in fit or (not fit and home in current)):
            return home
        load = Counter([*self._home.values(), *busy])
        chosen = min(fit or current, key=lambda server: load[server])
        if session is not None:
            self._home[session] = chosen
        return chosen

    def shun(self, server: VllmServer) -> None:
        """It could not be reached just now."""
        self._unreached[server] = time.monotonic()

    def release(self, session: str) -> None:
        """Forget a session."""
        self._home.pop(session, None)
