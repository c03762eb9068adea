"""The engine as a service: budget and queue, faults and ends, and that nothing leaks."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from tests.engines.reference import Gate, assert_greedy, assert_reply, greedy, prompt, run_with
from tests.support.models import tiny_qwen3

from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import EngineError
from turnwise.types import Completion, Sampling

MODEL = tiny_qwen3()


def test_the_longest_idle_session_makes_room_and_prefills_again() -> None:
    prompts = {name: prompt(30, seed) for seed, name in enumerate("abc")}

    async def scenario(engine: TransformersEngine) -> None:
        for name in "ab":
            completion = await engine.generate(prompts[name], greedy(5), session=name)
            prompts[name] += [*completion.ids, 1, 2]
        # "a" is used again, so "b" is the one that was idle longest when "c" needs a slot.
        again = await engine.generate(prompts["a"], greedy(5), session="a")
        assert again.cached_tokens == 34
        assert engine.stats.evictions == 0
        assert_reply(
            MODEL, prompts["c"], await engine.generate(prompts["c"], greedy(5), session="c"), tokens=5
        )
        assert engine.stats.evictions == 1
        assert engine.stats.occupied_slots == engine.stats.slots == 2
        back = await engine.generate(prompts["b"], greedy(5), session="b")
        assert_reply(MODEL, prompts["b"], back, tokens=5)
        assert back.cached_tokens == 0

    run_with(MODEL, scenario, max_context=64, kv_tokens=128)


def test_an_idle_session_whose_turn_is_queued_is_evicted_last() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        first = prompt(20, 1)
        old = await engine.generate(first, greedy(3), session="old")
        await engine.generate(prompt(20, 2), greedy(3), session="young")
        await engine.pause()
        stranger = asyncio.create_task(engine.generate(prompt(20, 3), greedy(3), session="stranger"))
        await asyncio.sleep(0)
        turn = asyncio.create_task(engine.generate(first + old.ids + [4], greedy(3), session="old"))
        await asyncio.sleep(0.01)
        await engine.resume()
        await stranger
        assert (await turn).cached_tokens == 22, "'young' lost its slot, not 'old'"

    run_with(MODEL, scenario, max_context=64, kv_tokens=128)


def test_more_sessions_than_slots_all_finish_their_turns() -> None:
    """Twelve sessions of four turns over three slots: no deadlock, and every reply is right."""

    async def scenario(engine: TransformersEngine) -> None:
        async def episode(seed: int) -> None:
            context = prompt(10 + seed, seed)
            for turn in range(4):
                completion = await engine.generate(context, greedy(6), session=f"e{seed}")
                assert_reply(MODEL, context, completion, tokens=6)
                context += completion.ids + prompt(5, 100 * seed + turn)
                await asyncio.sleep(0.002 * (seed % 3))
            await engine.release(f"e{seed}")

        await asyncio.gather(*(episode(seed) for seed in range(12)))
        await engine.generate([1], greedy(1))
        assert engine.stats.evictions > 0
        assert (engine.stats.queued, engine.stats.running, engine.stats.occupied_slots) == (0, 0, 0)

    run_with(MODEL, scenario, max_context=128, kv_tokens=3 * 128)


def test_the_queue_is_first_come_first_served() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        order: list[int] = []

        async def one(n: int) -> None:
            await engine.generate(prompt(10, n), greedy(4), session=str(n))
            order.append(n)

        tasks = []
        for n in range(10):
            tasks.append(asyncio.create_task(one(n)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order == list(range(10))

    run_with(MODEL, scenario, max_sequences=2)


def test_overlapping_calls_of_a_session_are_refused() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        await engine.pause()
        first = asyncio.create_task(engine.generate(prompt(10, 1), greedy(30), session="s"))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="session 's' has a request under way"):
            await engine.generate(prompt(10, 2), greedy(3), session="s")
        await engine.resume()
        assert_reply(MODEL, prompt(10, 1), await first, tokens=30)

    run_with(MODEL, scenario)


def test_release_during_a_turn_frees_the_slot_when_it_ends() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(5)
        task = asyncio.create_task(engine.generate(prompt(10, 1), greedy(200), session="s"))
        async with hold:
            await engine.release("s")
            await engine.release("never seen")
        assert_reply(MODEL, prompt(10, 1), await task, tokens=200)
        assert engine.stats.occupied_slots == 0

    run_with(MODEL, scenario)


def test_closing_fails_what_is_in_flight_and_whoever_asks_later() -> None:
    async def main() -> None:
        engine = TransformersEngine(MODEL, max_context=256, max_sequences=2)
        hold = Gate(engine).hold(5)
        tasks = [asyncio.create_task(engine.generate(prompt(9, n), greedy(200))) for n in range(4)]
        async with hold:
            closing = asyncio.create_task(engine.aclose())
        await closing
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineError)
            assert str(outcome) == "the engine is closed"
        for call in (
            engine.generate([1], greedy(1)),
            engine.pause(),
            engine.resume(),
        ):
            with pytest.raises(EngineError, match="the engine is closed"):
                await call
        await engine.release("s")
        await engine.aclose()
        assert engine.stats.generated >= 4

    asyncio.run(main())


def test_a_fault_in_the_thread_reaches_every_caller() -> None:
    async def main() -> None:
        engine = TransformersEngine(MODEL, max_context=256, max_sequences=2)
        gate = Gate(engine)
        gate.at(5, lambda: setattr(gate, "fail", RuntimeError("device lost")))
        tasks = [asyncio.create_task(engine.generate(prompt(9, n), greedy(200))) for n in range(4)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, EngineError)
            assert "the embedded engine's thread died: RuntimeError: device lost" in str(outcome)
            assert isinstance(outcome.__cause__, RuntimeError)
        assert len({id(outcome) for outcome in outcomes}) == 4
        with pytest.raises(EngineError, match="device lost"):
            await engine.generate([1], greedy(1))
        with pytest.raises(EngineError, match="device lost"):
            await engine.pause()
        await engine.aclose()

    asyncio.run(main())


def test_weights_that_are_not_finite_fail_the_request_not_the_engine() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        weight = engine._core._model.model.norm.weight
        healthy = weight.clone()
        weight.fill_(float("nan"))
        for sampling in (greedy(4), Sampling(max_tokens=4, seed=1), Sampling(max_tokens=4, top_p=0.9)):
            with pytest.raises(EngineError, match=r"logits are not finite \(weights version 0, 9 tokens"):
                await engine.generate(prompt(9, 1), sampling)
        weight.copy_(healthy)
        assert_reply(MODEL, prompt(9, 1), await engine.generate(prompt(9, 1), greedy(4)), tokens=4)
        assert engine.stats.occupied_slots == 0

    run_with(MODEL, scenario)


def test_the_event_loop_stays_free() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        holds = [gate.hold(step) for step in range(1, 51)]
        task = asyncio.create_task(engine.generate(prompt(200, 1), greedy(50)))
        for hold in holds:
            async with hold:  # It has its turn before each of the engine's steps.
                assert not task.done()
        assert len((await task).ids) == gate.steps == 50

    run_with(MODEL, scenario)


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_random_operations_leak_nothing_and_answer_right(seed: int) -> None:
    """Turns, fresh prompts, siblings, cancellations, releases and pauses over few slots."""
    rng = random.Random(seed)
    stems = [prompt(rng.randint(5, 40), 1000 + n) for n in range(3)]

    async def scenario(engine: TransformersEngine) -> None:
        contexts: dict[str, list[int]] = {}
        running: dict[asyncio.Task[Completion], tuple[str | None, list[int], int]] = {}

        async def settle(task: asyncio.Task[Completion]) -> None:
            session, context, tokens = running.pop(task)
            try:
                completion = await task
            except asyncio.CancelledError:
                return
            assert len(completion.ids) == tokens
            assert_greedy(MODEL, context, completion.ids)
            if session is not None:
                contexts[session] = context + completion.ids

        for n in range(200):
            busy = {session for session, _, _ in running.values()}
            match rng.random():
                case x if x < 0.55:
                    session = rng.choice([None, *(f"s{k}" for k in range(8))])
                    if session in busy and session is not None:
                        continue
                    held = contexts.get(session or "", [])
                    if held and len(held) < 80 and rng.random() < 0.8:
                        context = held + prompt(rng.randint(1, 9), n)
                    else:
                        context = rng.choice(stems) + prompt(rng.randint(0, 12), n % 7)
                    tokens = rng.randint(1, 12)
                    task = asyncio.create_task(engine.generate(context, greedy(tokens), session=session))
                    running[task] = (session, context, tokens)
                    await asyncio.sleep(0)
                case x if x < 0.65 and running:
                    rng.choice(list(running)).cancel()
                case x if x < 0.75:
                    await engine.release(f"s{rng.randrange(8)}")
                case x if x < 0.8:
                    await engine.pause()
                    await engine.resume()
                case _ if running:
                    await settle(rng.choice(list(running)))
        for task in list(running):
            await settle(task)
        for k in range(8):
            await engine.release(f"s{k}")
        await engine.generate([1], greedy(1))
        stats = engine.stats
        assert (stats.queued, stats.running, stats.occupied_slots) == (0, 0, 0)
        assert stats.evictions > 0
        assert stats.cached > 0
        assert not engine._waiting

    with torch.inference_mode():
        run_with(MODEL, scenario, max_context=128, max_sequences=4, kv_tokens=5 * 128, prefill_tokens=24)
