"""Servers that are started anew, hang or are left in the middle: what is asked of them is asked of others."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.engines.test_vllm import PROMPT, Shift, connect, sampling, until
from tests.support.vllm_fake import fake_vllm

from turnwise.engines import vllm_flights
from turnwise.engines.vllm_tenancy import evict
from turnwise.engines.vllm_weights import SavedWeights
from turnwise.errors import EngineError


@pytest.mark.parametrize("weights", ["file", "adapter"])
def test_a_server_that_was_started_anew_draws_no_new_sessions(weights: str) -> None:
    async def main() -> None:
        async with (
            fake_vllm() as stays,
            fake_vllm() as anew,
            await connect(stays, anew, weights=weights) as engine,
        ):
            await engine.load_weights(Shift(1), 1)
            anew.label, anew.shift = "default", 0
            anew.adapters.clear()
            anew.cache.clear()
            for n in range(20):  # Each goes where there are fewest.
                session = f"s{n}"
                assert (await engine.generate([n, 1], sampling(2), session=session)).versions == [1, 1]
            await engine.load_weights(Shift(2), 2)
            before = anew.served
            found = await asyncio.gather(*(engine.generate(PROMPT, sampling(2)) for _ in range(4)))
            assert all(one.versions == [2, 2] for one in found)
            if weights == "file":  # A base that lost its name is nobody's to put adapters on.
                assert anew.served > before

    asyncio.run(main())


def test_the_only_server_s_new_weights_are_an_error() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            await engine.load_weights(Shift(1), 1)
            fake.label = "default"
            for _ in range(2):
                with pytest.raises(EngineError, match="started anew"):
                    await engine.generate(PROMPT, sampling(2))

    asyncio.run(main())


def test_a_server_that_hangs_loses_its_requests_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_flights, "PING_SECONDS", 0.05)

    async def main() -> None:
        async with fake_vllm() as stays, fake_vllm() as hangs, await connect(stays, hangs) as engine:
            hangs.mute = "/"
            found = await asyncio.gather(
                *(engine.generate([n, 1], sampling(3), session=f"s{n}") for n in range(4))
            )
            assert [len(one.ids) for one in found] == [3] * 4
            hangs.mute = ""

    asyncio.run(main())


def test_a_cancelled_request_is_cancelled_whatever_its_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_flights, "PING_SECONDS", 0.05)

    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.mute = "/inference"
            task = asyncio.create_task(engine.generate(PROMPT, sampling(3)))
            await until(lambda: engine._flights)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fake.mute = ""

    asyncio.run(main())


def test_weights_that_are_called_off_leave_a_server_going() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.mute = "/update_weights"
            task = asyncio.create_task(engine.load_weights(Shift(1), 1))
            await until(lambda: fake.paused and fake.updating)
            await asyncio.sleep(0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert not fake.paused and fake.label.endswith("broken:1")
            fake.mute = ""

    asyncio.run(main())


def test_a_server_that_is_set_free_goes_on() -> None:
    async def main() -> None:
        async with fake_vllm(paused=True, label="turnwise:dead:3") as fake:
            assert await evict(fake.url) == ["the lease of dead has ended", "its requests go on"]
            assert not fake.paused

    asyncio.run(main())


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            assert (await engine.generate(PROMPT, sampling(2))).versions == [0, 0]

    asyncio.run(main())


def test_a_model_s_own_files_are_sent_and_no_copies_beside_them(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        save_file({name: torch.ones(1)}, tmp_path / name)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = [name for name, _ in SavedWeights(str(tmp_path)).tensors()]
    assert found == ["model-1.safetensors", "model-2.safetensors"]


def test_a_server_that_lost_its_base_is_found_out() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake, weights="adapter") as engine:
            await engine.load_weights(Shift(1), 1)
            fake.label = "turnwise:other:1"
            with pytest.raises(EngineError, match="taken by another trainer, or started anew"):
                await engine.generate(PROMPT, sampling(2))

    asyncio.run(main())


def test_held_requests_are_computed_again() -> None:
    async def main() -> None:
        async with fake_vllm(tick=0.005) as fake, await connect(fake) as engine:
            await engine.load_weights(Shift(1), 1)
            fake.calls.clear()
            await engine.load_weights(Shift(2), 2)
            assert "/reset_prefix_cache?reset_running_requests=true" in fake.calls
            last = fake.calls.index("/finish_weight_update")
            assert any("reset_prefix_cache" in call for call in fake.calls[last:])

    asyncio.run(main())
