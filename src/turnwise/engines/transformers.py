"""The embedded engine: a transformers model in this process, sampled with continuous batching.

    engine = await TransformersEngine.load("Qwen/Qwen3-0.6B")
    completion = await engine.generate(prompt_ids, Sampling(max_tokens=64), session="episode-7")

A thread of its own does the model's work, so that the event loop is free for environments. Everything that
touches the model or its KV goes through that thread's queue; callers hold futures. Torch's thread count is
the process's: on a machine whose cores are shared, one thread (``torch.set_num_threads(1)``) is faster than
several.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy as copying
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from turnwise.chat.processing import sees
from turnwise.chat.vision import Placed, Vision
from turnwise.engines.core import Core, EngineStats, Outcome
from turnwise.engines.forward import build_forward
from turnwise.engines.kv import SlotCache
from turnwise.engines.request import Request, make_request
from turnwise.engines.vision import Sight, VisionForward, coded
from turnwise.errors import EngineError, ImageError, StoreError, TurnwiseError, boundary
from turnwise.types import Completion, Sampling, WeightSource

DEFAULT_MAX_CONTEXT = 4096
"""Unless the model's own context is shorter, or the caller says otherwise."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    """Something for the thread to do, and who waits for it."""

    action: Callable[[], None]
    loop: asyncio.AbstractEventLoop | None = None
    future: asyncio.Future[Any] | None = None
    request: Request | None = None
    """Set for `generate`: the future is settled by the request's end, not by the action's."""


class TransformersEngine:
    """Samples from a causal language model of transformers, on CPU or one GPU.

    Args:
        model: A ``PreTrainedModel`` whose attention goes through transformers' attention interface.
        max_sequences: Requests that run at once.
        max_context: Most tokens of prompt and reply together; the model's own limit or 4,096, the
            smaller, if None.
        kv_tokens: KV budget over all sessions, in tokens; it is cut into slots of ``max_context``. None:
            one slot for each of ``max_sequences``. On CPU, memory is taken as slots fill.
        prefill_tokens: Prompt tokens in one step, so that a long prompt does not hold up everyone's next
            token.
        device: Where to run; the model's own if None.
        dtype: To compute in; the model's own if None.
        vision: The image side of the model's processor; None reads text alone.
        copy: Take a copy of the model. False hands it over: it must not be used elsewhere afterwards.

    Raises:
        EngineError: The model cannot run over KV slots (the message says why), or a limit makes no sense.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_sequences: int = 64,
        max_context: int | None = None,
        kv_tokens: int | None = None,
        prefill_tokens: int = 2048,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vision: Vision | None = None,
        copy: bool = True,
    ) -> None:
        config = model.config.get_text_config()
        own_context = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_CONTEXT
        self.max_context: int = max_context or min(own_context, DEFAULT_MAX_CONTEXT)
        slots = _slots(kv_tokens, max_sequences, self.max_context, own_context, prefill_tokens)
        if copy:
            model = copying.deepcopy(model)
        model = model.to(device=device, dtype=_dtype(dtype)).eval().requires_grad_(False)
        parameter = next(model.parameters())
        forward, geometry = build_forward(model, self.max_context)
        cache = SlotCache(
            geometry,
            slots=slots,
            context=self.max_context,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self._vocabulary = int(config.vocab_size)
        if vision is not None and not isinstance(forward, VisionForward):
            raise EngineError(
                f"{type(model).__name__} reads images in a way that the embedded engine does not know, "
                "and no other engine here takes images; use Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
            )
        self._sight = None if vision is None else Sight(model, vision)
        self._core = Core(
            model,
            forward,
            cache,
            max_sequences=max_sequences,
            max_context=self.max_context,
            prefill_tokens=prefill_tokens,
            sight=self._sight,
            muted=forward.image_token if isinstance(forward, VisionForward) else None,
        )
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._waiting: dict[Request, _Call] = {}
        self._current: _Call | None = None
        self._paused = self._closing = False
        self._dead: EngineError | None = None
        self._last_stats: EngineStats | None = None
        # Held to post a call and to die, so that no call is posted to a thread that will not read it.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="turnwise-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def load(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> TransformersEngine:
        """An engine for a model from the Hub or a directory; ``options`` are those of the class.

        Raises:
            EngineError: The model could not be loaded, or cannot run over KV slots.
        """

        def build() -> TransformersEngine:
            with boundary(EngineError, f"loading the model '{name_or_path}'"):
                auto = AutoModelForImageTextToText if sees(name_or_path, revision) else AutoModelForCausalLM
                model = auto.from_pretrained(name_or_path, revision=revision, dtype=_dtype(dtype) or "auto")
                if getattr(model, "hf_quantizer", None) is not None:  # Engines play whole matrices.
                    model = model.dequantize(dtype=_dtype(dtype) or model.dtype)
            return cls(model, dtype=dtype, copy=False, **options)

        return await asyncio.to_thread(build)

    @property
    def version(self) -> int:
        """Of the weights that draw the next token."""
        return self.stats.version

    @property
    def stats(self) -> EngineStats:
        """Counters, frozen at this moment."""
        return self._last_stats or self._core.stats()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        session: str | None = None,
        images: Sequence[str] = (),
    ) -> Completion:
        """Sample a reply; see `turnwise.engines.base.Engine`."""
        request = make_request(
            prompt_ids,
            sampling,
            session=session,
            max_context=self.max_context,
            vocabulary=self._vocabulary,
        )
        if images or self._sight is not None:
            await self._show(request, images)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        self._post(
            _Call(action=lambda: self._core.submit(request), loop=loop, future=future, request=request)
        )
        try:
            return await future
        except asyncio.CancelledError:
            self._tell(partial(self._cancel, request))
            raise

    async def _show(self, request: Request, images: Sequence[str]) -> None:
        """Put images into a request; their pixels are made here, so that no other's next token waits."""
        sight = self._sight
        if sight is None:
            raise EngineError(
                f"this engine has no image processor, and the prompt has {len(images)} images: load it with "
                "vision=, that of the model's processor"
            )

        def place() -> list[Placed]:
            for sha256 in images:
                if not sight.knows(sha256):
                    sight.vision.pixels(sha256)
            return sight.vision.place(request.prompt, images)

        try:
            placed = await asyncio.to_thread(place) if images else place()
        except (ImageError, StoreError) as error:
            raise EngineError(f"the prompt's images cannot be read: {error}") from error
        if placed and placed[-1].start + placed[-1].tokens == len(request.prompt):
            raise EngineError("the prompt ends with an image; a reply follows text")
        request.prompt, request.images = coded(request.prompt, placed), tuple(placed)
        request.merge = sight.vision.merge

    async def release(self, session: str) -> None:
        """Forget a session's KV at the next step."""
        self._tell(lambda: self._core.release(session))

    async def pause(self) -> None:
        """Finish the running step and hold everything where it is."""
        await self._ask(partial(self._hold, True))

    async def resume(self) -> None:
        """Go on."""
        await self._ask(partial(self._hold, False))

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Copy new weights in, between two steps; running requests are prefilled again.

        Raises:
            EngineError: Names or shapes do not fit the model, whose weights stay as they were.
        """
        await self._ask(lambda: self._core.load_weights(source, version))

    async def aclose(self) -> None:
        """Fail what is in flight and free everything; may be called twice."""
        self._tell(self._close)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------------------------- callers' side

    def _post(self, call: _Call) -> None:
        with self._lock:
            if self._dead is not None:
                raise EngineError(str(self._dead)) from self._dead.__cause__
            self._calls.put(call)

    def _tell(self, action: Callable[[], None]) -> None:
        """Have the thread do something that nobody waits for, if it still lives."""
        with self._lock:
            if self._dead is None:
                self._calls.put(_Call(action=action))

    async def _ask(self, action: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._post(_Call(action=action, loop=loop, future=future))
        await future

    # ----------------------------------------------------------------------------- the thread's side

    def _serve(self) -> None:
        try:
            with boundary(EngineError, "the embedded engine's thread died"), torch.inference_mode():
                while not self._closing:
                    self._turn()
        except EngineError as error:
            self._die(error)
        else:
            self._die(EngineError("the engine is closed"))

    def _turn(self) -> None:
        """Take the calls that came in, waiting for one where there is nothing else to do; then one step."""
        if self._paused or not self._core.has_work:
            self._run(self._calls.get())
        while not self._calls.empty():
            self._run(self._calls.get())
        if self._core.has_work and not self._paused and not self._closing:
            self._deliver(self._core.step())

    def _run(self, call: _Call) -> None:
        self._current = call  # for `_die`: what its action may yet raise would leave its caller waiting
        try:
            call.action()
        except TurnwiseError as error:
            _settle([(call, error)])
        else:
            if call.request is not None:
                self._waiting[call.request] = call
            else:
                _settle([(call, None)])
        self._current = None

    def _deliver(self, ended: Iterable[Outcome]) -> None:
        _settle([(self._waiting.pop(request), outcome) for request, outcome in ended])

    def _cancel(self, request: Request) -> None:
        self._waiting.pop(request, None)
        self._core.cancel(request)

    def _hold(self, paused: bool) -> None:
        self._paused = paused

    def _close(self) -> None:
        self._closing = True

    def _die(self, error: EngineError) -> None:
        """Tell everyone who waits, and whoever asks later."""
        with self._lock:
            self._dead = error
        left = list(self._waiting.values())
        if self._current is not None:
            left.append(self._current)
        while not self._calls.empty():
            left.append(self._calls.get())
        self._waiting.clear()
        self._last_stats = self._core.stats()
        del self._core
        closing = self._closing
        _settle([(call, None if closing and call.request is None else error) for call in left])


def _settle(results: Sequence[tuple[_Call, object]]) -> None:
    """Set futures on the loops that wait for them: one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], object]]] = {}
    for call, result in results:
        if call.loop is not None and call.future is not None:
            by_loop.setdefault(call.loop, []).append((call.future, result))
    for loop, pairs in by_loop.items():
        # It raises where the loop was closed; then nobody is left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_set, pairs)


def _set(pairs: Sequence[tuple[asyncio.Future[Any], object]]) -> None:
    for future, result in pairs:
        if future.done():
            continue  # its task was cancelled
        if isinstance(result, EngineError):
            # One error may end many requests; each caller raises its own.
            error = EngineError(str(result))
            error.__cause__ = result.__cause__
            future.set_exception(error)
        elif isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise EngineError(f"dtype is '{dtype}'; allowed are float32, bfloat16 and float16")
    return found


def _slots(
    kv_tokens: int | None, max_sequences: int, max_context: int, own_context: int, prefill_tokens: int
) -> int:
    """How many slots the budget makes."""
    if max_sequences < 1 or prefill_tokens < 1:
        raise EngineError(
            f"max_sequences is {max_sequences} and prefill_tokens {prefill_tokens}; both must be at least 1"
        )
    if not 2 <= max_context <= own_context:
        raise EngineError(
            f"max_context is {max_context}; it must be between 2 and the model's own {own_context}"
        )
    if kv_tokens is None:
        return max_sequences
    if kv_tokens < max_context:
        raise EngineError(
            f"kv_tokens is {kv_tokens}, less than one context of {max_context}: raise it or lower max_context"
        )
    return kv_tokens // max_context
