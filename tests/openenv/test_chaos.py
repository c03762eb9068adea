"""Servers that die, connections that stall, break in half and pile up: replies find their requests or nobody.

Every session sends numbers of its own and the environment answers with what it was sent, so that a reply that
reached the wrong request would show.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from tests.openenv import foreign
from tests.openenv.disturb import disturbed
from tests.openenv.foreign import Slow
from tests.openenv.serving import Serving, running

from turnwise.envs.registry import make
from turnwise.envs.session import Session
from turnwise.errors import EnvHungError, EnvLostError
from turnwise.openenv.client.remote import RemoteSpec
from turnwise.openenv.client.socket import EnvSocket
from turnwise.rollout.arena import Arena
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.rollout.policy import Context
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Message, Sampling, StopReason, ToolCall, Trajectory

HANG = -30
"""`Slow` takes half a minute over it, or until it is `Slow.free` to go on."""
PONGS = "turnwise.openenv.client.session.PONG_SECONDS"
ROUND = 10
"""`Slow` waits a tenth of a second for each of the last digit's: these numbers are answered at once."""


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    """What hangs in a test ends with it."""
    Slow.made.clear()
    Slow.free.clear()
    yield
    Slow.free.set()


@pytest.fixture
def server() -> Iterator[Serving]:
    with running(foreign.slow_app()) as server:
        try:
            yield server
        finally:
            Slow.free.set()


def spec_of(urls: Any) -> RemoteSpec:
    spec = make(urls, name="slow", args={"patience": 10.0})
    assert isinstance(spec, RemoteSpec)
    return spec


def said(number: int) -> ToolCall:
    return ToolCall(name="slow", arguments={"number": number})


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)


async def outcomes(session: Session, numbers: Iterator[int], calls: int) -> Counter[str]:
    """How calls end; after one that breaks the session, the next episode begins."""
    found: Counter[str] = Counter()
    lost = True
    for number in (next(numbers) for _ in range(calls)):
        try:
            if lost:
                messages = await session.reset({}, number)
                assert messages[0].text == str(number)
                lost = False
            result = await session.call(said(number))
        except (EnvHungError, EnvLostError) as error:
            found[type(error).__name__] += 1
            lost = True
            continue
        assert result.content == str(number), "a reply reached the wrong request"
        found["answered"] += 1
    return found


def test_a_tenth_of_all_replies_comes_too_late(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    # A ping's answer may wait behind a late reply, be late itself, and the machine pause meanwhile.
    monkeypatch.setattr(PONGS, 30.0)

    async def main(url: str) -> Counter[str]:
        spec = spec_of(url)
        limits = replace(spec.limits, call_seconds=0.5)
        sessions = await asyncio.gather(*(spec.open(limits) for _ in range(16)))
        proxy.delayed = 0.1
        ends = await asyncio.gather(
            *(outcomes(one, count(1000 * n, ROUND), 30) for n, one in enumerate(sessions, 1))
        )
        proxy.delayed = 0.0
        await asyncio.gather(*(one.close() for one in sessions))
        await until(lambda: all(one.closed for one in Slow.made))
        await until(lambda: spec.remote.servers.busy == {url: 0})
        return sum(ends, Counter())

    with disturbed(server.url) as proxy:
        proxy.seconds = 0.8
        ends = asyncio.run(main(proxy.url))
    assert set(ends) == {"answered", "EnvHungError"} and ends.total() == 480
    assert ends["EnvHungError"] > 20


def test_a_line_stays_in_step_when_replies_come_late(server: Serving) -> None:
    """The same connection goes on: a late reply is dropped, and the next request has its own."""

    async def ask(socket: EnvSocket, number: int, seconds: float = 0.15) -> bool:
        try:
            reply = await socket.ask({"type": "step", "data": {"number": number}}, seconds=seconds)
        except EnvHungError:
            return False
        assert reply["data"]["observation"] == {"number": number}
        return True

    async def main(url: str) -> list[bool]:
        socket = await EnvSocket.open(url, seconds=5)
        proxy.delayed = 0.3
        kept = [await ask(socket, number) for number in range(0, 40 * ROUND, ROUND)]
        proxy.delayed = 0.0
        await until(lambda: socket.usable)
        assert await ask(socket, 7770, seconds=10)
        await socket.close()
        return kept

    with disturbed(server.url) as proxy:
        proxy.seconds = 0.25
        kept = asyncio.run(main(proxy.url))
    assert 5 < sum(kept) < 38


@pytest.mark.parametrize("hangs", ["network", "environment"])
def test_silence_is_nobodys_fault_and_a_hanging_call_is_the_policys(
    server: Serving, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PONGS, 0.5 if hangs == "network" else 30.0)

    async def main(url: str) -> list[Trajectory]:
        spec = spec_of(url)
        arena = Arena("slow", spec, limits=replace(spec.limits, max_turns=3, call_seconds=4.0))

        def act(context: Context) -> Message:
            # For good: the other sibling may be at its first turn still.
            proxy.silent |= hangs == "network" and context.turn == 1
            return Message.assistant("", said(HANG if hangs == "environment" and context.turn == 1 else 0))

        order = GroupOrder(id="g/0", env="slow", task={}, seed=1, size=2)
        group = await play_group(
            order, arena=arena, policy=ScriptedPolicy(act), sampling=Sampling(), sink=lambda _: None
        )
        Slow.free.set()
        await arena.aclose()
        return list(group.trajectories)

    with disturbed(server.url) as proxy:
        trajectories = asyncio.run(main(proxy.url))
    scored = hangs == "environment"
    for one in trajectories:
        assert one.stop_reason is (StopReason.TIME_LIMIT if scored else StopReason.ENV_FAILED)
        assert one.error is not None and one.error.kind == ("EnvHungError" if scored else "EnvLostError")
        assert bool(one.rewards) is scored


def test_siblings_take_turns_on_a_server_with_one_place() -> None:
    """Also where rewards look at environments, one of them breaks, and waiting outlasts an episode's time."""

    def score(environments: Any = None, completions: Any = ()) -> list[float]:
        return [1.0] * len(completions)

    async def main(url: str) -> list[Trajectory]:
        spec = spec_of(url)
        limits = replace(spec.limits, max_turns=2, call_seconds=4.0, seconds=5.5)
        function = RewardFunction(function=score, name="score", seconds=60.0)
        arena = Arena("slow", spec, limits=limits, functions=[function])

        def act(context: Context) -> Message:
            # One that hangs, so that its connection is of no more use, and its place taken for longer yet.
            return Message.assistant("", said(-8 if context.session.endswith("s0") else 1))

        order = GroupOrder(id="g/0", env="slow", task={}, seed=1, size=4)
        async with asyncio.timeout(60):
            group = await play_group(
                order, arena=arena, policy=ScriptedPolicy(act), sampling=Sampling(), sink=lambda _: None
            )
        await arena.aclose()
        return list(group.trajectories)

    with running(foreign.slow_app(most=1)) as server:
        ends = Counter(one.stop_reason for one in asyncio.run(main(server.url)))
    assert ends == {StopReason.TIME_LIMIT: 1, StopReason.MAX_TURNS: 3}


@pytest.mark.parametrize("way", ["end_replies", "end_requests", "silent"])
def test_half_of_a_connection_is_gone(server: Serving, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PONGS, 0.5)

    async def main(url: str) -> None:
        spec = spec_of(url)
        limits = replace(spec.limits, call_seconds=5.0)
        sessions = await asyncio.gather(*(spec.open(limits) for _ in range(8)))
        await asyncio.gather(*(one.reset({}, 0) for one in sessions))
        calls = [asyncio.ensure_future(one.call(said(HANG))) for one in sessions]
        await asyncio.sleep(0.1)
        if way == "silent":
            proxy.silent = True
        else:
            getattr(proxy, way)()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {EnvLostError}, ends
        assert not any(one.alive for one in sessions)
        proxy.silent = False
        Slow.free.set()
        # The next episode of each has a connection of its own, and is answered what it asked.
        found = await asyncio.gather(
            *(outcomes(one, count(1000 * n, ROUND), 3) for n, one in enumerate(sessions, 1))
        )
        assert sum(found, Counter()) == {"answered": 24}
        await asyncio.gather(*(one.close() for one in sessions))
        await until(lambda: all(one.closed for one in Slow.made))
        await until(lambda: spec.remote.servers.busy == {url: 0})

    with disturbed(server.url) as proxy:
        asyncio.run(main(proxy.url))


def test_two_hundred_sessions_are_opened_and_dropped(server: Serving) -> None:
    """A hundred whose owner is cancelled while it connects, a hundred whose socket is torn."""

    async def main() -> None:
        spec = spec_of(server.url)
        opening = [asyncio.ensure_future(spec.open(spec.limits)) for _ in range(100)]
        for number, task in enumerate(opening):
            asyncio.get_running_loop().call_later(number / 400, task.cancel)
        ends = await asyncio.gather(*opening, return_exceptions=True)
        torn = [one for one in ends if not isinstance(one, BaseException)]
        assert len(torn) < 100
        torn += await asyncio.gather(*(spec.open(spec.limits) for _ in range(100)))
        for session in torn:
            transport: Any = session._socket._line.transport  # type: ignore[attr-defined]
            transport.abort()
        await until(lambda: all(not session.alive for session in torn))
        await asyncio.gather(*(session.close() for session in torn))
        await until(lambda: len(Slow.made) >= 100 and all(one.closed for one in Slow.made))
        await until(lambda: spec.remote.servers.busy == {server.url: 0})
        # The server is as it was.
        session = await spec.open(spec.limits)
        assert await outcomes(session, count(0, ROUND), 3) == {"answered": 3}
        await session.close()

    asyncio.run(main())


# -- episodes -------------------------------------------------------------------------------------------


def played(spec: RemoteSpec, groups: int, during: Callable[[], object] | None = None) -> list[Trajectory]:
    """Groups of four whose policy sends the numbers of its turn; something may happen in all their fifths."""
    begun: set[str] = set()
    together = asyncio.Event()

    async def act(context: Context) -> Message:
        if during is not None and context.turn == 4:
            begun.add(context.session)
            await together.wait()
        number = 100 * int(context.session.split("/")[1]) + 10 * context.turn
        return Message.assistant("", ToolCall(name="slow", arguments={"number": number + 1}))

    async def happen() -> None:
        if during is not None:
            await until(lambda: len(begun) == 4 * groups, 120.0)
            together.set()
            await asyncio.sleep(0.05)  # A call takes a tenth of a second.
            during()

    async def main() -> list[Trajectory]:
        arena = Arena("slow", spec, limits=replace(spec.limits, max_turns=8, call_seconds=10.0))
        seen: list[Trajectory] = []
        orders = [GroupOrder(id=f"g/{n}", env="slow", task={}, seed=n, size=4) for n in range(groups)]
        playing = [
            play_group(order, arena=arena, policy=ScriptedPolicy(act), sampling=Sampling(), sink=seen.append)
            for order in orders
        ]
        *found, _ = await asyncio.gather(*playing, happen())
        await arena.aclose()
        assert len(seen) == 4 * groups
        return [one for group in found for one in group.trajectories]

    return asyncio.run(main())


@pytest.mark.slow
def test_a_server_is_killed_in_the_middle() -> None:
    """Its episodes are lost and left out; the others' are whole, each answered with what it said."""
    servers = [foreign.Process("slow"), foreign.Process("slow")]
    try:
        spec = spec_of([one.ready().url for one in servers])
        trajectories = played(spec, 8, servers[0].kill)
        ends = Counter(one.stop_reason for one in trajectories)
        assert ends == {StopReason.ENV_FAILED: 16, StopReason.MAX_TURNS: 16}
        for one in trajectories:
            if one.stop_reason is StopReason.ENV_FAILED:
                assert one.error is not None and one.error.kind == "EnvLostError" and not one.rewards
                continue
            for turn in one.turns:
                [result] = turn.tool_results
                assert result.content == str(result.call.arguments["number"])

        # With one server set aside all go to the other; when it is back both are used.
        assert {one.stop_reason for one in played(spec, 2)} == {StopReason.MAX_TURNS}
    finally:
        for server in servers:
            server.close()


@pytest.mark.slow
def test_a_server_that_is_started_anew_is_found_again() -> None:
    server = foreign.Process("slow")

    def restart() -> None:
        server.kill()
        server.start()

    try:
        spec = spec_of(server.ready().url)
        ends = Counter(one.stop_reason for one in played(spec, 2, restart))
        assert ends == {StopReason.ENV_FAILED: 8}
        server.ready()
        assert {one.stop_reason for one in played(spec, 2)} == {StopReason.MAX_TURNS}
    finally:
        server.close()
