"""The scripted engine keeps the protocol's promises."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

from turnwise.engines.base import Engine
from turnwise.engines.scripted import ScriptedEngine
from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Completion, Finish, Sampling

PLAIN = Sampling(stop_ids=(2,))


class Nothing:
    def tensors(self) -> Iterator[tuple[str, Any]]:
        yield from ()


def test_a_list_is_played_turn_by_turn_for_each_session() -> None:
    async def main() -> None:
        engine: Engine = ScriptedEngine([[5, 6, 2], [7, 2]])
        first = await engine.generate([1], PLAIN, session="a")
        assert first == Completion(
            ids=[5, 6, 2], logprobs=[-math.log(2)] * 3, versions=[0] * 3, finish=Finish.STOP
        )
        second = await engine.generate([1, 5, 6, 2, 9], PLAIN, session="a")
        assert (second.ids, second.cached_tokens) == ([7, 2], 3)
        assert (await engine.generate([1], PLAIN, session="b")).ids == [5, 6, 2]
        await engine.release("a")
        assert (await engine.generate([1], PLAIN, session="a")).ids == [5, 6, 2]

    asyncio.run(main())


def test_limits_cut_and_stop_ids_end() -> None:
    async def main() -> None:
        engine = ScriptedEngine(lambda call: [5, 6, 2, 7], max_context=6)
        assert (await engine.generate([1], PLAIN)).ids == [5, 6, 2]
        whole = await engine.generate([1], Sampling())
        assert (whole.ids, whole.finish) == ([5, 6, 2, 7], Finish.LENGTH)
        short = await engine.generate([1], Sampling(max_tokens=2, stop_ids=(2,)))
        assert (short.ids, short.finish) == ([5, 6], Finish.LENGTH)
        full = await engine.generate([1] * 5, PLAIN)
        assert (full.ids, full.finish) == ([5], Finish.LENGTH)
        with pytest.raises(ContextOverflowError, match="6 tokens; 5 fit"):
            await engine.generate([1] * 6, PLAIN)

    asyncio.run(main())


def test_faults_are_raised_and_counted() -> None:
    def fault(call: Any) -> str | BaseException | None:
        return {1: "server lost", 2: RuntimeError("worse")}.get(call.number)

    async def main() -> None:
        engine = ScriptedEngine([[5, 2]], fault=fault)
        assert (await engine.generate([1], PLAIN)).ids == [5, 2]
        with pytest.raises(EngineError, match="server lost"):
            await engine.generate([1], PLAIN)
        with pytest.raises(RuntimeError, match="worse"):
            await engine.generate([1], PLAIN)
        assert len(engine.calls) == 3
        assert engine.running == 0

    asyncio.run(main())


def test_delays_overlap_and_cancelling_ends_them() -> None:
    async def main() -> None:
        engine = ScriptedEngine([[5, 2]], delay=lambda call: 0.01 if call.number < 8 else 60)
        await asyncio.gather(*(engine.generate([1], PLAIN, session=str(n)) for n in range(8)))
        assert engine.most_running == 8
        task = asyncio.create_task(engine.generate([1], PLAIN, session="0"))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="session '0' has a request under way"):
            await engine.generate([1], PLAIN, session="0")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.running == 0

    asyncio.run(main())


def test_pause_holds_and_weights_bump_the_version() -> None:
    async def main() -> None:
        engine = ScriptedEngine([[5, 2]])
        await engine.pause()
        task = asyncio.create_task(engine.generate([1], PLAIN))
        await asyncio.sleep(0.01)
        assert not task.done()
        await engine.load_weights(Nothing(), 3)
        await engine.resume()
        assert (await task).versions == [3, 3]
        assert engine.calls[0].version == 0

    asyncio.run(main())


def test_closing_fails_what_is_in_flight() -> None:
    async def main() -> None:
        engine = ScriptedEngine([[5, 2]], delay=60)
        task = asyncio.create_task(engine.generate([1], PLAIN))
        await asyncio.sleep(0)
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(EngineError, match="the engine is closed"):
            await task
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.generate([1], PLAIN)

    asyncio.run(main())
