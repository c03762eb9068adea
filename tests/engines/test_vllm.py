"""The vllm engine against a server on loopback that speaks as vLLM does; `test_vllm_real` has a real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.vllm_fake import VOCABULARY, FakeVllm, fake_vllm
from transformers import Qwen3Config

from turnwise.engines import vllm as engine_module
from turnwise.engines.vllm import VllmEngine
from turnwise.engines.vllm_tenancy import evict
from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Finish, Sampling

CONFIG = Qwen3Config(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1)
PROMPT = [5, 6, 7]


class Shift:
    """The fake's weights."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def tensors(self) -> Iterator[tuple[str, Any]]:
        yield "shift", torch.tensor([float(self.shift)])

    def save_adapter(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(str(self.shift), encoding="utf-8")


async def connect(*fakes: FakeVllm, **settings: Any) -> VllmEngine:
    settings = {"holder": "me", "start_seconds": 20.0, "request_seconds": 20.0, **settings}
    return await VllmEngine.connect(
        [fake.url for fake in fakes], model="some/model", config=CONFIG, **settings
    )


def sampling(tokens: int = 8, **settings: Any) -> Sampling:
    return Sampling(max_tokens=tokens, **settings)


def drawn_by(version: int) -> float:
    """The fake's logprob under weights whose shift is their version."""
    return -(1 + version) / 8


@contextmanager
def held(fake: FakeVllm) -> Iterator[None]:
    """No request ends meanwhile, however long it takes: each waits with its tenth token."""
    fake.most = 10
    yield
    fake.most = 1 << 30


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


# -- replies ---------------------------------------------------------------------------------------------


async def generates() -> None:
    async with fake_vllm() as fake, await connect(fake) as engine:
        completion = await engine.generate(
            PROMPT, sampling(9, temperature=0.7, seed=2**64 - 1, stop_ids=(12,)), session="a"
        )
        assert completion.ids == [8, 9, 10, 11, 12] and completion.finish is Finish.STOP
        assert completion.logprobs == [drawn_by(0)] * 5 and completion.versions == [0] * 5
        assert completion.kept_mass is None and completion.cached_tokens == 3
        params = fake.bodies[-1]["sampling_params"]
        assert params["seed"] == 2**63 - 1 and params["temperature"] == 0.7 and params["ignore_eos"]
        assert params["logprobs"] == 0 and params["stop_token_ids"] == [12]
        assert (await engine.generate(PROMPT, sampling(3))).finish is Finish.LENGTH
        room = await engine.generate([1] * 250, sampling(50))
        assert len(room.ids) == 6 and engine.max_context == 256


def test_a_reply_is_ids_with_a_logprob_and_a_version_each() -> None:
    asyncio.run(generates())


@pytest.mark.parametrize("spoil", ["logprob", "fewer", "version", "early"])
def test_what_cannot_be_learned_from_is_an_error(spoil: str) -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.spoil = spoil
            with pytest.raises(EngineError, match=r"logprob|which weights|ended a reply"):
                await engine.generate(PROMPT, sampling())

    asyncio.run(main())


def test_what_would_end_a_server_never_reaches_it() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            served = fake.served
            with pytest.raises(EngineError, match="vocabulary is 0 to 63"):
                await engine.generate([5, VOCABULARY], sampling())
            with pytest.raises(ContextOverflowError):
                await engine.generate([1] * 256, sampling())
            with pytest.raises(EngineError, match=r"sampling\.top_p"):
                await engine.generate(PROMPT, sampling(top_p=0.0))
            with pytest.raises(EngineError, match="images"):
                await engine.generate(PROMPT, sampling(), images=["abc"])
            assert fake.served == served

    asyncio.run(main())


# -- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["file", "adapter"])
@pytest.mark.parametrize("seed", range(3))
def test_no_token_lacks_its_version_however_weights_come(weights: str, seed: int) -> None:
    """Versions only rise, and no token of full weights was drawn from KV of others."""

    async def main() -> None:
        draw = random.Random(seed)
        async with fake_vllm() as fake, await connect(fake, weights=weights) as engine:

            async def episode(number: int) -> None:
                replies = 0
                while replies < 3 or not updated.is_set():
                    replies += 1
                    tokens, stop = draw.randrange(1, 60), draw.randrange(VOCABULARY)
                    found = await engine.generate(
                        [number, 1], sampling(tokens, stop_ids=(stop,), seed=number), session=str(number)
                    )
                    assert 1 <= len(found.ids) == len(found.logprobs) == len(found.versions) <= tokens
                    assert found.versions == sorted(found.versions)
                    assert (found.finish is Finish.STOP) == (found.ids[-1] == stop)
                    if weights == "file":
                        assert found.logprobs == [drawn_by(version) for version in found.versions]
                    seen.update(found.versions)

            async def updates() -> None:
                for version in range(1, 7):
                    await asyncio.sleep(draw.random() * 0.03)
                    if version % 2:  # Every other one comes as it comes.
                        await until(lambda version=version: version - 1 in seen)
                    await engine.load_weights(Shift(version), version)
                updated.set()

            seen: set[int] = set()
            updated = asyncio.Event()
            await asyncio.gather(updates(), *(episode(number) for number in range(8)))
            assert seen >= {0, 2, 4}
            assert (await engine.generate(PROMPT, sampling())).versions == [6] * 8

    asyncio.run(main())


def test_a_request_in_flight_goes_on_under_new_weights() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            with held(fake):
                task = asyncio.create_task(engine.generate(PROMPT, sampling(40)))
                await until(lambda: any(len(job.ids) > 3 for job in fake.jobs.values()))
                await engine.load_weights(Shift(1), 1)
            found = await task
            switch = found.versions.index(1)
            assert found.versions == [0] * switch + [1] * (40 - switch) and 3 < switch < 40
            assert found.logprobs == [drawn_by(0)] * switch + [drawn_by(1)] * (40 - switch)
            assert len({body["cache_salt"] for body in fake.bodies}) == 2  # the probe's and version 0's
            await engine.generate(PROMPT, sampling())
            assert fake.bodies[-1]["cache_salt"] == "turnwise:me:1"

    asyncio.run(main())


def test_weights_that_break_off_spoil_no_sample_and_the_next_ones_heal() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            with held(fake):
                task = asyncio.create_task(engine.generate(PROMPT, sampling(30)))
                await until(lambda: any(len(job.ids) > 3 for job in fake.jobs.values()))
                fake.hardware_fails = True
                with pytest.raises(EngineError, match="out of memory"):
                    await engine.load_weights(Shift(1), 1)
                assert not fake.paused
            with pytest.raises(EngineError, match="failed to take new weights"):
                await task
            fake.hardware_fails, fake.updating = False, True  # What a killed run leaves behind.
            await engine.load_weights(Shift(2), 2)
            assert (await engine.generate(PROMPT, sampling(2))).versions == [2, 2]

    asyncio.run(main())


def test_version_0_is_put_where_a_server_has_something_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_vllm(label="turnwise:free:9", shift=9) as fake:
            async with await connect(fake, initial=Shift(0), weights_dir=tmp_path) as engine:
                assert (await engine.generate(PROMPT, sampling(1))).logprobs == [drawn_by(0)]
                assert list(tmp_path.iterdir()) == []  # nothing stays on the way
            assert fake.label == "turnwise:free:0"
        async with fake_vllm(model="another/model") as fake:
            with pytest.raises(EngineError, match="cannot be had"):
                await VllmEngine.connect(
                    [fake.url], model=str(tmp_path / "none"), config=CONFIG, holder="me", start_seconds=20
                )

    asyncio.run(main())


# -- several runs ----------------------------------------------------------------------------------------


def test_full_weights_are_one_runs() -> None:
    async def main() -> None:
        async with fake_vllm() as fake:
            first = await connect(fake, holder="first")
            with pytest.raises(EngineError, match=f"held by the run 'first'.*turnwise vllm free {fake.url}"):
                await connect(fake, holder="second")
            with pytest.raises(EngineError, match="held by the run 'first'"):
                await connect(fake, holder="second", weights="adapter")
            await first.load_weights(Shift(1), 1)
            assert (await first.generate(PROMPT, sampling(1))).versions == [1]
            fake.paused = True  # Killed in the middle of an update; started again, it takes the server up.
            async with await connect(fake, holder="first", initial=Shift(0)) as again:
                assert (await again.generate(PROMPT, sampling(1))).versions == [0]
            async with await connect(fake, holder="second", initial=Shift(0)):
                with pytest.raises(EngineError, match="not those of this run"):
                    await first.generate(PROMPT, sampling(1))
                with pytest.raises(EngineError, match="was taken by another"):
                    await first.load_weights(Shift(2), 2)
                await first.aclose()
                assert fake.label == "turnwise:second:0"  # It leaves alone what is no longer its own.
                assert await evict(fake.url) == ["the lease of second has ended"]
            fake.label = "step-17"
            with pytest.raises(EngineError, match="another program's"):
                await connect(fake)

    asyncio.run(main())


def test_adapters_of_several_runs_share_a_server_and_never_meet() -> None:
    async def main() -> None:
        async with fake_vllm() as fake:
            one = await connect(fake, holder="one", weights="adapter")
            two = await connect(fake, holder="two", weights="adapter")
            await two.load_weights(Shift(5), 5)
            with held(fake):
                long = asyncio.create_task(one.generate(PROMPT, sampling(60, seed=3)))
                other = asyncio.create_task(two.generate(PROMPT, sampling(60)))
                await until(lambda: sum(len(job.ids) > 3 for job in fake.jobs.values()) == 2)
                await one.load_weights(Shift(1), 1)
            assert sorted(fake.adapters) == ["turnwise:one:1", "turnwise:two:5"]
            moved, stayed = await long, await other
            switch = moved.versions.index(1)
            assert moved.versions == [0] * switch + [1] * (60 - switch) and 3 < switch < 60
            assert stayed.versions == [5] * 60
            assert moved.ids == stayed.ids  # Put together from two requests, and nothing is missing.
            parts = [body for body in fake.bodies if body["sampling_params"]["seed"] is not None][-1:]
            assert (
                parts[0]["model"] == "turnwise:one:1" and parts[0]["token_ids"] == PROMPT + moved.ids[:switch]
            )
            assert (
                parts[0]["sampling_params"]["seed"] != 3
            )  # The first seed again would repeat the first draws.
            assert not fake.paused and "/pause" not in "".join(fake.calls)
            await one.load_weights(Shift(2), 2)
            await until(lambda: "turnwise:one:1" not in fake.adapters)
            with pytest.raises(EngineError, match="adapters of one, two"):
                await connect(fake, holder="three")
            await one.aclose()
            assert sorted(fake.adapters) == ["turnwise:two:5"]
            assert await evict(fake.url) == ["unloaded turnwise:two:5"]
            await two.aclose()

    asyncio.run(main())


# -- servers that are not as they should be --------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "settings", "said"),
    [
        ({"dev_mode": False}, {}, "VLLM_SERVER_DEV_MODE=1"),
        ({"scale_out": False}, {}, "--enable-scale-out"),
        ({"processed": False}, {}, "--logprobs-mode processed_logprobs"),
        ({"plugin": False}, {}, "--weight-transfer-config"),
        ({"lora": False}, {"weights": "adapter"}, "--enable-lora"),
        ({"asleep": True}, {}, "is asleep.*wake_up"),
        ({}, {"max_context": 512}, "--max-model-len 512"),
        ({"spoil": "version"}, {}, "vLLM 0.32 or newer"),
    ],
)
def test_a_server_that_lacks_a_flag_is_told_which(
    wrong: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    async def main() -> None:
        async with fake_vllm(**wrong) as fake:
            with pytest.raises(EngineError, match=said):
                await connect(fake, **settings)

    asyncio.run(main())


def test_another_model_and_no_server_are_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with fake_vllm() as fake:
            other = Qwen3Config(vocab_size=65)
            with pytest.raises(EngineError, match="trainer's 65"):
                await VllmEngine.connect([fake.url], model="some/model", config=other, start_seconds=20)
        with pytest.raises(EngineError, match="turnwise vllm up"):
            await VllmEngine.connect([fake.url], model="some/model", config=CONFIG, start_seconds=0.3)
        assert caplog.text.count(f"waiting for the vLLM server {fake.url}, up to 0.3 s") == 1

    asyncio.run(main())


def test_requests_are_offered_again_only_where_nothing_was_sampled() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.busy, before = 2, fake.served
            assert len((await engine.generate(PROMPT, sampling(3))).ids) == 3
            assert fake.served == before + 1
            fake.most = 10
            task = asyncio.create_task(engine.generate(PROMPT, sampling(200)))
            await until(lambda: any(len(job.ids) > 3 for job in fake.jobs.values()))
            before = fake.served
            next(iter(fake.jobs.values())).aborted = True
            with pytest.raises(EngineError, match="told by somebody else"):
                await task
            assert fake.served == before

    asyncio.run(main())


def test_a_request_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", 0.2)

    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.busy = 1000
            with pytest.raises(EngineError, match="no server has taken"):
                await engine.generate(PROMPT, sampling())
            fake.busy, fake.asleep = 0, True
            engine._request_seconds = 0.2
            with pytest.raises(EngineError, match=r"is asleep"):
                await engine.generate(PROMPT, sampling())
            fake.asleep = False

    asyncio.run(main())


def test_cancelling_ends_the_request_on_the_server() -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake) as engine:
            fake.most = 10
            task = asyncio.create_task(engine.generate(PROMPT, sampling(200)))
            await until(lambda: any(len(job.ids) > 3 for job in fake.jobs.values()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not fake.jobs)
            assert "/inference/v1/abort_requests" in fake.calls

    asyncio.run(main())


def test_closing_fails_what_is_in_flight() -> None:
    async def main() -> None:
        async with fake_vllm() as fake:
            engine = await connect(fake)
            fake.most = 10
            task = asyncio.create_task(engine.generate(PROMPT, sampling(200)))
            await until(lambda: bool(fake.jobs))
            await engine.aclose()
            await engine.aclose()
            with pytest.raises(EngineError, match="closed"):
                await task
            await until(lambda: not fake.jobs)
            with pytest.raises(EngineError, match="closed"):
                await engine.generate(PROMPT, sampling())

    asyncio.run(main())


@pytest.mark.parametrize("weights", ["file", "adapter"])
def test_pause_holds_what_is_in_flight(weights: str) -> None:
    async def main() -> None:
        async with fake_vllm() as fake, await connect(fake, weights=weights) as engine:
            with held(fake):
                task = asyncio.create_task(engine.generate(PROMPT, sampling(60)))
                await until(lambda: any(len(job.ids) > 3 for job in fake.jobs.values()))
                await engine.pause()
            await engine.load_weights(Shift(1), 1)
            done, _ = await asyncio.wait([task], timeout=0.2)
            assert not done
            await engine.resume()
            assert (await task).versions[-1] == 1

    asyncio.run(main())


# -- several servers -------------------------------------------------------------------------------------


def test_sessions_stay_with_their_server_and_new_ones_go_where_there_are_fewest() -> None:
    async def main() -> None:
        async with fake_vllm() as left, fake_vllm() as right, await connect(left, right) as engine:
            probes = left.served, right.served
            await asyncio.gather(*(engine.generate([n, 1], sampling(), session=f"s{n}") for n in range(10)))
            assert (left.served - probes[0], right.served - probes[1]) == (5, 5)
            homes = {body["token_ids"][0] for body in left.bodies[probes[0] :]}
            for n in range(10):
                await engine.generate([n, 1, 2], sampling(), session=f"s{n}")
            assert {body["token_ids"][0] for body in left.bodies[probes[0] :]} == homes
            for n in homes:
                await engine.release(f"s{n}")
            before = left.served
            await asyncio.gather(*(engine.generate([n, 1], sampling(), session=f"t{n}") for n in range(5)))
            assert left.served == before + 5
            before = left.served, right.served
            await asyncio.gather(*(engine.generate([1, 1], sampling(20)) for _ in range(6)))
            assert (left.served - before[0], right.served - before[1]) == (3, 3)

    asyncio.run(main())


def test_a_lost_server_is_left_out_and_taken_back_with_the_next_weights() -> None:
    async def main() -> None:
        async with fake_vllm() as stays, await asyncio.start_server(stays.serve, "127.0.0.1", 0) as _:
            async with fake_vllm() as goes:
                engine = await connect(stays, goes)
                for n in range(4):
                    await engine.generate([n, 1], sampling(1), session=f"s{n}")
                port = goes.port
            lost = [f"s{n}" for n in range(4) if engine._placement._home[f"s{n}"].url == goes.url]
            assert len(lost) == 2
            for session in lost:
                assert (await engine.generate(PROMPT, sampling(1), session=session)).versions == [0]
            await engine.load_weights(Shift(1), 1)
            assert [server.url for server in engine._placement.behind] == [goes.url]
            # Started anew, it has the weights that it began with.
            goes.label, goes.shift = "default", 0
            server = await asyncio.start_server(goes.serve, "127.0.0.1", port)
            engine._placement._unreached.clear()
            assert (await engine.generate(PROMPT, sampling(1), session="new")).versions == [1]
            before = goes.served
            await engine.load_weights(Shift(2), 2)
            found = await asyncio.gather(*(engine.generate(PROMPT, sampling(4)) for _ in range(4)))
            assert goes.served > before and all(one.versions == [2] * 4 for one in found)
            assert all(one.logprobs == [drawn_by(2)] * 4 for one in found)
            await engine.aclose()
            server.close()

    asyncio.run(main())
