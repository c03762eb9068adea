"""Who holds which slot, and which tokens' KV lies in it.

A slot is *busy* (a request runs in it), *idle* (kept for a session between turns) or *free*. Free slots still
hold the tokens of whoever was there: a prompt that begins with them takes them over, or copies them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turnwise.engines.request import Request
from turnwise.engines.sampling import key_of

Int64Array = npt.NDArray[np.int64]


class SlotTable:
    """Host-side bookkeeping, in arrays over slots so that a step costs a few numpy calls."""

    def __init__(self, slots: int, context: int) -> None:
        self.slots = slots
        self.tokens: Int64Array = np.zeros((slots, context), dtype=np.int64)
        """The context of each slot: prompt and sampled ids."""
        self.known: Int64Array = np.zeros(slots, dtype=np.int64)
        """How many of ``tokens`` are the context."""
        self.computed: Int64Array = np.zeros(slots, dtype=np.int64)
        """How many leading tokens have their KV in the cache."""
        self.shift: Int64Array = np.zeros(slots, dtype=np.int64)
        """Of what is sampled; see `Request.shift`."""
        self.temperature = np.zeros(slots, dtype=np.float32)
        self.top_k: Int64Array = np.zeros(slots, dtype=np.int64)
        self.top_p = np.ones(slots, dtype=np.float32)
        self.min_p = np.zeros(slots, dtype=np.float32)
        self.key = np.zeros(slots, dtype=np.uint64)
        self.drawn: Int64Array = np.zeros(slots, dtype=np.int64)
        """Tokens that the running request has sampled."""
        self._used: Int64Array = np.zeros(slots, dtype=np.int64)
        self._clock = 0
        self.requests: list[Request | None] = [None] * slots
        self.sessions: list[str | None] = [None] * slots
        self._by_session: dict[str, int] = {}
        self.busy: Int64Array = np.empty(0, dtype=np.int64)
        """The busy slots, ascending."""
        self.changes = 0
        """Counts every arrival, departure and move of a request."""

    def slot_of(self, session: str | None) -> int | None:
        """The slot kept for ``session``."""
        return None if session is None else self._by_session.get(session)

    @property
    def occupied(self) -> int:
        """Slots that are busy or kept for a session."""
        return sum(
            request is not None or session is not None
            for request, session in zip(self.requests, self.sessions, strict=True)
        )

    def prefix(self, prompt: Int64Array, slot: int, limit: int) -> int:
        """How many of the first ``limit`` tokens of ``slot`` the prompt begins with."""
        limit = min(limit, len(prompt))
        unequal = self.tokens[slot, :limit] != prompt[:limit]
        return int(unequal.argmax()) if unequal.any() else limit

    def prefixes(self, prompt: Int64Array) -> Int64Array:
        """For each slot, how many of its known tokens the prompt begins with."""
        longest = min(len(prompt), int(self.known.max()))
        if longest == 0:
            return np.zeros(self.slots, dtype=np.int64)
        equal = self.tokens[:, :longest] == prompt[:longest]
        first = np.where(equal.all(1), longest, equal.argmin(1))
        return np.minimum(first, self.known)

    def claim(self, request: Request, queued: frozenset[str]) -> tuple[int, bool] | None:
        """A slot for ``request``: its session's, a free one, or that of the session that was idle longest.

        Args:
            request: Who needs one.
            queued: Sessions whose next request waits already: evicted only if nothing else is idle.

        Returns:
            The slot and whether a session was evicted for it; None while every slot is busy.
        """
        kept = self.slot_of(request.session)
        if kept is not None:
            return kept, False
        free = [
            slot for slot in range(self.slots) if self.requests[slot] is None and self.sessions[slot] is None
        ]
        if free:
            # The one that holds most of the prompt; the lowest among equals keeps windows short.
            held = np.minimum(self.prefixes(request.prompt), self.computed)
            return max(free, key=lambda slot: (int(held[slot]), -slot)), False
        idle = [slot for slot in range(self.slots) if self.requests[slot] is None]
        if not idle:
            return None
        slot = min(idle, key=lambda slot: (self.sessions[slot] in queued, int(self._used[slot])))
        self._keep(slot, None)
        return slot, True

    def enter(self, slot: int, request: Request) -> None:
        """Start ``request`` in ``slot``, whose KV stays as far as the prompt begins with it."""
        prompt, sampling = request.prompt, request.sampling
        self._keep(slot, request.session)
        # The last token is always computed: its logits are what the first draw needs.
        held = self.prefix(prompt, slot, int(self.computed[slot]))
        self.computed[slot] = min(held, len(prompt) - 1)
        self.tokens[slot, : len(prompt)] = prompt
        self.known[slot] = len(prompt)
        self.shift[slot] = request.shift
        self.temperature[slot] = sampling.temperature
        self.top_k[slot], self.top_p[slot], self.min_p[slot] = sampling.top_k, sampling.top_p, sampling.min_p
        self.key[slot] = key_of(request.seed)
        self.drawn[slot] = 0
        request.slot = slot
        self.requests[slot] = request
        self._touch(slot)
        self._refresh()

    def leave(self, request: Request, *, keep: bool) -> None:
        """End ``request``; its slot is kept for its session, or free."""
        slot = request.slot
        self.requests[slot] = None
        request.slot = -1
        request.leader = None
        if not keep:
            self._keep(slot, None)
        self._touch(slot)
        self._refresh()

    def release(self, session: str) -> None:
        """Forget a session; the slot of a running request is freed when the request ends."""
        slot = self.slot_of(session)
        if slot is not None:
            self._keep(slot, None)

    def forget(self) -> None:
        """The weights have changed: no KV is valid any more. Idle sessions hold nothing else, and are
        dropped.
        """
        self.computed[:] = 0
        for slot in range(self.slots):
            if self.requests[slot] is None:
                self.known[slot] = 0
                self._keep(slot, None)

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots, whose KV the caller exchanges."""
        for column in (
            self.tokens, self.known, self.computed, self.shift, self.temperature, self.top_k, self.top_p,
            self.min_p, self.key, self.drawn, self._used,
        ):  # fmt: skip
            column[[a, b]] = column[[b, a]]
        self.requests[a], self.requests[b] = self.requests[b], self.requests[a]
        self.sessions[a], self.sessions[b] = self.sessions[b], self.sessions[a]
        for slot in (a, b):
            request, session = self.requests[slot], self.sessions[slot]
            if request is not None:
                request.slot = slot
            if session is not None:
                self._by_session[session] = slot
        self._refresh()

    # -----------------------------------------------------------------------------------------------

    def _keep(self, slot: int, session: str | None) -> None:
        before = self.sessions[slot]
        if before is not None:
            del self._by_session[before]
        self.sessions[slot] = session
        if session is not None:
            self._by_session[session] = slot

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    def _refresh(self) -> None:
        self.changes += 1
        self.busy = np.array(
            [slot for slot, request in enumerate(self.requests) if request is not None], dtype=np.int64
        )
