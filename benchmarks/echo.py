"""Environments that say back what was said, for `benchmarks/env_server.py`: what is left is the server.

Beside each stands its like for openenv-core in `benchmarks/echo_openenv.py`.
"""

from turnwise.envs import Env, Step, tool


class Echo(Env):
    """Sync methods, as most environments have: a thread for each session."""

    def reset(self, task):
        return "ready"

    def step(self, reply: str) -> Step:
        return Step(reply, reward=1.0)

    @tool
    def echo(self, message: str) -> str:
        """Say it back."""
        return message


class InlineEcho(Echo):
    """The same methods, declared never to block."""

    inline = True


class AsyncEcho(Env):
    """Async methods: the event loop's own."""

    async def reset(self, task):
        return "ready"

    async def step(self, reply: str) -> Step:
        return Step(reply, reward=1.0)
