"""Continuous batching, one step at a time. Synchronous, and confined to one thread.

    submit ──> queue ──> slot ──> prefill, in chunks ──> decode, a token a step ──> completion
                          ^  └─ wait for a sibling, copy its KV ─┘
                          └─ idle between turns, for the session

A request is never waited for: it joins the running batch at any step and leaves it at any other. A context of
n known tokens whose first c are computed has n - c to go; one that has a single token to go decodes, a longer
one is prefilled. Prompts, bridges, the last token of the turn before and contexts whose KV new weights made
void are all the same case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from turnwise.engines.forward import Forward
from turnwise.engines.kv import SlotCache, Step
from turnwise.engines.refresh import refresh
from turnwise.engines.request import Request
from turnwise.engines.sampling import Draws, draw
from turnwise.engines.slots import Int64Array, SlotTable
from turnwise.engines.vision import Sight
from turnwise.errors import EngineError
from turnwise.types import Completion, WeightSource

MIN_SHARED = 8
"""Waiting a step for fewer tokens of a sibling costs more than computing them."""
MIN_COMPACTED = 4
"""With fewer sequences than this, holes between their slots cost nothing worth a move."""

Outcome = tuple[Request, Completion | EngineError]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine has done so far, and what it is doing."""

    steps: int
    """Calls of the model."""
    generated: int
    """Tokens sampled."""
    prefilled: int
    """Tokens computed that were not sampled in the same request: prompts, bridges, and what new weights made
    void."""
    cached: int
    """Prompt tokens of finished requests that a session or a sibling had computed."""
    finished: int
    """Requests completed."""
    evictions: int
    """Idle sessions that lost their slot to a request that needed one."""
    queued: int
    """Requests waiting for a slot."""
    running: int
    """Requests in slots."""
    occupied_slots: int
    """Slots that run a request or are kept for a session."""
    slots: int
    version: int
    """Of the weights."""


class Core:
    """The engine's state and its step."""

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Forward,
        cache: SlotCache,
        *,
        max_sequences: int,
        max_context: int,
        prefill_tokens: int,
        sight: Sight | None = None,
        muted: int | None = None,
    ) -> None:
        self._sight = sight
        self._muted = muted
        """Never sampled: an image's placeholder, which would stand for no image."""
        self._model = model
        self._forward = forward
        self._cache = cache
        self._table = SlotTable(cache.slots, max_context)
        self._max_sequences = max_sequences
        self._prefill_tokens = prefill_tokens
        self._queue: deque[Request] = deque()
        self._followers: list[Request] = []
        self._orders = 0
        # How the present batch is drawn, kept while it stays together.
        self._draws: Draws | None = None
        self._drawing: Int64Array = np.empty(0, dtype=np.int64)
        self._drawn_at = -1
        self.version = 0
        self._steps = self._generated = self._prefilled = self._cached = self._finished = self._evictions = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue) or len(self._table.busy) > 0

    def stats(self) -> EngineStats:
        """A snapshot; taken from another thread, its numbers may be a step apart."""
        return EngineStats(
            steps=self._steps,
            generated=self._generated,
            prefilled=self._prefilled,
            cached=self._cached,
            finished=self._finished,
            evictions=self._evictions,
            queued=len(self._queue),
            running=len(self._table.busy),
            occupied_slots=self._table.occupied,
            slots=self._table.slots,
            version=self.version,
        )

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineError: The session has another request under way.
        """
        if request.session is not None:
            slot = self._table.slot_of(request.session)
            if (slot is not None and self._table.requests[slot] is not None) or any(
                other.session == request.session for other in self._queue
            ):
                raise EngineError(
                    f"session '{request.session}' has a request under way; a session's calls must not overlap"
                )
        request.order = self._orders
        self._orders += 1
        self._queue.append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request and free its slot; nothing happens to one that has ended."""
        if request.slot >= 0:
            self._table.leave(request, keep=False)
            self._followers = [other for other in self._followers if other is not request]
        elif request in self._queue:
            self._queue.remove(request)

    def release(self, session: str) -> None:
        """Forget a session; an unknown one is no error."""
        self._table.release(session)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Take new weights: all KV is void, and running requests are prefilled again.

        Raises:
            EngineError: The source does not fit the model; nothing has changed then.
        """
        refresh(self._model, source)
        self._forward.refresh()
        self.version = version
        self._table.forget()
        if self._sight is not None:
            self._sight.forget()
        # Whoever waited for a prefix finds out anew whom to wait for.
        for request in self._followers:
            request.leader = None
        self._followers.clear()
        for request in sorted(self._running(), key=lambda request: request.order):
            self._share(request)

    def step(self) -> list[Outcome]:
        """Admit what fits, run the model once, draw. Returns the requests that ended."""
        self._admit()
        for request in list(self._followers):
            leader = request.leader
            assert leader is not None
            if leader.slot < 0 or self._table.computed[leader.slot] >= request.shared:
                self._share(request)
        self._compact()
        slots, step = self._plan()
        logits = self._forward(step, self._cache)
        if self._muted is not None:
            logits[:, self._muted] = float("-inf")
        self._steps += 1
        return self._draw(slots, logits) if len(slots) else []

    # -----------------------------------------------------------------------------------------------

    def _running(self) -> list[Request]:
        return [request for request in self._table.requests if request is not None]

    def _admit(self) -> None:
        """First come, first served: the head of the queue takes a slot, or everyone behind it waits too."""
        while self._queue and len(self._table.busy) < self._max_sequences:
            request = self._queue[0]
            queued = frozenset(other.session for other in self._queue if other.session is not None)
            claim = self._table.claim(request, queued)
            if claim is None:
                return
            slot, evicted = claim
            self._evictions += evicted
            self._queue.popleft()
            self._table.enter(slot, request)
            self._share(request)

    def _share(self, request: Request) -> None:
        """Copy the longest prefix that any slot has computed, and wait for one that is being computed.

        Only requests that came before are waited for, so that waiting never goes in circles.
        """
        table, slot = self._table, request.slot
        have, most = int(table.computed[slot]), int(table.known[slot]) - 1
        prefixes = np.minimum(table.prefixes(table.tokens[slot, : most + 1]), most)
        prefixes[slot] = 0
        ready = np.minimum(prefixes, table.computed)
        source = int(ready.argmax())
        if ready[source] > have:
            self._cache.copy(source, slot, have, int(ready[source]))
            have = table.computed[slot] = int(ready[source])
        leaders = [other for other in self._running() if other.order < request.order]
        leader = max(leaders, key=lambda other: (int(prefixes[other.slot]), -other.order), default=None)
        waiting = request.leader is not None
        if leader is not None and prefixes[leader.slot] - have >= MIN_SHARED:
            request.leader, request.shared = leader, int(prefixes[leader.slot])
            if not waiting:
                self._followers.append(request)
            return
        request.leader = None
        request.cached_tokens = min(have, len(request.prompt))
        if waiting:
            self._followers.remove(request)

    def _compact(self) -> None:
        """Move the highest running sequence down into a hole, one a step at most.

        A hole in a window costs its attention at every step, a move a few of those once.
        """
        busy = self._table.busy
        count = len(busy)
        if count < MIN_COMPACTED or busy[-1] < count + count // 8:
            return
        hole = int((busy != np.arange(count)).argmax())
        last = int(busy[-1])
        self._cache.swap(last, hole, int(max(self._table.computed[last], self._table.computed[hole])))
        self._table.swap(last, hole)

    def _plan(self) -> tuple[Int64Array, Step]:
        """This step's tokens; and the slots that draw from its logits, in the order of their rows."""
        table = self._table
        busy = table.busy
        to_go = table.known[busy] - table.computed[busy]
        decoding = busy[to_go == 1]
        positions = table.computed[decoding]
        token_ids = table.tokens[decoding, positions]
        outputs = np.arange(len(decoding))
        drawing = decoding
        chunks: list[tuple[int, int, int]] = []
        if len(decoding) < len(busy):
            chunks = self._chunks(busy[to_go > 1])
            rows = len(decoding) + np.cumsum([count for _, _, count in chunks], dtype=np.int64) - 1
            ends = [start + count == table.known[slot] for slot, start, count in chunks]
            token_ids = np.concatenate(
                [token_ids, *(table.tokens[slot, start : start + count] for slot, start, count in chunks)]
            )
            outputs = np.concatenate([outputs, rows[ends]])
            drawing = np.concatenate(
                [
                    decoding,
                    np.array([slot for (slot, _, _), end in zip(chunks, ends, strict=True) if end], np.int64),
                ]
            )
            for slot, _, count in chunks:
                table.computed[slot] += count
        if self._sight is not None:
            token_ids = np.where(token_ids < 0, self._sight.vision.token_id, token_ids)
        step = self._cache.plan(
            decode_slots=decoding,
            decode_positions=positions,
            chunks=chunks,
            token_ids=token_ids,
            outputs=outputs,
        )
        if self._sight is not None:
            prefilled = [request for slot, _, _ in chunks if (request := table.requests[slot]) is not None]
            self._sight.look(step, positions, table.shift[decoding], chunks, prefilled)
        self._prefilled += len(token_ids) - int((table.drawn[decoding] > 0).sum())
        table.computed[decoding] += 1
        return drawing, step

    def _chunks(self, slots: Int64Array) -> list[tuple[int, int, int]]:
        """(slot, start, tokens) to prefill, oldest request first, up to the budget of a step."""
        table = self._table
        requests = [table.requests[slot] for slot in slots]
        ready = sorted(
            (request for request in requests if request is not None and request.leader is None),
            key=lambda request: request.order,
        )
        chunks = []
        budget = self._prefill_tokens
        for request in ready:
            start = int(table.computed[request.slot])
            count = min(budget, int(table.known[request.slot]) - start)
            chunks.append((request.slot, start, count))
            budget -= count
            if budget == 0:
                break
        return chunks

    def _draw(self, slots: Int64Array, logits: torch.Tensor) -> list[Outcome]:
        table = self._table
        if self._draws is None or self._drawn_at != table.changes or not np.array_equal(slots, self._drawing):
            self._drawing, self._drawn_at = slots, table.changes
            self._draws = Draws(
                temperature=table.temperature[slots],
                top_k=table.top_k[slots],
                top_p=table.top_p[slots],
                min_p=table.min_p[slots],
                key=table.key[slots],
            )
        drawn = draw(logits, self._draws, table.drawn[slots])
        table.tokens[slots, table.known[slots]] = drawn.ids
        table.known[slots] += 1
        table.drawn[slots] += 1
        self._generated += len(slots)
        ended: list[Outcome] = []
        kept_mass: Sequence[float | None] = drawn.kept_mass or [None] * len(slots)
        for slot, token, logprob, kept in zip(
            slots.tolist(), drawn.ids, drawn.logprobs, kept_mass, strict=True
        ):
            request = table.requests[slot]
            assert request is not None
            if logprob != logprob:
                table.leave(request, keep=False)
                table.known[slot] = table.computed[slot] = 0
                error = EngineError(
                    f"the model's logits are not finite (weights version {self.version}, "
                    f"{len(request.prompt) + len(request.ids)} tokens of context); have the weights diverged?"
                )
                ended.append((request, error))
                continue
            finish = request.add(token, logprob, kept, self.version)
            if finish is not None:
                table.leave(request, keep=True)
                self._finished += 1
                self._cached += request.cached_tokens
                ended.append((request, request.completion(finish)))
        ended.sort(key=lambda outcome: outcome[0].order)
        return ended
