"""`Player`: plays episodes on a server as a client does that knows its schemas alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from turnwise.errors import EnvLostError
from turnwise.openenv.client.socket import EnvSocket
from turnwise.openenv.validate.sample import sample

Reply = dict[str, Any]
ERROR = "error "
NOTICE_SECONDS = 0.05
"""How soon a server says that it is full."""


@dataclass(slots=True, kw_only=True)
class Player:
    """How to reach a server, and what may be done there."""

    url: str
    """``http://…``, without a slash at its end."""
    seconds: float
    """For each answer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """``{"Authorization": "Bearer …"}``, where it asks for a token."""
    action: Mapping[str, Any] | None = None
    """The one that is always taken; None samples the schemas."""
    schema: Mapping[str, Any] = field(default_factory=dict)
    """Of actions, from ``GET /schema``."""
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    """``{"name", "input_schema"}``; where there are some, actions are calls of them."""

    @asynccontextmanager
    async def session(self, *, patient: bool = True) -> AsyncIterator[EnvSocket]:
        """A connection; closed afterwards.

        Args:
            patient: Wait until a full server has a place, as it has soon after a session is closed.

        Raises:
            EnvLostError: There is none to be had.
        """
        deadline = time.monotonic() + self.seconds
        while True:
            socket = await EnvSocket.open(self.url, seconds=self.seconds, headers=self.headers)
            if not patient:
                break
            await asyncio.sleep(NOTICE_SECONDS)
            if socket.notice is None or time.monotonic() > deadline:
                break
            await socket.close()
        try:
            yield socket
        finally:
            await socket.close()

    async def ask(self, socket: EnvSocket, kind: str, data: Any = None) -> Reply:
        """One request; the reply, an error frame perhaps.

        Raises:
            EnvLostError, EnvHungError: No reply.
        """
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        try:
            return await socket.ask(message, seconds=self.seconds)
        except EnvLostError:
            if socket.notice is not None:
                return socket.notice
            raise

    async def reset(self, socket: EnvSocket, seed: int) -> Reply:
        """Start an episode."""
        return await self.ask(socket, "reset", {"seed": seed})

    def actions(self, seed: int, count: int) -> list[dict[str, Any]]:
        """The same ones for the same seed."""
        rng = random.Random(seed)
        return [self._action(rng) for _ in range(count)]

    def _action(self, rng: random.Random) -> dict[str, Any]:
        if self.action is not None:
            return dict(self.action)
        if self.tools:
            tool = rng.choice(self.tools)
            arguments = sample(tool["input_schema"], rng) or {}
            return {"type": "call_tool", "tool_name": tool["name"], "arguments": arguments}
        made = sample(self.schema, rng)
        return made if isinstance(made, dict) else {}

    async def episode(
        self, socket: EnvSocket, seed: int, *, steps: int, moves: int | None = None
    ) -> list[str]:
        """What is seen of an episode: each answer's observation, reward and end, comparable as text.

        Args:
            socket: The session.
            seed: Of the episode.
            steps: How many actions at most.
            moves: The seed of the actions; None is the episode's.
        """
        seen = [shown(await self.reset(socket, seed))]
        for action in self.actions(seed if moves is None else moves, steps):
            reply = await self.ask(socket, "step", action)
            seen.append(shown(reply))
            if reply.get("type") == "error" or data_of(reply).get("done"):
                break
        return seen


def data_of(reply: Reply) -> dict[str, Any]:
    """A reply's data."""
    data = reply.get("data")
    return data if isinstance(data, dict) else {}


def shown(reply: Reply) -> str:
    """What a policy could see of a reply, as text; ids and times, which always differ, are left out."""
    data = data_of(reply)
    if reply.get("type") == "error":
        return f"{ERROR}{data.get('code')}"
    seen = {name: data.get(name) for name in ("observation", "reward", "done")}
    return json.dumps(_without_ids(seen), sort_keys=True)


def failed(seen: str) -> bool:
    """Whether what was `shown` is an error frame."""
    return seen.startswith(ERROR)


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        skipped = ("episode_id", "session_id", "request_id", "timestamp", "metadata")
        return {name: _without_ids(item) for name, item in value.items() if name not in skipped}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value
