"""The vllm engine: servers in their own processes and environments, reached over HTTP.

    engine = await VllmEngine.connect(["http://127.0.0.1:8000"], model="Qwen/Qwen3-0.6B")
    completion = await engine.generate(prompt_ids, Sampling(max_tokens=64), session="episode-7")
    await engine.load_weights(learner.publish(), learner.version)

Token ids in, token ids out. A session stays with one server, whose prefix cache holds its context; a new one
goes to the server with the fewest. Full weights belong to one run a server, by a lease; runs that train
adapters share servers (`turnwise.engines.vllm_tenancy`).

New full weights: every server holds its requests, takes the weights, forgets all KV and goes on; a request in
flight has its context computed again and says which version drew each token. A new adapter has a name of its
own for each version: the run's own requests are ended where they are and go on under the new name with what
they have sampled. Nobody else's are touched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from turnwise.engines.request import make_request
from turnwise.engines.vllm_answer import Drawn, finish_of, seed_of
from turnwise.engines.vllm_flights import Flight, watch, why_silent
from turnwise.engines.vllm_placement import Placement
from turnwise.engines.vllm_server import NothingSampledError, StrangerError, VllmServer
from turnwise.engines.vllm_tenancy import Adapters, WholeModel
from turnwise.engines.vllm_weights import Start, holder_name, route_of
from turnwise.errors import EngineError
from turnwise.types import Completion, Finish, Sampling, WeightSource

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""How long a request that no server takes is offered again."""
CLOSE_SECONDS = 30.0
"""How long the end of an engine waits for servers to be left in order."""


class VllmEngine:
    """Samples from vLLM servers; see `turnwise.engines.base.Engine`. Made by `connect`.

    Args:
        servers: Described and claimed.
        tenancy: How the run's weights live there.
        max_context: Tokens of prompt and reply together.
        vocabulary: Ids below this exist.
        request_seconds: The longest that one reply may take.
        scratch: A directory to delete in the end.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        tenancy: WholeModel | Adapters,
        *,
        max_context: int,
        vocabulary: int,
        request_seconds: float,
        scratch: Path | None = None,
    ) -> None:
        self.max_context = max_context
        self._servers, self._tenancy = list(servers), tenancy
        self._vocabulary, self._request_seconds, self._scratch = vocabulary, request_seconds, scratch
        self._placement = Placement(servers)
        self._flights: set[Flight] = set()
        self._tasks: set[asyncio.Task[Completion]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._going = asyncio.Event()
        self._going.set()
        self._loading = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def connect(
        cls,
        urls: Sequence[str],
        *,
        model: str,
        revision: str | None = None,
        config: Any = None,
        initial: WeightSource | None = None,
        weights: str = "file",
        weights_dir: str | Path | None = None,
        nccl_port: int | None = None,
        dtype: str | None = None,
        holder: str | None = None,
        max_context: int | None = None,
        start_seconds: float = 240.0,
        request_seconds: float = 1800.0,
    ) -> Self:
        """Find the servers, take them, and put version 0 there where they have something else.

        Args:
            urls: One for each server; each holds the whole model.
            model: Hub name or directory of version 0.
            revision: Of a model of the Hub.
            config: The model's configuration, if it is not that of ``model``.
            initial: The weights of version 0, if they are not those of ``model``.
            weights: ``file``, ``reload``, ``nccl`` or ``adapter``; docs/scaling.md says which is for what.
            weights_dir: A directory that this process and the servers share.
            nccl_port: Where servers meet this process with ``nccl``; a free port if None.
            dtype: What weights are written in, such as ``bfloat16``; as they are if None.
            holder: The run's name on servers, the same when it is resumed; one of this process's if None.
            max_context: Less than the servers' own.
            start_seconds: How long to wait for a server that does not answer yet.
            request_seconds: The longest that one reply may take.

        Raises:
            EngineError: A server is not there, is another run's, serves something else, or lacks a flag; the
                message says which.
        """
        scratch = None if weights_dir is not None else Path(tempfile.mkdtemp(prefix="turnwise-vllm-"))
        directory = (scratch or Path(str(weights_dir)).expanduser()).resolve()
        start = await asyncio.to_thread(Start.of, model, revision, config, initial)
        name = holder_name(holder or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}")
        servers = [VllmServer(url, key=os.environ.get("VLLM_API_KEY")) for url in urls]
        route = route_of(weights, directory, shared=weights_dir is not None, dtype=dtype, port=nccl_port)
        tenancy: WholeModel | Adapters
        if weights == "adapter":
            tenancy = Adapters(name, start, route, directory=directory / name)
        else:
            tenancy = WholeModel(name, start, route)
        engine = cls(
            servers,
            tenancy,
            max_context=0,
            vocabulary=int(start.facts["vocab_size"]),
            request_seconds=request_seconds,
            scratch=scratch,
        )
        try:
            await engine._open(start_seconds, max_context)
        except BaseException:
            await engine.aclose()
            raise
        return engine

    async def _open(self, seconds: float, asked: int | None) -> None:
        await asyncio.gather(*(server.wait(seconds) for server in self._servers))
        await asyncio.gather(*(server.describe() for server in self._servers))
        for server in self._servers:
            if asked is not None and asked > server.max_context:
                raise EngineError(
                    f"engine.max_context is {asked}, and {server} takes {server.max_context} tokens: lower "
                    f"the one, or start the server with --max-model-len {asked}"
                )
        self.max_context = asked or min(server.max_context for server in self._servers)
        self._watch = asyncio.ensure_future(watch(self._flights, self._unheard))
        await self._tenancy.claim(self._servers)
        # Some prompt: one of nothing but padding would make all tokens equal.
        probe = [self._vocabulary * n // 17 for n in range(1, 17)][: self.max_context - 1]
        await asyncio.gather(*(server.check_logprobs(probe) for server in self._servers))

    # -- the protocol -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the weights that the next request draws from."""
        return self._tenancy.version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        session: str | None = None,
        images: Sequence[str] = (),
    ) -> Completion:
        """Sample a reply. ``kept_mass`` is never known; logprobs are those of the cut distribution.

        Cancelling ends the request on the server.
        """
        self._refuse_closed()
        if images:
            raise EngineError(
                f"the vllm engine sends token ids alone, and the prompt has {len(images)} images; use "
                "engine.kind=embedded"
            )
        # Checked here, for a server does not: an id beyond the vocabulary ends vLLM's whole process.
        request = make_request(
            prompt_ids, sampling, session=session, max_context=self.max_context, vocabulary=self._vocabulary
        )
        limited = replace(sampling, max_tokens=request.limit)
        task = asyncio.ensure_future(self._reply(list(prompt_ids), limited, session))
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            # Cancelled itself, or only what it waits for?
            if self._closed and not _this_task().cancelling():
                raise EngineError("the engine was closed while this request ran") from None
            raise
        finally:
            self._tasks.discard(task)

    async def release(self, session: str) -> None:
        """Let the session's server forget it as it likes: KV that nobody asks for is the first to go."""
        self._placement.release(session)

    async def pause(self) -> None:
        """Hold everything: full weights are held on the servers; of shared ones only our own requests."""
        self._refuse_closed()
        if self._tenancy.restarts:
            self._going.clear()
            await self._restart(lambda flight: True)
            return
        self._tenancy.held = True
        await asyncio.gather(*(server.pause(clear=False) for server in self._servers))

    async def resume(self) -> None:
        """Go on."""
        self._refuse_closed()
        self._going.set()
        if self._tenancy.held:
            self._tenancy.held = False
            await asyncio.gather(*(server.resume() for server in self._servers))

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Put new weights on all servers; one that cannot be reached gets no requests until the next ones.

        Raises:
            EngineError: A server refused them, was taken by another run, or none could be reached.
        """
        self._refuse_closed()
        async with self._loading:
            failures = await self._tenancy.load(self._servers, source, version)
            self._placement.behind.clear()
            for server, error in failures.items():
                self._leave_behind(server, error)
            if self._tenancy.restarts:
                await self._restart(lambda flight: flight.version != version)
                await self._retire()

    async def aclose(self) -> None:
        """Fail what is in flight with `EngineError` and leave the servers to others."""
        if self._closed:
            return
        self._closed = True
        for task in (*self._tasks, *([self._watch] if self._watch else ())):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*self._chores, *(self._leave(server) for server in self._servers))
        for server in self._servers:
            await server.aclose()
        if self._scratch is not None:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # -- one reply ----------------------------------------------------------------------------------

    async def _reply(self, prompt_ids: list[int], sampling: Sampling, session: str | None) -> Completion:
        """Draw until something ends the reply, in as many requests as it takes."""
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        cached: int | None = None
        finish: Finish | None = None
        try:
            async with asyncio.timeout(self._request_seconds):
                while finish is None:
                    await self._going.wait()
                    left, seed = sampling.max_tokens - len(ids), seed_of(sampling.seed, drawn=len(ids))
                    rest = replace(sampling, max_tokens=left, seed=seed)
                    drawn, found = await self._draw([*prompt_ids, *ids], rest, session)
                    ids, logprobs, versions = ids + drawn.ids, logprobs + drawn.logprobs, versions + found
                    cached = drawn.cached_tokens if cached is None else cached
                    finish = finish_of(drawn, rest)
        except TimeoutError as error:
            raise EngineError(await why_silent(self._servers, self._request_seconds)) from error
        return Completion(
            ids=ids, logprobs=logprobs, versions=versions, finish=finish, cached_tokens=cached or 0
        )

    async def _draw(
        self, context: Sequence[int], sampling: Sampling, session: str | None
    ) -> tuple[Drawn, list[int]]:
        """One request, offered until a server takes it; with the version of each of its tokens."""
        until, wait = time.monotonic() + PATIENCE_SECONDS, 0.1
        while True:
            server = self._placement.place(
                session, (one.server for one in self._flights if one.session is None)
            )
            flight = Flight(
                server=server, session=session, name=secrets.token_hex(16),
                version=self._tenancy.version, task=_this_task(),
            )  # fmt: skip
            self._flights.add(flight)
            try:
                drawn = await server.generate(
                    flight.name, context, sampling, salt=self._tenancy.salt(), model=self._tenancy.model()
                )
                versions = [self._tenancy.version_of(server, label, flight.version) for label in drawn.labels]
                break
            except StrangerError as error:
                # It gets nothing before it has the next weights; what it drew is nobody's.
                self._leave_behind(server, error)
                if not self._placement.current:
                    raise
                continue
            except NothingSampledError as error:
                if time.monotonic() >= until:
                    raise EngineError(
                        f"no server has taken the request for {PATIENCE_SECONDS:g} s: {error}"
                    ) from error
                self._placement.shun(server)
            except asyncio.CancelledError:
                self._chore(self._abort(server, [flight]))
                if not flight.given_up():
                    raise
                until = time.monotonic() + PATIENCE_SECONDS
            finally:
                self._flights.discard(flight)
                if self._tenancy.restarts and flight.version != self._tenancy.version:
                    self._chore(self._retire())
            await asyncio.sleep(wait)
            wait = min(2 * wait, 5.0)
        if drawn.finish == "abort" and not flight.moved and finish_of(drawn, sampling) is None:
            raise EngineError(
                f"{server} was told by somebody else to end the request after {len(drawn.ids)} tokens"
            )
        return drawn, versions

    # -- requests that are ended --------------------------------------------------------------------

    async def _restart(self, which: Callable[[Flight], bool]) -> None:
        """End our own requests where they are; their replies go on as new ones."""
        moving = [flight for flight in self._flights if which(flight)]
        for flight in moving:
            flight.moved = True
        for server in {flight.server for flight in moving}:
            await self._abort(server, [flight for flight in moving if flight.server is server])

    async def _abort(self, server: VllmServer, flights: Sequence[Flight]) -> None:
        try:
            await server.abort([flight.name for flight in flights])
        except EngineError as error:
            # They end by themselves, with what they were asked for.
            log.info("%d requests were not ended: %s", len(flights), error)

    def _leave_behind(self, server: VllmServer, error: EngineError) -> None:
        """A server has not got the present weights: requests that are still there are asked of others."""
        log.warning("%s gets no requests before it has the next weights: %s", server, error)
        self._placement.behind.add(server)
        self._lose(server)

    def _unheard(self, server: VllmServer, error: EngineError) -> None:
        log.warning("%s hangs, and its requests are asked of others: %s", server, error)
        self._placement.shun(server)
        self._lose(server)

    def _lose(self, server: VllmServer) -> None:
        for flight in self._flights:
            if flight.server is server and flight.task is not asyncio.current_task():
                flight.lose()

    async def _retire(self) -> None:
        """Forget versions that nothing draws from any more."""
        await self._tenancy.retire(self._servers, {flight.version for flight in self._flights})

    async def _leave(self, server: VllmServer) -> None:
        try:
            await self._tenancy.release(server)
        except EngineError as error:
            log.info("%s was left as it is: %s", server, error)

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for, before the engine ends."""
        task = asyncio.ensure_future(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
