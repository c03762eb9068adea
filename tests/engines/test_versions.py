"""Weights change while requests run: no KV and no token of an older version passes as one of a newer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines.reference import (
    CLOSE,
    Gate,
    Weights,
    assert_reply,
    generated,
    greedy,
    logprobs_of,
    prompt,
    run_with,
    together,
)
from tests.support.models import tiny_qwen3

from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import EngineError
from turnwise.types import Sampling


def trained(seed: int) -> Any:
    """Another model of the same shape. Fresh ones' norms are 1 in all of them."""
    model = tiny_qwen3(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


OLD, NEW = tiny_qwen3(seed=0), trained(seed=1)


def test_new_weights_answer_and_the_given_model_is_untouched() -> None:
    p = prompt(20, 1)

    async def scenario(engine: TransformersEngine) -> None:
        before = await engine.generate(p, greedy(8))
        assert_reply(OLD, p, before, tokens=8)
        await engine.load_weights(Weights(NEW), 7)
        after = await engine.generate(p, greedy(8))
        assert_reply(NEW, p, after, tokens=8)
        assert before.versions == [0] * 8
        assert after.versions == [7] * 8
        assert engine.version == 7
        assert before.ids != after.ids

    run_with(OLD, scenario)
    assert torch.equal(OLD.model.embed_tokens.weight, tiny_qwen3(seed=0).model.embed_tokens.weight)


def test_requests_in_flight_go_on_under_the_new_weights() -> None:
    prompts = [prompt(20 + n, n) for n in range(5)]

    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        gate.between(15, lambda: engine._core.load_weights(Weights(NEW), 1))
        completions = await together(engine, *(engine.generate(p, greedy(40)) for p in prompts))
        for p, completion in zip(prompts, completions, strict=True):
            old = completion.versions.count(0)
            assert completion.versions == [0] * old + [1] * (40 - old)
            assert 5 < old < 20
            assert completion.ids[:old] == generated(OLD, p, old)
            context = p + completion.ids[:old]
            assert completion.ids[old:] == generated(NEW, context, 40 - old)
            expected = logprobs_of(OLD, p, completion.ids[:old])
            expected += logprobs_of(NEW, context, completion.ids[old:])
            np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)

    run_with(OLD, scenario)


def test_in_flight_between_steps_through_the_public_call() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(21)
        task = asyncio.create_task(engine.generate(prompt(30, 1), greedy(150)))
        async with hold:
            loading = asyncio.create_task(engine.load_weights(Weights(NEW), 1))
        await loading
        completion = await task
        old = completion.versions.count(0)
        assert old == 21
        assert completion.ids[old:] == generated(NEW, prompt(30, 1) + completion.ids[:old], 150 - old)

    run_with(OLD, scenario)


def test_idle_sessions_and_shared_prefixes_are_void_after_an_update() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        p = prompt(40, 1)
        first = await engine.generate(p, greedy(5), session="s")
        await engine.load_weights(Weights(NEW), 1)
        assert engine.stats.occupied_slots == 0
        context = p + first.ids + [3, 4]
        second = await engine.generate(context, greedy(5), session="s")
        assert_reply(NEW, context, second, tokens=5)
        assert second.cached_tokens == 0
        sibling = await engine.generate(p, greedy(5))
        assert_reply(NEW, p, sibling, tokens=5)
        assert sibling.cached_tokens == 39, "computed under the new weights, by the session's turn"

    run_with(OLD, scenario)


def test_siblings_in_flight_prefill_their_common_context_once_more() -> None:
    shared = prompt(60, 1)

    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        gate.between(10, lambda: engine._core.load_weights(Weights(NEW), 1))
        calls = [engine.generate(shared, Sampling(max_tokens=30, seed=n)) for n in range(6)]
        for completion in await together(engine, *calls):
            old = completion.versions.count(0)
            assert 0 < old < 30
            expected = logprobs_of(OLD, shared, completion.ids[:old])
            expected += logprobs_of(NEW, shared + completion.ids[:old], completion.ids[old:])
            np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)
        # 60 and 5 × 1 at first; then 60 and what each had sampled, whose first token is nobody else's.
        assert engine.stats.prefilled < 2 * (60 + 5) + 6 * 12

    run_with(OLD, scenario)


def test_an_update_finds_siblings_waiting_for_their_leader() -> None:
    """Two steps into a prefill of seven, three siblings wait: all starts again under the new weights."""
    shared = prompt(100, 1)

    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        gate.between(2, lambda: engine._core.load_weights(Weights(NEW), 1))
        completions = await together(engine, *(engine.generate(shared, greedy(5)) for _ in range(4)))
        for completion in completions:
            assert_reply(NEW, shared, completion, tokens=5)
            assert completion.versions == [1] * 5
        assert [completion.cached_tokens for completion in completions] == [0, 99, 99, 99]
        assert engine.stats.prefilled == 32 + 100 + 3

    run_with(OLD, scenario, prefill_tokens=16)


def test_pause_holds_and_resume_goes_on() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(6)
        task = asyncio.create_task(engine.generate(prompt(20, 1), greedy(100)))
        async with hold:
            pausing = asyncio.create_task(engine.pause())
        await pausing
        held = engine.stats.steps
        queued = asyncio.create_task(engine.generate(prompt(20, 2), greedy(10)))
        await asyncio.sleep(0.05)
        assert engine.stats.steps == held
        assert not task.done() and not queued.done()
        await engine.load_weights(Weights(OLD), 1)
        assert engine.stats.steps == held
        await engine.resume()
        first, second = await asyncio.gather(task, queued)
        assert_reply(OLD, prompt(20, 1), first, tokens=100)
        assert_reply(OLD, prompt(20, 2), second, tokens=10)
        assert 0 < first.versions.count(0) < 100
        assert second.versions == [1] * 10

    run_with(OLD, scenario)


def test_cancelling_works_while_paused() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        await engine.pause()
        task = asyncio.create_task(engine.generate(prompt(20, 1), greedy(5)))
        while engine.stats.queued == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.resume()
        assert_reply(OLD, prompt(20, 2), await engine.generate(prompt(20, 2), greedy(5)), tokens=5)
        assert engine.stats.generated == 5

    run_with(OLD, scenario)


class Tensors:
    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def tensors(self) -> Iterator[tuple[str, Any]]:
        yield from self._tensors.items()


def _state(model: torch.nn.Module, **changes: Any) -> Tensors:
    return Tensors({**model.state_dict(), **changes})


def test_tied_weights_under_one_name_or_both() -> None:
    p = prompt(20, 1)
    without_head = {k: v for k, v in NEW.state_dict().items() if k != "lm_head.weight"}
    without_embedding = {k: v for k, v in NEW.state_dict().items() if k != "model.embed_tokens.weight"}

    async def scenario(engine: TransformersEngine) -> None:
        for version, source in enumerate((without_head, without_embedding, NEW.state_dict()), start=1):
            await engine.load_weights(Weights(OLD), 0)
            await engine.load_weights(Tensors(source), version)
            assert_reply(NEW, p, await engine.generate(p, greedy(5)), tokens=5)

    run_with(OLD, scenario)


def test_untied_weights_need_both_names() -> None:
    old, new = tiny_qwen3(seed=0, tie=False), tiny_qwen3(seed=1, tie=False)
    p = prompt(20, 1)

    async def scenario(engine: TransformersEngine) -> None:
        names = [name for name in new.state_dict() if name != "lm_head.weight"]
        with pytest.raises(EngineError, match=r"lacks 'lm_head.weight'"):
            await engine.load_weights(Weights(new, names), 1)
        assert_reply(old, p, await engine.generate(p, greedy(5)), tokens=5)
        await engine.load_weights(Weights(new), 1)
        assert_reply(new, p, await engine.generate(p, greedy(5)), tokens=5)

    run_with(old, scenario)


def _broken() -> Iterator[tuple[str, Any]]:
    yield "model.norm.weight", torch.ones(64)
    raise RuntimeError("the learner is gone")


class Broken:
    def tensors(self) -> Iterator[tuple[str, Any]]:
        return _broken()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            _state(NEW, **{"model.norm.weight": torch.ones(63)}),
            r"shape \(63,\) in the weight source and \(64,\)",
        ),
        (
            _state(NEW, **{"model.layers.0.mlp.up.weight": torch.ones(1)}),
            r"'model.layers.0.mlp.up.weight', which the model has not; did you mean 'model.layers.0.mlp",
        ),
        (Weights(NEW, ["model.norm.weight"]), r"lacks 'model.embed_tokens.weight', .* and \d+ more"),
        (_state(NEW, **{"lm_head.weight": torch.zeros(512, 64)}), "are tied in the model, but differ"),
        (_state(NEW, **{"model.norm.weight": [1.0]}), "is a list in the weight source, not a tensor"),
        (Broken(), "reading the weight source: RuntimeError: the learner is gone"),
    ],
)
def test_weights_that_do_not_fit_leave_the_old_ones(source: Any, message: str) -> None:
    p = prompt(20, 1)

    async def scenario(engine: TransformersEngine) -> None:
        with pytest.raises(EngineError, match=message):
            await engine.load_weights(source, 1)
        completion = await engine.generate(p, greedy(5))
        assert_reply(OLD, p, completion, tokens=5)
        assert completion.versions == [0] * 5

    run_with(OLD, scenario)


def test_a_fault_while_copying_ends_the_engine_rather_than_mixing_versions() -> None:
    async def main() -> None:
        engine = TransformersEngine(OLD, max_context=64, max_sequences=2)
        broken = _state(NEW, **{"model.norm.weight": torch.ones(64, device="meta")})
        with pytest.raises(EngineError, match="the embedded engine's thread died"):
            await engine.load_weights(broken, 1)
        with pytest.raises(EngineError, match="the embedded engine's thread died"):
            await engine.generate([1], greedy(1))
        await engine.aclose()

    asyncio.run(main())
