"""`Sessions`: every live environment of a server, how many there may be, who waits, and which are idle.

A session has one owner, a socket or an HTTP cookie, and is closed with it. When all are taken the next waits
in a bounded queue; when that is full too it is refused. A socket keeps its session for as long as it is open.
What HTTP clients come back to by a name, and may never do, gives way to whoever waits: at once until its
client has come back to it, later once it has been idle for `YIELD_SECONDS`, the longest idle first. One task
looks after all: it closes what nobody has used for ``idle_timeout``, and has whoever waits long for its
environment listen for a client that leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from turnwise.errors import EnvError, TurnwiseError, boundary
from turnwise.openenv.served import DEAD, Served, ServedSession
from turnwise.openenv.server.settings import Settings

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Between two looks at all sessions."""
PATIENCE_SECONDS = 0.5
"""How long a call may take before its owner is asked to listen for the client meanwhile."""
YIELD_SECONDS = 40.0
"""How long an idle session that no socket holds is safe from who waits for one; they wait for longer."""
DRAFT_SECONDS = 300.0
"""How long one that nobody needs is kept for a client that never came back to it."""


class CapacityError(TurnwiseError):
    """All sessions are taken, and so is the queue, or the wait was too long."""

    def __init__(self, active: int, limit: int, why: str) -> None:
        super().__init__(f"{active} of {limit} sessions are in use and {why}: try again later")
        self.active, self.limit = active, limit


class GoneError(TurnwiseError):
    """There is no such session, or not any more."""


class AheadError(TurnwiseError):
    """Too many requests of one session wait for the one before them."""


class Live:
    """One session: an environment and who owns it."""

    __slots__ = ("ahead", "busy_since", "draft", "due", "evict", "id", "lock", "session", "used", "watch")

    def __init__(self, id: str, evict: Callable[[str], Awaitable[None]], watch: Callable[[], None] | None):
        self.id = id
        self.session: ServedSession = None  # type: ignore[assignment]  # Set before anybody sees it.
        self.lock = asyncio.Lock()
        """Held by owners whose requests may overlap; a socket's never do."""
        self.ahead = 0
        """Requests that hold `lock` or wait for it."""
        self.evict = evict
        """Tells the owner why the session ends, and ends it."""
        self.watch = watch
        """Has the owner listen for its client while a call runs; called once a call is slow."""
        self.used = time.monotonic()
        self.busy_since: float | None = self.used
        self.due = 0.0
        """When the next request may come, where there is a ``rate``."""
        self.draft = False
        """Its client has not come back to it yet."""

    def early(self, rate: float) -> float:
        """Count a request; seconds by which it comes too early. A second's worth may come at once."""
        now = time.monotonic()
        self.due = max(self.due, now - 1.0) + 1.0 / rate
        return self.due - now

    def begin(self) -> None:
        """A call begins: it is not idle until `end`."""
        self.busy_since = time.monotonic()

    def end(self) -> None:
        """The call is over."""
        self.used, self.busy_since = time.monotonic(), None


class Sessions:
    """All of a server's."""

    def __init__(self, served: Served, settings: Settings) -> None:
        self.served, self.settings = served, settings
        own = served.max_sessions
        self.limit = settings.max_sessions if own is None else min(own, settings.max_sessions)
        self.live: dict[str, Live] = {}
        self.lent: OrderedDict[str, Live] = OrderedDict()
        """Those that no socket holds, the longest idle first."""
        self._taken = 0
        """Sessions that are open, opening or closing."""
        self._opening: dict[Live, asyncio.Task[ServedSession]] = {}
        self._leaving: dict[Live, asyncio.Task[None]] = {}
        """Those that are told to go: no request begins there any more, and their places are promised."""
        self._queue: deque[asyncio.Future[None]] = deque()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many clients wait for a session."""
        return len(self._queue)

    async def open(
        self,
        *,
        evict: Callable[[str], Awaitable[None]],
        watch: Callable[[], None] | None = None,
        id: str | None = None,
        lent: bool = False,
    ) -> Live:
        """A new session, as soon as one is free.

        Args:
            evict: How to tell and close its owner.
            watch: How to have its owner listen for its client.
            id: What it is called; a new name if not given.
            lent: No socket holds it and its client may never come back: idle, after its first `turn`, it
                gives way to whoever needs a session.

        Raises:
            CapacityError: None became free.
            EnvError: The environment's constructor raised or hung.
        """
        await self._slot(watch)
        live = Live(id or uuid.uuid4().hex, evict, watch)
        self._opening[live] = opening = asyncio.create_task(self._made())
        self._keep()
        try:
            live.session = await opening
        except BaseException:
            try:
                if _arrived(opening):
                    # It was made just as its client left.
                    await asyncio.shield(asyncio.ensure_future(opening.result().close()))
            finally:
                self._free()
            raise
        finally:
            del self._opening[live]
        self.live[live.id] = live
        if lent:
            live.draft = True
            self.lent[live.id] = live
        else:
            live.end()
        return live

    @asynccontextmanager
    async def turn(self, live: Live) -> AsyncIterator[ServedSession]:
        """The environment, for one request at a time, in the order they came and at most at ``rate``.

        Raises:
            AheadError: ``max_ahead`` requests wait already.
            GoneError: The session ended before it was this request's turn.
        """
        if live.ahead > self.settings.max_ahead:
            waiting = f"more than {self.settings.max_ahead} requests wait for the one before them"
            raise AheadError(f"{waiting}: send fewer at once")
        live.ahead += 1
        try:
            async with live.lock:
                if live.id not in self.live or live in self._leaving:
                    raise GoneError("the session has just ended, idle or needed by another: begin again")
                live.begin()
                try:
                    if (rate := self.settings.rate) is not None and (early := live.early(rate)) > 0:
                        await asyncio.sleep(early)
                    yield live.session
                except DEAD:
                    self._retire(live, "its environment is gone")
                    raise
                finally:
                    live.end()
                    if live.id in self.lent:
                        self.lent.move_to_end(live.id)
                    self._make_room()
        finally:
            live.ahead -= 1

    def keep(self, live: Live) -> None:
        """Its client came back."""
        live.draft = False

    async def close(self, live: Live) -> None:
        """Close a session, once."""
        if self.live.pop(live.id, None) is None:
            return
        self.lent.pop(live.id, None)
        try:
            await live.session.close()
        finally:
            self._leaving.pop(live, None)
            self._free()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[ServedSession]:
        """A session for one request alone."""

        async def nobody(_: str) -> None:
            """Busy for all its life, so never idle."""

        live = await self.open(evict=nobody)
        live.begin()
        try:
            yield live.session
        finally:
            await self.close(live)

    async def aclose(self) -> None:
        """End all: the server stops."""
        if self._keeper is not None:
            self._keeper.cancel()
        for waiting in self._queue:
            waiting.cancel()
        for opening in self._opening.values():
            opening.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for live in list(self.live.values()):
            self._retire(live, "the server stops")
        await asyncio.gather(*self._leaving.values())
        await asyncio.gather(*(self.close(live) for live in list(self.live.values())))

    # ------------------------------------------------------------------------------------------------

    async def _slot(self, watch: Callable[[], None] | None) -> None:
        if self._taken < self.limit and not self._queue:
            self._taken += 1
            return
        self._make_room(1)
        if len(self._queue) >= self.settings.queue + len(self._leaving):
            why = f"{len(self._queue)} clients wait already" if self._queue else "no client may wait"
            raise CapacityError(self._taken, self.limit, why)
        if watch is not None:
            watch()  # Who leaves must not keep their place.
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._queue.append(turn)
        timer = loop.call_later(self.settings.queue_seconds, self._waited_enough, turn)
        try:
            await turn
        except BaseException:
            if _arrived(turn):
                self._free()  # It was handed over just as its client left.
            elif turn in self._queue:
                self._queue.remove(turn)
            raise
        finally:
            timer.cancel()

    def _make_room(self, more: int = 0) -> None:
        """Have idle lent ones go until whoever waits, and ``more``, have a place promised."""
        now = time.monotonic()
        for live in list(self.lent.values()) if self._queue or more else ():
            if len(self._leaving) >= len(self._queue) + more:
                return
            if live.busy_since is None and (live.draft or now - live.used > YIELD_SECONDS):
                self._retire(live, "it was needed")

    def _free(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)  # The place is handed over, not given back.
                return
        self._taken -= 1

    def _waited_enough(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            self._queue.remove(turn)
            waited = f"none became free within {self.settings.queue_seconds:g} s"
            turn.set_exception(CapacityError(self._taken, self.limit, waited))

    def _keep(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.ensure_future(self._look_after())

    async def _look_after(self) -> None:
        idle = self.settings.idle_timeout
        pause = LOOK_SECONDS if idle is None else min(LOOK_SECONDS, idle / 4)
        while self._taken:
            await asyncio.sleep(pause)
            now = time.monotonic()
            for live in (*self._opening, *self.live.values()):
                if live.busy_since is not None:
                    if now - live.busy_since > PATIENCE_SECONDS and live.watch is not None:
                        live.watch()
                elif live.draft and now - live.used > DRAFT_SECONDS:
                    self._retire(live, "its client did not come back")
                elif idle is not None and now - live.used > idle:
                    self._retire(live, f"the session was idle for {idle:g} s")
            self._make_room()

    def _retire(self, live: Live, why: str) -> None:
        if live not in self._leaving:
            self.lent.pop(live.id, None)
            self._leaving[live] = asyncio.create_task(self._evict(live, why))

    async def _evict(self, live: Live, why: str) -> None:
        try:
            with boundary(TurnwiseError, f"session {live.id}"):
                await live.evict(why)
        except TurnwiseError as error:
            log.warning("%s", error)

    async def _made(self) -> ServedSession:
        with boundary(EnvError, f"environment {self.served.name}"):
            return await self.served.open()


def _arrived(future: asyncio.Future[Any]) -> bool:
    """Whether a result is there, which whoever waited for it, and was cancelled, never got."""
    return future.done() and not future.cancelled() and future.exception() is None
