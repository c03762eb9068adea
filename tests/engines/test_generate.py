"""The embedded engine's replies are the plain model's, however requests come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tests.engines.reference import (
    Gate,
    assert_reply,
    generated,
    greedy,
    prompt,
    run_with,
    together,
)
from tests.support.models import tiny_qwen3
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3ForCausalLM

from turnwise.engines.forward import HfForward
from turnwise.engines.lean import LeanForward
from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Finish, Sampling

MODEL = tiny_qwen3()


def test_mixed_lengths_at_once_equal_generate() -> None:
    prompts = [prompt(n, seed=n) for n in (1, 2, 3, 17, 40, 64, 65, 100)]
    lengths = [30, 1, 12, 25, 7, 33, 20, 40]

    async def scenario(engine: TransformersEngine) -> None:
        completions = await asyncio.gather(
            *(engine.generate(p, greedy(n)) for p, n in zip(prompts, lengths, strict=True))
        )
        for p, n, completion in zip(prompts, lengths, completions, strict=True):
            assert_reply(MODEL, p, completion, tokens=n)
        assert engine.stats.generated == sum(lengths)
        assert engine.stats.prefilled == sum(map(len, prompts))
        assert engine.stats.occupied_slots == 0

    run_with(MODEL, scenario)


def test_requests_join_a_running_batch_and_leave_it_without_a_barrier() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        *holds, last = (gate.hold(10 * n) for n in range(1, 7))
        long = asyncio.create_task(engine.generate(prompt(20, 1), greedy(220)))
        prompts = [prompt(10 + seed, seed) for seed in range(2, 7)]
        replies = []
        for hold, p in zip(holds, prompts, strict=True):
            async with hold:
                short = asyncio.create_task(engine.generate(p, greedy(6)))
            replies.append(await short)
        async with last:
            assert not long.done(), "short requests were answered while the long one ran"
        for p, reply in zip(prompts, replies, strict=True):
            assert_reply(MODEL, p, reply, tokens=6)
        assert_reply(MODEL, prompt(20, 1), await long, tokens=220)
        assert gate.steps < 220 + 5 * 6, "they shared steps with it"

    run_with(MODEL, scenario)


def test_prefill_in_chunks_holds_nobody_up() -> None:
    """A prompt of 100 tokens at 16 a step takes 7 steps; the running request gets a token in each."""

    async def scenario(engine: TransformersEngine) -> None:
        gate = Gate(engine)
        hold = gate.hold(4)
        first = asyncio.create_task(engine.generate(prompt(10, 1), greedy(60)))
        async with hold:
            second = asyncio.create_task(engine.generate(prompt(100, 2), greedy(5)))
        assert_reply(MODEL, prompt(100, 2), await second, tokens=5)
        assert_reply(MODEL, prompt(10, 1), await first, tokens=60)
        assert max(gate.rows) == 17
        assert gate.rows.count(17) == 6

    run_with(MODEL, scenario, prefill_tokens=16)


def test_turns_of_a_session_prefill_only_what_is_new() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        context = prompt(30, 1)
        for turn in range(4):
            before = engine.stats.prefilled
            completion = await engine.generate(context, greedy(9), session="episode")
            assert_reply(MODEL, context, completion, tokens=9)
            held = 0 if turn == 0 else len(context) - 12 - 1
            # The last sampled token was never fed to the model: it is prefilled along with the bridge.
            assert completion.cached_tokens == held
            assert engine.stats.prefilled - before == len(context) - held
            context = context + completion.ids + prompt(12, 100 + turn)
        assert engine.stats.occupied_slots == 1
        await engine.release("episode")
        await engine.generate([1], greedy(1))
        assert engine.stats.occupied_slots == 0

    run_with(MODEL, scenario)


def test_a_session_whose_context_was_rewritten_keeps_the_common_beginning() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        start = prompt(40, 1)
        await engine.generate(start, greedy(9), session="s")
        rewritten = start[:25] + prompt(20, 2)
        completion = await engine.generate(rewritten, greedy(9), session="s")
        assert_reply(MODEL, rewritten, completion, tokens=9)
        assert completion.cached_tokens == 25
        shorter = start[:10]
        completion = await engine.generate(shorter, greedy(9), session="s")
        assert_reply(MODEL, shorter, completion, tokens=9)
        assert completion.cached_tokens == 9

    run_with(MODEL, scenario)


def test_siblings_that_arrive_together_prefill_their_prompt_once() -> None:
    shared = prompt(60, 1)

    async def scenario(engine: TransformersEngine) -> None:
        sampling = [Sampling(max_tokens=12, seed=seed) for seed in range(7)]
        siblings = await together(
            engine,
            engine.generate(shared, greedy(12), session="g0"),
            *(engine.generate(shared, s, session=f"s{s.seed}") for s in sampling),
        )
        assert_reply(MODEL, shared, siblings[0], tokens=12)
        assert [c.cached_tokens for c in siblings] == [0] + [59] * 7
        assert engine.stats.prefilled == 60 + 7
        assert len({tuple(c.ids) for c in siblings}) == 8, "they share a prompt, not a reply"
        # The second turn: all of them go on from what they hold.
        contexts = [shared + c.ids + [5, 6, 7] for c in siblings]
        turns = await asyncio.gather(
            *(
                engine.generate(c, greedy(8), session=name)
                for c, name in zip(contexts, ["g0", *(f"s{n}" for n in range(7))], strict=True)
            )
        )
        for context, completion in zip(contexts, turns, strict=True):
            assert_reply(MODEL, context, completion, tokens=8)
            assert completion.cached_tokens == 60 + 12 - 1

    run_with(MODEL, scenario)


def test_siblings_share_while_their_leader_is_still_prefilling_in_chunks() -> None:
    shared = prompt(100, 1)
    prompts = [shared[:50] + prompt(30, seed) for seed in range(2, 6)]

    async def scenario(engine: TransformersEngine) -> None:
        completions = await together(
            engine, engine.generate(shared, greedy(5)), *(engine.generate(p, greedy(5)) for p in prompts)
        )
        for p, completion in zip([shared, *prompts], completions, strict=True):
            assert_reply(MODEL, p, completion, tokens=5)
        assert [c.cached_tokens for c in completions] == [0] + [50] * 4
        assert engine.stats.prefilled == 100 + 4 * 30

    run_with(MODEL, scenario, prefill_tokens=16)


def test_siblings_outlive_a_leader_that_is_cancelled() -> None:
    shared = prompt(100, 1)

    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(3)
        tasks = [asyncio.create_task(engine.generate(shared, greedy(5))) for _ in range(4)]
        async with hold:
            tasks[0].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        for completion in done[1:]:
            assert not isinstance(completion, BaseException)
            assert_reply(MODEL, shared, completion, tokens=5)
            # What the leader had computed was not lost.
            assert completion.cached_tokens >= 32
        assert engine.stats.occupied_slots == 0

    run_with(MODEL, scenario, prefill_tokens=16)


def test_a_free_slot_still_serves_its_prefix() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        first = await engine.generate(prompt(50, 1), greedy(3))
        again = await engine.generate(prompt(50, 1), greedy(3))
        assert (first.cached_tokens, again.cached_tokens) == (0, 49)
        assert again.ids == first.ids

    run_with(MODEL, scenario)


def test_cancelling_frees_the_slot_and_leaves_siblings_alone() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(10)
        prompts = [prompt(20 + n, n) for n in range(6)]
        tasks = [
            asyncio.create_task(engine.generate(p, greedy(60), session=str(n))) for n, p in enumerate(prompts)
        ]
        async with hold:
            for n in (1, 4):
                tasks[n].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for n, (p, completion) in enumerate(zip(prompts, done, strict=True)):
            if n in (1, 4):
                assert isinstance(completion, asyncio.CancelledError)
            else:
                assert not isinstance(completion, BaseException)
                assert_reply(MODEL, p, completion, tokens=60)
        assert engine.stats.finished == 4
        assert engine.stats.occupied_slots == 4, "the cancelled sessions' slots are free"
        # A cancelled turn can be asked for again.
        assert_reply(MODEL, prompts[1], await engine.generate(prompts[1], greedy(9), session="1"), tokens=9)

    run_with(MODEL, scenario)


def test_a_queued_request_can_be_cancelled() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        hold = Gate(engine).hold(10)
        await engine.pause()
        first = asyncio.create_task(engine.generate(prompt(20, 1), greedy(60)))
        second = asyncio.create_task(engine.generate(prompt(20, 2), greedy(60)))
        await asyncio.sleep(0)
        await engine.resume()
        async with hold:
            assert engine.stats.queued == 1
            second.cancel()
        assert_reply(MODEL, prompt(20, 1), await first, tokens=60)
        assert (engine.stats.queued, engine.stats.generated) == (0, 60)

    run_with(MODEL, scenario, max_sequences=1)


def test_stop_ids_end_a_reply_and_are_part_of_it() -> None:
    p = prompt(20, 3)
    whole = generated(MODEL, p, 30)
    stop = whole[11]
    end = whole.index(stop) + 1

    async def scenario(engine: TransformersEngine) -> None:
        completion = await engine.generate(p, greedy(30, stop=(stop,)))
        assert completion.ids == whole[:end]
        assert completion.finish is Finish.STOP
        assert len(completion.logprobs) == len(completion.versions) == end
        assert completion.kept_mass is None

    run_with(MODEL, scenario)


def test_a_reply_ends_where_the_context_does() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        p = prompt(59, 1)
        completion = await engine.generate(p, greedy(50))
        assert_reply(MODEL, p, completion, tokens=5)
        assert (await engine.generate(prompt(63, 1), greedy(50))).finish is Finish.LENGTH
        with pytest.raises(ContextOverflowError, match="the prompt has 64 tokens; 63 fit") as caught:
            await engine.generate(prompt(64, 1), greedy(1))
        assert (caught.value.found, caught.value.allowed) == (64, 63)

    run_with(MODEL, scenario, max_context=64)


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "message"),
    [
        ([], Sampling(), "non-empty"),
        ([1, 512], Sampling(), "the id 512; the model's vocabulary is 0 to 511"),
        ([1, -1], Sampling(), "the id -1"),
        ([1], Sampling(max_tokens=0), "sampling.max_tokens is 0"),
        ([1], Sampling(temperature=-1.0), "sampling.temperature is -1.0"),
        ([1], Sampling(temperature=float("nan")), "sampling.temperature is nan"),
        ([1], Sampling(top_p=0.0), "sampling.top_p is 0.0"),
        ([1], Sampling(min_p=1.5), "sampling.min_p is 1.5"),
    ],
)
def test_a_request_that_means_nothing_is_refused(
    prompt_ids: list[int], sampling: Sampling, message: str
) -> None:
    async def scenario(engine: TransformersEngine) -> None:
        with pytest.raises(EngineError, match=message):
            await engine.generate(prompt_ids, sampling)
        assert (await engine.generate([1], greedy(2))).ids == generated(MODEL, [1], 2)

    run_with(MODEL, scenario)


def test_images_are_refused() -> None:
    async def scenario(engine: TransformersEngine) -> None:
        with pytest.raises(EngineError, match="has no image processor, and the prompt has 1"):
            await engine.generate([1], Sampling(), images=["ab"])

    run_with(MODEL, scenario)


class Unknown(Qwen3ForCausalLM):
    """Not one of the classes that the lean forward computes: the module itself is called."""


def _family(name: str) -> torch.nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        case "unknown":
            return Unknown(MODEL.config).eval()
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
        case _:
            config = Qwen2Config(
                **shape,
                use_sliding_window=True,
                sliding_window=12,
                max_window_layers=1,
            )
            assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
            return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "sliding", "unknown"])
def test_other_families(name: str) -> None:
    model = _family(name)

    async def scenario(engine: TransformersEngine) -> None:
        assert type(engine._core._forward) is (HfForward if name == "unknown" else LeanForward)
        prompts = [prompt(n, n) for n in (4, 30, 31)]
        for p, completion in zip(
            prompts, await asyncio.gather(*(engine.generate(p, greedy(25)) for p in prompts)), strict=True
        ):
            assert_reply(model, p, completion, tokens=25)
        context = prompts[1] + prompt(20, 50)
        assert_reply(model, context, await engine.generate(context, greedy(10)), tokens=10)

    run_with(model, scenario, prefill_tokens=16)


def test_a_model_outside_the_attention_interface_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(
        EngineError, match="MambaForCausalLM does not go through transformers' attention interface"
    ):
        TransformersEngine(model, max_context=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 5000}, "between 2 and the model's own 4096"),
        ({"max_context": 64, "kv_tokens": 63}, "kv_tokens is 63, less than one context of 64"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        TransformersEngine(MODEL, **options)


def test_bfloat16_answers_like_the_bfloat16_model() -> None:
    model = tiny_qwen3().to(torch.bfloat16)

    async def scenario(engine: TransformersEngine) -> None:
        p = prompt(30, 1)
        completion = await engine.generate(p, greedy(1))
        assert completion.ids == generated(model, p, 1)

    run_with(model, scenario)
