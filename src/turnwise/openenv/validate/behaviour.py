"""What training asks of a server beyond the protocol: seeds repeat, sessions are apart, places come back."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from turnwise.errors import EnvError
from turnwise.openenv.client.socket import EnvSocket
from turnwise.openenv.validate.conformance import short
from turnwise.openenv.validate.player import Player, failed
from turnwise.openenv.validate.report import Outcome, Report

STEPS = 4
SEEDS = (0, 1, 2, 3)
DROPS = 2
"""Rounds of sessions whose clients vanish."""


async def check_seeds(report: Report, player: Player) -> bool:
    """Episodes of one seed are the same; whether they are, so that others can be compared with them.

    Those in which no step was answered are not compared: they show nothing of what a step does.
    """
    async with player.session() as socket:
        alone = [await player.episode(socket, seed, steps=STEPS) for seed in SEEDS]
        again = await player.episode(socket, SEEDS[0], steps=STEPS)
        moved = [await player.episode(socket, seed, steps=STEPS, moves=0) for seed in SEEDS]
    async with player.session() as other:
        fresh = await player.episode(other, SEEDS[0], steps=STEPS)
    repeats = fresh == alone[0]
    acted = any(len(episode) > 2 or not failed(episode[-1]) for episode in alone)
    if repeats and not acted:
        report.add(
            "seed_repeats", "seeds", "skipped",
            f"no step was answered but by {alone[0][-1]}: there is nothing to compare",
        )  # fmt: skip
    else:
        report.add(
            "seed_repeats", "seeds", "ok" if repeats else "error",
            f"seed {SEEDS[0]} in another session: {difference(alone[0], fresh)}",
            "take `seed` in reset() and draw from a generator made of it alone: the siblings of a group must "
            "start from the same state",
        )  # fmt: skip
    if repeats and acted:
        clean = again == alone[0]
        report.add(
            "reset_clears", "seeds", "ok" if clean else "error",
            f"seed {SEEDS[0]} after other episodes in the same session: {difference(alone[0], again)}",
            "set all state in reset(): something of an episode is left in the next",
        )  # fmt: skip
    kinds = len({tuple(episode) for episode in moved})
    report.add(
        "seeds_differ", "seeds", "ok" if kinds > 1 else "warning",
        f"{len(SEEDS)} seeds and the same {STEPS} actions gave {kinds} different episodes",
        "the seed changes nothing that was seen: every episode may be the same task",
    )  # fmt: skip
    return repeats and acted


async def check_concurrency(report: Report, player: Player, *, sessions: int, comparable: bool) -> int:
    """Many sessions at once; how many there were places for.

    Args:
        report: Where findings go.
        player: Of the server.
        sessions: How many are wanted.
        comparable: Whether an episode of a seed is always the same, so that sharing would show.
    """
    async with AsyncExitStack() as stack:
        opened = await asyncio.gather(*(entered(player, stack, seed) for seed in range(sessions)))
        live = [socket for socket in opened if socket is not None]
        few: Outcome = "ok" if len(live) == sessions else "warning" if len(live) > 1 else "error"
        report.add(
            "sessions", "concurrency", few, f"{len(live)} of {sessions} sessions at once",
            "let the server have more: create_app(…, max_concurrent_envs=64), and on the class "
            "SUPPORTS_CONCURRENT_SESSIONS = True; a group of siblings plays at once",
        )  # fmt: skip
        if len(live) < 2 or not comparable:
            report.add("isolation", "concurrency", "skipped", "nothing to compare")
            return len(live)
        together = await asyncio.gather(
            *(player.episode(socket, seed, steps=STEPS) for seed, socket in enumerate(live))
        )
    mixed = []
    async with player.session() as socket:
        for seed, episode in enumerate(together):
            if await player.episode(socket, seed, steps=STEPS) != episode:
                mixed.append(seed)
    report.add(
        "isolation", "concurrency", "error" if mixed else "ok",
        f"{len(together) - len(mixed)} of {len(together)} episodes went as they go alone"
        + (f"; not those of seeds {short(mixed)}" if mixed else ""),
        "keep state in the instance: no globals, no class attributes, no shared generator",
    )  # fmt: skip
    return len(live)


def difference(one: list[str], other: list[str]) -> str:
    """Where two episodes part, in words."""
    if one == other:
        return f"the same {len(one)} answers"
    for step, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return f"{'the reset' if step == 0 else f'step {step}'} differs: {short(left)} and {short(right)}"
    return f"one ends after {len(one)} answers, the other after {len(other)}"


async def entered(player: Player, stack: AsyncExitStack, seed: int) -> EnvSocket | None:
    """A session that has begun an episode; None where there is no place."""
    try:
        socket = await stack.enter_async_context(player.session(patient=False))
        reply = await player.reset(socket, seed)
    except EnvError:
        return None
    return None if reply.get("type") == "error" else socket


async def check_leaks(report: Report, player: Player, *, places: int) -> None:
    """Clients that vanish give their places back.

    Args:
        report: Where findings go.
        player: Of the server.
        places: How many sessions it has at once.
    """
    for _ in range(DROPS):
        async with AsyncExitStack() as stack:
            opened = await asyncio.gather(*(entered(player, stack, seed) for seed in range(places)))
            for socket in opened:
                if socket is not None:
                    socket.abort()
        # A server learns of it in its own time; what counts is that it does.
    began = time.monotonic()
    free = 0
    while free < places and time.monotonic() - began < player.seconds:
        async with AsyncExitStack() as stack:
            opened = await asyncio.gather(*(entered(player, stack, seed) for seed in range(places)))
            free = sum(socket is not None for socket in opened)
    report.add(
        "dropped", "leaks", "ok" if free == places else "error",
        f"{free} of {places} places were free again {time.monotonic() - began:.1f} s after {DROPS * places} "
        "clients vanished",
        "end a session when its socket is lost, also without a close frame",
    )  # fmt: skip
    async with player.session() as socket:
        reply = await player.reset(socket, 0)
        report.add(
            "after_all", "leaks", "error" if reply.get("type") == "error" else "ok",
            f"a reset after all that: {reply.get('type')}", "the server is not what it was before",
        )  # fmt: skip
