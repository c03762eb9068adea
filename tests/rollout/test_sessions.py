"""The pool of live environments: what died is not used again, and what is old is replaced."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from tests.support.casino import ApartCasino, Casino

from turnwise.envs.registry import make
from turnwise.rollout.sessions import SessionPool


def pool(env_class: type, **options: int) -> SessionPool:
    spec = make(env_class, name="casino")
    return SessionPool(spec, spec.limits, **options)


def test_an_environment_that_died_while_nobody_used_it_is_replaced():
    async def main():
        sessions = pool(ApartCasino)
        first = await sessions.acquire()
        await first.reset({}, 0)
        sessions.release(first, healthy=True)
        # What a policy left behind may end the process long after its episode.
        os.kill(first._child.pid, signal.SIGKILL)
        while first.alive:
            await asyncio.sleep(0.01)
        second = await sessions.acquire()
        assert second is not first and second.alive
        assert await second.reset({}, 0)
        sessions.release(second, healthy=True)
        assert await sessions.acquire() is second
        sessions.release(second, healthy=True)
        await sessions.aclose()
        assert not second.alive

    asyncio.run(main())


@pytest.mark.parametrize("reuse", [1, 3])
def test_an_environment_is_replaced_after_so_many_episodes(reuse):
    async def main():
        sessions = pool(Casino, reuse=reuse)
        used = []
        for _ in range(2 * reuse):
            session = await sessions.acquire()
            await session.reset({}, 0)
            used.append(session)
            sessions.release(session, healthy=True)
        await sessions.aclose()
        return used

    used = asyncio.run(main())
    assert [session is used[0] for session in used] == [True] * reuse + [False] * reuse
    assert not any(session.alive for session in used)
