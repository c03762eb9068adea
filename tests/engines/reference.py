"""What the engine must agree with: `generate` for greedy tokens, one full forward for log-probabilities."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from turnwise.engines.transformers import TransformersEngine
from turnwise.types import Completion, Finish, Sampling

torch.set_num_threads(1)  # the machine is shared, and the models are tiny

CLOSE = 1e-4
"""Log-probabilities of a full forward and of the engine may differ by this much."""


def prompt(length: int, seed: int, vocab: int = 512) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def greedy(tokens: int, *, stop: tuple[int, ...] = ()) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0, stop_ids=stop)


def generated(model: Any, prompt_ids: Sequence[int], tokens: int) -> list[int]:
    """What ``model.generate`` makes of one prompt alone, greedily."""
    out = model.generate(torch.tensor([list(prompt_ids)]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt_ids) :].tolist()


def logprobs_of(
    model: Any, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probabilities of ``ids`` after ``prompt_ids``: one full forward, float64 after the logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].double() / temperature
    rows = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return rows[torch.arange(len(ids)), torch.tensor(list(ids))].tolist()


def assert_reply(
    model: Any,
    prompt_ids: Sequence[int],
    completion: Completion,
    *,
    tokens: int,
    finish: Finish = Finish.LENGTH,
) -> None:
    """A greedy reply of ``tokens`` is `generate`'s, with a full forward's log-probabilities."""
    assert completion.ids == generated(model, prompt_ids, tokens)
    assert completion.finish is finish
    expected = logprobs_of(model, prompt_ids, completion.ids)
    np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def assert_greedy(model: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> None:
    """Each token is the likeliest after those before it, or as likely.

    For contexts that are others each time: of so many, one has a tie at last.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    found = logits[torch.arange(len(ids)), torch.tensor(list(ids))]
    np.testing.assert_allclose(found, logits.amax(-1), atol=CLOSE, rtol=0)


def run_with(model: Any, scenario: Callable[[TransformersEngine], Awaitable[None]], **options: Any) -> None:
    """Run ``scenario`` on an engine, and close it whatever happens."""

    async def main() -> None:
        async with TransformersEngine(model, **{"max_context": 256, "max_sequences": 8, **options}) as engine:
            await asyncio.wait_for(scenario(engine), 60)

    asyncio.run(main())


async def together(engine: TransformersEngine, *calls: Coroutine[Any, Any, Completion]) -> list[Completion]:
    """Requests that arrive at once: on a busy machine the engine would be steps ahead with the first."""
    await engine.pause()
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    await engine.resume()
    return await asyncio.gather(*tasks)


@dataclass
class Weights:
    """A weight source over any model's state dict."""

    model: torch.nn.Module
    names: Sequence[str] | None = None

    def tensors(self) -> Iterator[tuple[str, Any]]:
        for name, tensor in self.model.state_dict().items():
            if self.names is None or name in self.names:
                yield name, tensor


class Hold:
    """An engine's thread, kept waiting: entered once it is there; what is asked for within comes next."""

    def __init__(self) -> None:
        self._there, self._go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._there.set()
        assert self._go.wait(30), "nobody let the engine go on"

    async def __aenter__(self) -> None:
        while not self._there.is_set():
            await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)  # Tasks that were made or cancelled tell the engine.
        self._go.set()


class Gate:
    """Wraps an engine's forward: counts steps, can hold them, or make one fail."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._inner = engine._core._forward
        self.steps = 0
        self.fail: Exception | None = None
        self.rows: list[int] = []
        self._on_step: dict[int, Callable[[], None]] = {}
        engine._core._forward = self

    def at(self, step: int, action: Callable[[], None]) -> None:
        """Run ``action`` on the engine's thread, just before the model's call number ``step``."""
        self._on_step[step] = action

    def hold(self, step: int) -> Hold:
        """Keep the engine's thread waiting before the model's call number ``step``: it is ahead by as much as
        the machine lets it be.
        """
        held = Hold()
        self.at(step, held)
        return held

    def between(self, step: int, action: Callable[[], None]) -> None:
        """Have the engine's thread run ``action`` between the model's calls ``step`` and ``step + 1``."""
        self.at(step, lambda: self._engine._tell(action))

    def __call__(self, step: Any, cache: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps in self._on_step:
            self._on_step.pop(self.steps)()
        if self.fail is not None:
            raise self.fail
        self.rows.append(len(step.token_ids))
        return self._inner(step, cache)

    def refresh(self) -> None:
        self._inner.refresh()
