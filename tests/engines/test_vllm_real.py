"""The vllm engine against vLLM itself, on CPU: TURNWISE_VLLM=1 pytest tests/engines/test_vllm_real.py

It installs vLLM where `turnwise vllm up` does, once (minutes, 3 GB), and starts a server for each model (one
or two minutes each). What is checked is what only the real one can show: that ids and logprobs are those of
the model, before, during and after new weights, to 1e-4.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tests.support.models import tiny_qwen3

from turnwise.cli.vllm_install import install
from turnwise.cli.vllm_process import Plan, ServerProcess, start
from turnwise.config import LoraConfig, ModelConfig
from turnwise.engines.vllm import VllmEngine
from turnwise.engines.vllm_weights import SavedWeights
from turnwise.errors import EngineError
from turnwise.learn.model import PolicyModel, load_model
from turnwise.learn.weights import LiveWeights
from turnwise.openenv.run.ready import free_port
from turnwise.types import Completion, Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        os.environ.get("TURNWISE_VLLM") != "1", reason="set TURNWISE_VLLM=1: it takes minutes"
    ),
    pytest.mark.timeout(1800),
]
PROMPT = [5 + 7 * n % 500 for n in range(300)]
"""Longer than a block of vLLM's prefix cache, which is 128 tokens on CPU."""
LONG = 1700
"""Tokens of a reply that still runs when new weights have arrived: seconds."""
FLAGS = [
    "--max-model-len",
    "2048",
    "--skip-tokenizer-init",
    "--enforce-eager",
    "--dtype",
    "float32",
    "--max-num-seqs",
    "16",
]


class Served:
    """A server, and two models of the same shape that it may have the weights of."""

    def __init__(self, process: ServerProcess, models: list[Any], paths: list[Path]) -> None:
        self.process, self.models, self.paths = process, models, paths

    @property
    def url(self) -> str:
        return self.process.url

    async def connect(self, **settings: Any) -> VllmEngine:
        return await VllmEngine.connect([self.url], model=str(self.paths[0]), **settings)

    async def runs(self, requests: int, seconds: float = 30) -> None:
        """Wait until the server has so many requests in hand."""
        async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=30) as client:
            while True:
                lines = (await client.get(f"{self.url}/metrics")).text.splitlines()
                running = (one for one in lines if one.startswith("vllm:num_requests_running"))
                if sum(float(one.rsplit(" ", 1)[1]) for one in running) == requests:
                    return
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module", params=["untied", "tied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp(request.param)
    shape = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "tie": request.param == "tied"}
    models = [tiny_qwen3(**shape, seed=seed) for seed in (0, 1)]
    paths = [directory / f"model-{n}" for n in range(2)]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    port = free_port()
    interpreter = install("0.32.0")
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process = start(
        interpreter, Plan(model=str(paths[0]), port=port, lora_rank=8, cpu=True, flags=FLAGS), seconds=900
    )
    print(f"\n{request.param}: up after {time.monotonic() - began:.0f} s")
    try:
        yield Served(process, models, paths)
    finally:
        process.stop()


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], ids: list[int], temperature: float = 1.0) -> list[float]:
    logits = model(torch.tensor([prompt + ids])).logits[0].float() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[torch.arange(len(ids)), torch.tensor(ids)].tolist()


def gap(found: Completion, model: Any, prompt: list[int], part: slice = slice(None), t: float = 1.0) -> float:
    wanted = logprobs(model, prompt, found.ids, t)
    return max(abs(a - b) for a, b in zip(found.logprobs[part], wanted[part], strict=True))


def test_ids_and_logprobs_are_the_models(served: Served) -> None:
    async def main() -> None:
        async with await served.connect() as engine:
            for temperature in (1.0, 0.6, 0.0):
                how = Sampling(max_tokens=40, temperature=temperature, seed=7)
                found = await engine.generate(PROMPT, how, session="a")
                assert len(found.ids) == len(found.logprobs) == 40 and found.versions == [0] * 40
                difference = gap(found, served.models[0], PROMPT, t=temperature or 1.0)
                print(f"temperature {temperature}: {difference:.1e} from transformers")
                assert difference < 1e-4
                if temperature == 0:
                    with torch.no_grad():
                        best = served.models[0](torch.tensor([PROMPT + found.ids])).logits[0].argmax(-1)
                    assert best[len(PROMPT) - 1 : -1].tolist() == found.ids
                again = await engine.generate(PROMPT, how)
                assert again.ids == found.ids
            turn = await engine.generate(PROMPT + found.ids + [1, 2], Sampling(max_tokens=20), session="a")
            assert turn.cached_tokens > 0 and gap(turn, served.models[0], PROMPT + found.ids + [1, 2]) < 1e-4

    asyncio.run(main())


def test_weights_arrive_in_the_middle_of_a_request(served: Served) -> None:
    """Each token is of the version that it says, from KV of that version: the request's and the cache's."""

    async def main() -> None:
        one, other = served.models
        async with await served.connect() as engine:
            for _ in range(2):
                warm = await engine.generate(PROMPT, Sampling(max_tokens=4))
            assert warm.versions == [0] * 4 and warm.cached_tokens > 0
            task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=LONG, seed=1)))
            await served.runs(1)
            began = time.monotonic()
            await engine.load_weights(LiveWeights(PolicyModel(other)), 1)
            seconds = time.monotonic() - began
            found = await task
            switch = found.versions.index(1)
            assert found.versions == [0] * switch + [1] * (LONG - switch) and 0 < switch < LONG
            before, after = (
                gap(found, one, PROMPT, slice(0, switch)),
                gap(found, other, PROMPT, slice(switch, None)),
            )
            print(
                f"new weights after {switch} of {LONG} tokens, {seconds:.2f} s: {before:.1e}, {after:.1e} off"
            )
            assert before < 1e-4 and after < 1e-4
            # Were the prefix cache not forgotten, its blocks of version 0 would be used here.
            cached = await engine.generate(PROMPT, Sampling(max_tokens=30, seed=2))
            assert cached.versions == [1] * 30 and gap(cached, other, PROMPT) < 1e-4
            await engine.load_weights(SavedWeights(str(served.paths[0])), 2)
            back = await engine.generate(PROMPT, Sampling(max_tokens=30, seed=2))
            assert back.versions == [2] * 30 and gap(back, one, PROMPT) < 1e-4

    asyncio.run(main())


def test_a_second_run_is_refused_and_the_next_finds_its_own_weights(served: Served) -> None:
    async def main() -> None:
        async with await served.connect(holder="first") as engine:
            await engine.load_weights(SavedWeights(str(served.paths[1])), 1)
            with pytest.raises(EngineError, match="held by the run 'first'"):
                await served.connect(holder="second")
        async with await served.connect(
            holder="second"
        ) as engine:  # The server still has the first's weights.
            found = await engine.generate(PROMPT, Sampling(max_tokens=20))
            assert found.versions == [0] * 20 and gap(found, served.models[0], PROMPT) < 1e-4

    asyncio.run(main())


def test_vllm_reloads_by_itself_but_for_a_tied_head_on_cpu(served: Served) -> None:
    async def main() -> None:
        if served.models[0].config.tie_word_embeddings:
            with pytest.raises(EngineError, match=r"engine\.weights=file"):
                await served.connect(weights="reload")
            return
        async with await served.connect(weights="reload") as engine:
            await engine.load_weights(LiveWeights(PolicyModel(served.models[1])), 1)
            found = await engine.generate(PROMPT, Sampling(max_tokens=30))
            assert found.versions == [1] * 30 and gap(found, served.models[1], PROMPT) < 1e-4

    asyncio.run(main())


def test_adapters_of_two_runs_side_by_side(served: Served) -> None:
    """A request goes on under a new adapter from KV of its own; the other run's is not touched."""
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        config = PeftConfig(
            r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return get_peft_model(tiny_like(served), config).eval()

    async def main() -> None:
        first, second, others = adapted(1), adapted(2), adapted(3)
        run = await served.connect(holder="one", weights="adapter")
        neighbour = await served.connect(holder="two", weights="adapter")
        await neighbour.load_weights(LiveWeights(PolicyModel(others)), 5)
        await run.load_weights(LiveWeights(PolicyModel(first)), 1)
        warm = await run.generate(PROMPT, Sampling(max_tokens=8))
        assert gap(warm, first, PROMPT) < 1e-4 < gap(warm, served.models[0], PROMPT)
        mine = asyncio.create_task(run.generate(PROMPT, Sampling(max_tokens=LONG, seed=1)))
        theirs = asyncio.create_task(neighbour.generate(PROMPT, Sampling(max_tokens=500, seed=1)))
        await served.runs(2)
        began = time.monotonic()
        await run.load_weights(LiveWeights(PolicyModel(second)), 2)
        seconds = time.monotonic() - began
        moved, stayed = await mine, await theirs
        switch = moved.versions.index(2)
        assert moved.versions == [1] * switch + [2] * (LONG - switch) and 0 < switch < LONG
        before, after = (
            gap(moved, first, PROMPT, slice(0, switch)),
            gap(moved, second, PROMPT, slice(switch, None)),
        )
        print(f"new adapter after {switch} of {LONG} tokens, {seconds:.2f} s: {before:.1e}, {after:.1e} off")
        assert before < 1e-4 and after < 1e-4
        assert stayed.versions == [5] * 500 and gap(stayed, others, PROMPT) < 1e-4
        await run.aclose()
        await neighbour.aclose()
        assert httpx.get(f"{served.url}/v1/models").json()["data"][1:] == []

    asyncio.run(main())


def test_a_policy_in_four_bits_plays_as_what_is_trained(served: Served) -> None:
    """vLLM never hears of bits: it gets the whole matrices that they stand for, adapters merged."""

    async def main() -> None:
        config = ModelConfig(name=str(served.paths[1]), lora=LoraConfig(r=4), quantization="nf4")
        policy = load_model(config, device="cpu")
        torch.manual_seed(1)
        for name, parameter in policy.causal.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        async with await served.connect() as engine:
            await engine.load_weights(LiveWeights(policy), 1)
            found = await engine.generate(PROMPT, Sampling(max_tokens=30))
            difference = gap(found, policy.causal, PROMPT)
            print(f"4 bits and adapters: {difference:.1e} from what is trained")
            assert found.versions == [1] * 30 and difference < 1e-4
            assert gap(found, served.models[1], PROMPT) > 1e-2

    asyncio.run(main())


def tiny_like(served: Served) -> Any:
    return type(served.models[0]).from_pretrained(served.paths[0], dtype=torch.float32)


def test_cancelled_requests_leave_the_server(served: Served) -> None:
    async def main() -> None:
        async with await served.connect() as engine:
            tasks = [
                asyncio.create_task(engine.generate([n, *PROMPT], Sampling(max_tokens=1900)))
                for n in range(8)
            ]
            await served.runs(8)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await served.runs(0, seconds=5)  # By themselves they end after eleven.

    asyncio.run(main())


def test_tokens_a_second(served: Served) -> None:
    async def main() -> None:
        async with await served.connect() as engine:
            began = time.monotonic()
            found = await asyncio.gather(
                *(engine.generate([n, *PROMPT], Sampling(max_tokens=256, seed=n)) for n in range(16))
            )
            seconds = time.monotonic() - began
            tokens = sum(len(one.ids) for one in found)
            print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second, 16 at once")
            assert tokens == 16 * 256 and all(len(one.versions) == 256 for one in found)

    asyncio.run(main())
