"""`connect`: play on a server by hand, from async code or, with ``.sync()``, from a notebook.

with turnwise.connect("http://127.0.0.1:8000").sync() as env:
    print(env.reset(seed=3))
    print(env.call_tool("guess", number=7))
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from turnwise.errors import ActionError, EnvLostError, EnvSpecError
from turnwise.openenv.client import background
from turnwise.openenv.client.remote import RemoteSpec, discover
from turnwise.openenv.client.session import RemoteSession
from turnwise.openenv.client.socket import base_url
from turnwise.types import Message, Step, Task, ToolCall, ToolSchema


def connect(url: str | Sequence[str], /, **args: Any) -> Connection:
    """One live environment on an OpenEnv server, or on the least busy of several that are alike.

    Nothing is connected yet: that is done by ``async with``, `Connection.open`, or the first call.

    Args:
        url: ``http://host:port``, a Space's page; or a list of them.
        **args: `turnwise.openenv.client.options.Options`: ``show="board"``, ``token="$HF_TOKEN"``.

    Raises:
        EnvSpecError: That is no address.
    """
    return Connection(url, args)


class Connection:
    """An environment on a server; made by `connect`. What a call is answered with is a `Step`."""

    def __init__(self, url: str | Sequence[str], args: Mapping[str, Any]) -> None:
        for one in [url] if isinstance(url, str) else url:
            base_url(one)
        self.url = url
        self.args = dict(args)
        self._spec: RemoteSpec | None = None
        self._session: RemoteSession | None = None
        self._playing = False
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Where it is connected."""

    def __repr__(self) -> str:
        state = "not connected" if self._session is None else f"tools: {[one.name for one in self.tools]}"
        return f"<turnwise.connect({self.url!r}), {state}>"

    @property
    def tools(self) -> tuple[ToolSchema, ...]:
        """The tools; none before it is connected."""
        return self._session.tools if self._session is not None else ()

    @property
    def system(self) -> str | None:
        """The environment's system message."""
        return self._session.system if self._session is not None else None

    def sync(self) -> SyncConnection:
        """The same without ``await``."""
        return SyncConnection(self)

    async def open(self) -> Self:
        """Connect; calls do so by themselves.

        Raises:
            EnvSpecError, EnvLostError: No server answers, or none takes this client, or it is connected from
                another event loop.
        """
        self._on_its_loop()
        async with self._opening:  # Two first calls at once share one session.
            if self._spec is None:
                self._spec = await discover(self.url, None, self.args)
            if self._session is None:
                session = await self._spec.open(self._spec.limits)
                assert isinstance(session, RemoteSession)
                self._session, self._loop = session, asyncio.get_running_loop()
        return self

    def _on_its_loop(self) -> None:
        if self._session is not None and self._loop is not asyncio.get_running_loop():
            raise EnvSpecError(
                f"the connection to {self.url} is another event loop's; use it there, or make another here "
                "(`.sync()` has a loop of its own)"
            )

    async def reset(self, task: Task | None = None, /, *, seed: int | None = None, **row: Any) -> Step:
        """Start an episode; its first message, or messages, are the observation.

        Args:
            task: A row of `tasks`.
            seed: Drawn if not given.
            **row: Columns of the row, or what else the server's reset takes.
        """
        session = await self._open()
        self._playing = False
        chosen = random.getrandbits(31) if seed is None else seed
        messages = await session.reset({**(task or {}), **row}, chosen)
        self._playing = True
        plain = len(messages) == 1 and messages[0] == Message.user(messages[0].content)
        return Step(messages[0].content if plain else list(messages))

    async def call_tool(self, name: str, /, **arguments: Any) -> Step:
        """Call a tool. What it said of its own failure is the observation, the kind in ``info["error"]``.

        Raises:
            ActionError: There is no such tool, or it takes other arguments; nothing was done.
        """
        session = self._live()
        result = await session.call(ToolCall(name=name, arguments=arguments))
        if result.error in ("unknown_tool", "bad_arguments"):
            raise ActionError(str(result.content))
        info = {} if result.error is None else {"error": result.error}
        return self._ended(result.step or Step(result.content, info=info))

    async def step(self, action: str | Mapping[str, Any], /) -> Step:
        """Reply with text; or act, by the fields of an action, where the server has typed ones.

        Raises:
            ActionError: The environment takes tool calls alone, or other fields; nothing was done.
        """
        session = self._live()
        assert self._spec is not None
        if isinstance(action, Mapping):
            typed = self._spec.remote.about.typed
            if not typed:
                raise ActionError(f"call a tool: {', '.join(tool.name for tool in self.tools) or 'none'}")
            meant = [one for one in typed if one.constants.items() <= action.items()] if typed[1:] else typed
            if len(meant) != 1:
                kinds = " or ".join(str(dict(one.constants)) for one in typed)
                raise ActionError(f"an action holds {kinds}; found {str(dict(action))[:200]}")
            constants = meant[0].constants
            fields = {k: v for k, v in action.items() if not (k in constants and constants[k] == v)}
            return await self.call_tool(meant[0].schema.name, **fields)
        if not session.has_step:
            names = ", ".join(tool.name for tool in self.tools)
            raise ActionError(f"this environment takes no text; call a tool: {names or 'none'}")
        return self._ended(await session.step(Message.assistant(action)))

    async def rewards(self) -> dict[str, float | None]:
        """The environment's own rewards by name; of a Turnwise server, at an episode's end."""
        return await self._live(over=True).reward()

    async def state(self) -> dict[str, Any]:
        """What the server says of its state."""
        return await (await self._open()).state()

    async def tasks(self, split: str = "train") -> list[Task]:
        """The rows of a split."""
        await self._open()
        assert self._spec is not None
        return await asyncio.to_thread(list, self._spec.tasks(split))

    async def close(self) -> None:
        """Close the connection; the next reset opens another."""
        self._on_its_loop()
        session, self._session = self._session, None
        self._playing = False
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> RemoteSession:
        await self.open()
        assert self._session is not None
        return self._session

    def _live(self, *, over: bool = False) -> RemoteSession:
        if self._session is None:
            raise EnvLostError(f"{self.url} is not connected: reset first")
        self._on_its_loop()
        if not (self._playing or over):
            raise ActionError("the episode is over, or not begun: reset first")
        return self._session

    def _ended(self, step: Step) -> Step:
        self._playing = not (step.terminated or step.truncated)
        return step


class SyncConnection:
    """`Connection` without ``await``; its loop runs on a thread, so that it works in a notebook too."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"{self._connection!r}.sync()"

    @property
    def tools(self) -> tuple[ToolSchema, ...]:
        """The tools; none before it is connected."""
        return self._connection.tools

    @property
    def system(self) -> str | None:
        """The environment's system message."""
        return self._connection.system

    def open(self) -> Self:
        """Connect; calls do so by themselves."""
        background.run(self._connection.open())
        return self

    def reset(self, task: Task | None = None, /, *, seed: int | None = None, **row: Any) -> Step:
        """Start an episode; see `Connection.reset`."""
        return background.run(self._connection.reset(task, seed=seed, **row))

    def call_tool(self, name: str, /, **arguments: Any) -> Step:
        """Call a tool; see `Connection.call_tool`."""
        return background.run(self._connection.call_tool(name, **arguments))

    def step(self, action: str | Mapping[str, Any], /) -> Step:
        """Reply with text or act; see `Connection.step`."""
        return background.run(self._connection.step(action))

    def rewards(self) -> dict[str, float | None]:
        """The environment's own rewards; see `Connection.rewards`."""
        return background.run(self._connection.rewards())

    def state(self) -> dict[str, Any]:
        """What the server says of its state."""
        return background.run(self._connection.state())

    def tasks(self, split: str = "train") -> list[Task]:
        """The rows of a split."""
        return background.run(self._connection.tasks(split))

    def close(self) -> None:
        """Close the connection; the next reset opens another."""
        background.run(self._connection.close())

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
