"""How a run's weights live on vLLM servers: the whole model, held by a lease; or adapters beside others'."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from turnwise.engines.vllm_server import NothingSampledError, ServerLostError, StrangerError, VllmServer
from turnwise.engines.vllm_weights import STARTED_WITH, Label, Parcel, Route, Start
from turnwise.errors import EngineError, boundary
from turnwise.types import AdapterSource, WeightSource

log = logging.getLogger(__name__)

FREE = "free"
"""Holds weights that are nobody's any more."""
BROKEN = "broken"
"""Holds weights of which some were replaced and some not."""
_BASE = "base-"
"""Begins the holder of weights that the adapters of several runs are on."""

Failures = dict[VllmServer, EngineError]
"""Servers that did not take new weights, and why."""


class Tenancy:
    """One run's weights on all of its servers: what both ways have in common.

    Args:
        holder: The run's name on servers; the same when it is resumed.
        start: What version 0 is.
        route: How whole weights get there.
    """

    restarts: ClassVar[bool]
    """New weights are for new requests: those in flight are ended, and go on as new ones."""

    def __init__(self, holder: str, start: Start, route: Route) -> None:
        self.holder, self.start, self.route = holder, start, route
        self.version = 0
        """Of the weights that the next request draws from."""
        self.held = False
        """Whether servers stay paused after new weights."""

    async def claim(self, servers: Sequence[VllmServer]) -> None:
        """Put version 0 there, unless it is there already.

        Raises:
            EngineError: A server is another run's, or cannot take these weights.
        """
        needy = []
        for server in servers:
            if await server.idle_reason() == "asleep":
                raise EngineError(
                    f"{server} is asleep, and would answer nothing; POST {server}/wake_up first"
                )
            if not await self.settle(server):
                needy.append(server)
        if needy:
            label = self.start_label
            source = await asyncio.to_thread(self.start.source)
            failures = await self.put(needy, source, label)
            if failures:
                raise next(iter(failures.values()))
        for server in servers:
            if await server.idle_reason() == "paused":  # By a run that was killed: the lease is ours now.
                await server.resume()

    @property
    def start_label(self) -> Label:
        """Of version 0, where it had to be put there."""
        raise NotImplementedError

    async def settle(self, server: VllmServer) -> bool:
        """Move in; whether the server has version 0 already.

        Raises:
            EngineError: It is another run's.
        """
        raise NotImplementedError

    async def refuse_taken(self, server: VllmServer, found: str) -> None:
        """Leave a server alone whose weights another run holds, or has adapters on."""
        label = Label.parse(found)
        if found != STARTED_WITH and label is None:
            raise EngineError(f"the weights of {server} are another program's: it labels them {found!r}")
        if label is not None and not self._may_replace(label):
            raise EngineError(
                f"{server} is held by the run '{label.holder}' (version {label.version}): start another "
                f"server with `turnwise vllm up --port …`. If that run is dead: turnwise vllm free {server}"
            )
        adapters = [Label.parse(name) for name in await server.adapters()]
        others = sorted({one.holder for one in adapters if one is not None and one.holder != self.holder})
        if others:
            raise EngineError(
                f"{server} holds adapters of {', '.join(others)}, whose model may not be replaced: start "
                "another server with `turnwise vllm up --port …`. If nobody uses them any more: "
                f"turnwise vllm free {server}"
            )

    def _may_replace(self, label: Label) -> bool:
        return label.holder in (self.holder, FREE, BROKEN) or label.holder.startswith(_BASE)

    async def put(self, servers: Sequence[VllmServer], source: WeightSource, label: Label) -> Failures:
        """Replace all weights of servers that are ours to change."""
        parcel = await asyncio.to_thread(self.route.pack, source, label)
        try:
            return await each(servers, lambda server: self._put(server, parcel, label))
        finally:
            if parcel.ours and parcel.directory is not None:
                await asyncio.to_thread(shutil.rmtree, parcel.directory, ignore_errors=True)

    async def _put(self, server: VllmServer, parcel: Parcel, label: Label) -> None:
        await server.pause(clear=True)
        try:
            await self.route.send(server, parcel, label)
            # Held requests too: what they have of KV was computed under the weights before.
            await server.forget_kv()
        except (EngineError, asyncio.CancelledError):
            # Held requests have to end, and none of their tokens may count.
            await asyncio.shield(self._give_up(server, label))
            raise
        if not self.held:
            await server.resume()

    async def _give_up(self, server: VllmServer, label: Label) -> None:
        """Leave a server going whose weights are of two kinds."""
        with suppress(EngineError):
            await server.set_label(str(Label(BROKEN, label.version)))
            await server.resume()


class WholeModel(Tenancy):
    """All weights of a server are this run's, and its label is the lease."""

    restarts: ClassVar[bool] = False

    @property
    def start_label(self) -> Label:
        """Version 0 of this run's."""
        return Label(self.holder, 0)

    async def settle(self, server: VllmServer) -> bool:
        """Take the lease; a server that was started with the run's model has its weights."""
        found = await server.label()
        await self.refuse_taken(server, found)
        await self.route.open(server, self.start.facts)
        if found != STARTED_WITH or not self.start.is_native(server):
            return False
        await server.set_label(str(self.start_label))
        return True

    async def load(self, servers: Sequence[VllmServer], source: WeightSource, version: int) -> Failures:
        """Put new weights on every server that is still ours, and on those that were started anew."""
        failures = await each(servers, self._still_ours)
        ready = [server for server in servers if server not in failures]
        failures |= await self.put(ready, source, Label(self.holder, version)) if ready else {}
        self.version = version
        return failures

    async def _still_ours(self, server: VllmServer) -> None:
        found = await server.label()
        label = Label.parse(found)
        if found == STARTED_WITH or (label is not None and label.holder == BROKEN):
            await self.route.open(server, self.start.facts)
        elif label is None or label.holder != self.holder:
            raise EngineError(
                f"{server} was taken by another trainer: its weights are labelled {found!r} now"
            )

    def model(self) -> str | None:
        """The server's own."""
        return None

    def salt(self) -> str:
        """Of this version's KV."""
        return str(Label(self.holder, self.version))

    def version_of(self, server: VllmServer, label: str, requested: int) -> int:
        """What the label says."""
        found = Label.parse(label)
        if found is None or found.holder != self.holder:
            raise StrangerError(
                f"{server} drew from weights labelled {label!r}, which are not those of this run "
                f"('{self.holder}'): it was started anew, taken by another run, or failed to take new weights"
            )
        return found.version

    async def retire(self, servers: Sequence[VllmServer], used: Set[int]) -> None:
        """Nothing: new weights took the place of the old."""

    async def release(self, server: VllmServer) -> None:
        """Give the lease back, if it is still ours."""
        label = Label.parse(await server.label())
        if label is not None and label.holder == self.holder:
            await server.set_label(str(Label(FREE, label.version)))
            if self.held:
                await server.resume()


class Adapters(Tenancy):
    """The run's LoRA adapters, on a model that other runs may have adapters on too.

    Each version is an adapter of its own, named by its `Label`. (Swapped in place, under requests that run,
    an adapter would go on from KV of the one before; and a server's one label cannot tell whose changed.)

    Args:
        holder: As of `Tenancy`, as are ``start`` and ``route``.
        start: The base model.
        route: For a server that was started with another model of the same shape.
        directory: Where adapters are written; servers see it under the same name.
    """

    restarts: ClassVar[bool] = True

    def __init__(self, holder: str, start: Start, route: Route, *, directory: Path) -> None:
        super().__init__(holder, start, route)
        self._directory = directory
        self._loaded: set[int] = set()
        self._bases: dict[VllmServer, str] = {}
        """The label that a server's base weights have to keep."""

    @property
    def start_label(self) -> Label:
        """The same for every run with this base model."""
        facts = f"{self.start.name} {sorted(self.start.facts.items())}"
        return Label(_BASE + hashlib.blake2b(facts.encode(), digest_size=8).hexdigest(), 0)

    async def settle(self, server: VllmServer) -> bool:
        """Share the base where it is the same; adapters that this run left behind earlier are forgotten."""
        await server.takes_adapters()
        for name in await server.adapters():
            label = Label.parse(name)
            if label is not None and label.holder == self.holder:
                await server.unload_adapter(name)
        found = await server.label()
        if self.start.native and found == str(self.start_label):
            self._bases[server] = found
            return True
        if found == STARTED_WITH and self.start.is_native(server):
            self._bases[server] = STARTED_WITH
            return True
        await self.refuse_taken(server, found)
        await self.route.open(server, self.start.facts)
        self._bases[server] = str(self.start_label)
        return False

    async def load(self, servers: Sequence[VllmServer], source: WeightSource, version: int) -> Failures:
        """Put a new adapter beside the present one."""
        if not isinstance(source, AdapterSource):
            raise EngineError(
                f"engine.weights=adapter needs the adapters apart, and {type(source).__name__} has only "
                "whole weights; use engine.weights=file"
            )
        directory = self._directory / f"adapter-{version}"
        with boundary(EngineError, f"writing the adapter to {directory}"):
            shutil.rmtree(directory, ignore_errors=True)
            await asyncio.to_thread(source.save_adapter, directory)
        name = str(Label(self.holder, version))
        failures = await each(servers, lambda server: server.load_adapter(name, str(directory)))
        self._loaded.add(version)
        self.version = version
        return failures

    def model(self) -> str | None:
        """The adapter; the base itself as version 0."""
        return str(Label(self.holder, self.version)) if self.version in self._loaded else None

    def salt(self) -> str:
        """Of the adapter's KV; that of the base is common to all."""
        return self.model() or str(self.start_label)

    def version_of(self, server: VllmServer, label: str, requested: int) -> int:
        """What was asked for: an adapter does not change under its name. Nor may the base below it."""
        if label != self._bases[server]:
            raise StrangerError(
                f"{server} drew from a base labelled {label!r}, and the adapters of this run are on "
                f"{self._bases[server]!r}: it was taken by another trainer, or started anew"
            )
        return requested

    async def retire(self, servers: Sequence[VllmServer], used: Set[int]) -> None:
        """Unload adapters that no request draws from."""
        for version in self._loaded - used - {self.version}:
            self._loaded.discard(version)
            name = str(Label(self.holder, version))
            for server in servers:
                try:
                    await server.unload_adapter(name)
                except EngineError as error:
                    log.warning("%s: the adapter of version %d was not unloaded: %s", server, version, error)
            await asyncio.to_thread(shutil.rmtree, self._directory / f"adapter-{version}", ignore_errors=True)

    async def release(self, server: VllmServer) -> None:
        """Unload what is left of ours."""
        for name in await server.adapters():
            label = Label.parse(name)
            if label is not None and label.holder == self.holder:
                await server.unload_adapter(name)


async def each(servers: Sequence[VllmServer], action: Callable[[VllmServer], Any]) -> Failures:
    """Do something on all servers at once.

    Raises:
        EngineError: Every one of them refused.
    """
    results = await asyncio.gather(*(action(server) for server in servers), return_exceptions=True)
    failures: Failures = {}
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, EngineError):
            failures[server] = result
        elif isinstance(result, BaseException):
            raise result
    # One that refuses would go on with older weights: only a server that is gone may be left behind.
    gone = (NothingSampledError, ServerLostError)
    refused = [error for error in failures.values() if not isinstance(error, gone)]
    if refused or (failures and len(failures) == len(servers)):
        raise next(iter(refused or failures.values()))
    return failures


async def evict(url: str) -> list[str]:
    """End every lease on a server and unload every run's adapters; says what there was.

    Raises:
        EngineError: There is no such server.
    """
    server = VllmServer(url, key=os.environ.get("VLLM_API_KEY"))
    try:
        await server.wait(0.0)
        done = []
        for name in await server.adapters():
            if Label.parse(name) is not None:
                await server.unload_adapter(name)
                done.append(f"unloaded {name}")
        found = await server.label()
        label = Label.parse(found)
        if label is not None and label.holder != FREE:
            await server.set_label(str(Label(FREE, label.version)))
            done.append(f"the lease of {label.holder} has ended")
        if await server.idle_reason() == "paused":
            await server.resume()
            done.append("its requests go on")
        return done or [f"{server} is held by nobody (its weights are labelled {found!r})"]
    finally:
        await server.aclose()
