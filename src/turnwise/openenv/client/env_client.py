"""`EnvClient`: a typed client of one environment, as those written for OpenEnv are.

A subclass says how its action is written and how its observation and its state are read; it ports from
``openenv.core`` by a changed import.

    from turnwise.openenv import EnvClient, State, StepResult

    class Connect4(EnvClient[Drop, Board, State]):
        def _step_payload(self, action): return {"column": action.column}
        def _parse_result(self, payload): ...
        def _parse_state(self, payload): return State(**payload)

    async with Connect4("http://127.0.0.1:8000") as env:
        result = await env.reset(seed=3)
    with Connect4("http://127.0.0.1:8000").sync() as env:
        result = env.reset(seed=3)
    env = await Connect4.from_docker_image("connect4-env:latest", platform="linux/amd64")

What differs from ``openenv.core`` 0.3.0: a reply that comes after its deadline is dropped, not given to the
next call; a lost connection is made anew by the next `reset`; a full server is waited for; ``metadata``
beside the observation reaches `StepResult.metadata`; what was started for a client ends also if that fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, NoReturn, Self, TypeVar

from turnwise.errors import ActionError, EnvError, EnvHungError, EnvLostError, EnvSpecError
from turnwise.openenv.client.address import address, bearer
from turnwise.openenv.client.forgotten import when_forgotten
from turnwise.openenv.client.line import code_of, message_of
from turnwise.openenv.client.socket import EnvSocket, RefusedError, websocket_url
from turnwise.openenv.client.sync import SyncEnvClient
from turnwise.openenv.models import StepResult
from turnwise.openenv.run.launch import run_image, run_space_here, run_space_image
from turnwise.openenv.run.provider import ContainerProvider, Provider, stop

ActT = TypeVar("ActT")
ObsT = TypeVar("ObsT")
StateT = TypeVar("StateT")

BACKOFF_SECONDS = (0.1, 2.0)
"""Between two tries for a place on a server that is full: the first pause, doubled up to the second."""
READY_SECONDS = 60.0


class ServerError(EnvError, RuntimeError):
    """The server answered with an error; ``code`` is OpenEnv's, such as ``EXECUTION_ERROR``."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class ConnectError(EnvLostError, ConnectionError):
    """There is no connection, or no longer."""


class ReplyTimeoutError(EnvHungError, TimeoutError):
    """The server did not answer in time."""


class EnvClient(ABC, Generic[ActT, ObsT, StateT]):
    """One session of an OpenEnv server. Calls are made one after another, from one event loop.

    Args:
        base_url: ``http(s)://`` or ``ws(s)://``, with a user and password perhaps; without a scheme,
            ``http://``.
        connect_timeout_s: Seconds to wait for the connection.
        message_timeout_s: Seconds to wait for a reply, and for a place on a server that is full.
        max_message_size_mb: MiB of one message from the server; a longer one ends the connection.
        provider: What runs the server; it is stopped when the client is closed.
        mode: ``simulation`` or ``production``, for subclasses that look at ``_mode``; None is what
            ``OPENENV_CLIENT_MODE`` says, or ``simulation``.
        token: Sent as ``Authorization: Bearer``.
    """

    def __init__(
        self,
        base_url: str,
        connect_timeout_s: float = 10.0,
        message_timeout_s: float = 60.0,
        max_message_size_mb: float = 100.0,
        provider: Provider | None = None,
        mode: str | None = None,
        *,
        token: str | None = None,
    ) -> None:
        self._url, self._headers = address(base_url, token)
        self._ws_url = websocket_url(self._url)
        self._connect_timeout = connect_timeout_s
        self._message_timeout = message_timeout_s
        self._max_message_bytes = int(max_message_size_mb * 2**20)
        self._mode = (mode or os.environ.get("OPENENV_CLIENT_MODE", "simulation")).lower()
        if self._mode not in ("simulation", "production"):
            raise EnvSpecError(f"mode={self._mode!r}: a client's is 'simulation' or 'production'")
        self._provider = provider
        self._socket: EnvSocket | None = None
        self._keep: Callable[[], object] | None = None
        """Has the connection not closed with this object."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = asyncio.Lock()
        self._begun = False
        """Something was answered on this connection, which a new one would know nothing of."""

    # -- what a subclass says ------------------------------------------------------------------------

    @abstractmethod
    def _step_payload(self, action: ActT) -> dict[str, Any]:
        """The action's fields, as JSON values."""

    @abstractmethod
    def _parse_result(self, payload: dict[str, Any]) -> StepResult[ObsT]:
        """What ``{"observation": {…}, "reward": …, "done": …}`` says."""

    @abstractmethod
    def _parse_state(self, payload: dict[str, Any]) -> StateT:
        """What the state's fields say."""

    # -- playing -------------------------------------------------------------------------------------

    async def reset(self, **kwargs: Any) -> StepResult[ObsT]:
        """Start an episode.

        Args:
            **kwargs: What the environment takes: ``seed``, ``episode_id`` and its own.

        Raises:
            ServerError: It could not.
            ConnectError, ReplyTimeoutError: Nobody answers, or not in time.
        """
        if self._socket is not None and not self._socket.usable:
            await self.disconnect()  # lost, or with a reply outstanding: that session is of no more use
        return self._result(await self._ask({"type": "reset", "data": kwargs}))

    async def step(self, action: ActT, **kwargs: Any) -> StepResult[ObsT]:
        """Act.

        Args:
            action: As `_step_payload` takes it.
            **kwargs: As ``openenv.core`` takes them, which does not send them: there is a warning instead.

        Raises:
            ServerError: The environment does not take the action, or it raised.
            ConnectError: The connection went, and the episode with it; `reset` starts another.
            ReplyTimeoutError: No answer in time.
        """
        if kwargs:
            names = ", ".join(kwargs)
            warnings.warn(
                f"step() got {names}, which is not sent: put it into the action's fields", stacklevel=2
            )
        return self._result(await self._ask({"type": "step", "data": self._step_payload(action)}))

    async def state(self) -> StateT:
        """The environment's state.

        Raises:
            ServerError, ConnectError, ReplyTimeoutError: As for `step`.
        """
        return self._parse_state(await self._ask({"type": "state"}))

    def _result(self, data: dict[str, Any]) -> StepResult[ObsT]:
        result = self._parse_result(data)
        if isinstance(result, StepResult) and not result.metadata:
            result.metadata = data.get("metadata") or {}
        return result

    # -- the connection ------------------------------------------------------------------------------

    async def connect(self) -> Self:
        """Connect, where that was not done yet.

        Raises:
            ConnectError: Nobody answers there.
            EnvSpecError: It was connected from another event loop.
        """
        async with self._connecting:  # two first calls at once are of one session
            return await self._connected()

    async def _connected(self) -> Self:
        loop = asyncio.get_running_loop()
        if self._socket is not None:
            if self._loop is not loop:
                raise EnvSpecError(
                    f"the client of {self._url} is connected from another event loop; use it there, or make "
                    "another client here (`.sync()` has a loop of its own: connect through it from the start)"
                )
            return self
        try:
            self._socket = await EnvSocket.open(
                self._url,
                seconds=self._connect_timeout,
                headers=self._headers,
                max_bytes=self._max_message_bytes,
            )
        except RefusedError as error:
            raise ConnectError(str(error)) from error
        except EnvLostError as error:
            raise ConnectError(
                f"{error}; is the server running? `turnwise env validate {self._url}` looks closer"
            ) from error
        self._keep = when_forgotten(self, self._socket)
        self._loop = loop
        return self

    async def disconnect(self) -> None:
        """Close the session; the server that was started for this client stays."""
        socket, self._socket = self._socket, None
        self._begun = False
        if self._keep is not None:
            self._keep()
            self._keep = None
        if socket is None or self._loop is None:
            return
        if self._loop is asyncio.get_running_loop():
            await socket.close()
        elif self._loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(socket.close(), self._loop))

    async def close(self) -> None:
        """Close the session, and stop what was started for this client. May be called twice."""
        try:
            await self.disconnect()
        finally:
            provider, self._provider = self._provider, None
            if provider is not None:
                await asyncio.shield(asyncio.to_thread(stop, provider))

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request; the ``data`` of its reply."""
        deadline = time.monotonic() + self._message_timeout
        pause, longest = BACKOFF_SECONDS
        while True:
            reply = await self._send_and_receive(message)
            if code_of(reply) != "CAPACITY_REACHED":
                break
            await self.disconnect()
            if time.monotonic() + pause > deadline:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
        if reply.get("type") == "error":
            raise self._refused(reply)
        data = reply.get("data")
        if not isinstance(data, dict):
            what = f"{self._url}: a {message['type']} was answered without data: {reply}"
            raise ServerError(what, "NO_DATA")
        self._begun = True
        return data

    async def _send_and_receive(self, message: dict[str, Any]) -> dict[str, Any]:
        """One request and its reply, an ``error`` frame perhaps."""
        socket = self._socket
        if socket is not None and not (socket.is_open or socket.notice or self._begun):
            await self.disconnect()  # one that was lost before it was used costs nothing
        await self.connect()
        socket = self._socket
        assert socket is not None  # connected just now
        try:
            return await self._sent(socket, message)
        except EnvHungError as error:
            raise ReplyTimeoutError(
                f"{error}; a slower environment needs a larger message_timeout_s (a late reply is dropped)"
            ) from error
        except EnvLostError as error:
            if socket.notice is not None and not self._begun:
                return socket.notice  # it said why before it was asked
            raise ConnectError(f"{error}; the episode is lost with it: reset() connects anew") from error

    async def _sent(self, socket: EnvSocket, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return await socket.ask(message, seconds=self._message_timeout)
        except TypeError:  # numbers as keys, and the like, which Python's own writer takes
            return await socket.ask(jsonable(message), seconds=self._message_timeout)

    def _refused(self, reply: Mapping[str, Any]) -> ServerError:
        code = code_of(reply) or "UNKNOWN"
        advice = {
            "CAPACITY_REACHED": f"; no place was free for {self._message_timeout:g} s: close sessions, or "
            "let the server have more (max_concurrent_envs)",
            "VALIDATION_ERROR": "; GET /schema says what an action is",
        }.get(code, "")
        return ServerError(f"Server error: {message_of(reply)} (code: {code}){advice}", code)

    # -- faces ---------------------------------------------------------------------------------------

    def sync(self) -> SyncEnvClient[ActT, ObsT, StateT]:
        """The same without ``await``, on an event loop in the background."""
        return SyncEnvClient(self)

    async def __aenter__(self) -> Self:
        try:
            return await self.connect()
        except BaseException:
            await self.close()  # what was started for this client has nobody else to stop it
            raise

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __enter__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is async: `async with client:`, or `with client.sync():` without await"
        )

    def __exit__(self, *exc_info: object) -> None: ...

    # -- ways to run one -----------------------------------------------------------------------------

    @classmethod
    async def from_docker_image(
        cls,
        image: str,
        provider: ContainerProvider | None = None,
        *,
        wait_timeout: float = READY_SECONDS,
        **start: Any,
    ) -> Self:
        """Run an image and be its client; it connects when it is first used.

        Args:
            image: Such as ``echo-env:latest``.
            provider: None is `turnwise.openenv.run.LocalDockerProvider`.
            wait_timeout: Seconds that the server may take to get ready.
            **start: As its ``start_container`` takes: ``port``, ``env_vars``, ``platform``, ``docker_args``.

        Raises:
            StartError: It did not get ready; no container is left.
        """
        return cls(**await run_image(image, provider, wait_timeout, start))

    @classmethod
    async def from_env(
        cls,
        repo_id: str,
        *,
        use_docker: bool = True,
        provider: Provider | None = None,
        wait_timeout: float = READY_SECONDS,
        **options: Any,
    ) -> Self:
        """Run a Hugging Face Space on this machine and be its client.

        Args:
            repo_id: ``org/name``.
            use_docker: From its image in the registry of Spaces; else downloaded, in a venv of its own.
            provider: A container provider with ``use_docker``, else a runtime provider.
            wait_timeout: Seconds that the server may take to get ready.
            **options: With Docker ``tag``, and as ``start_container`` takes. Without, ``port``, ``env_vars``
                and as `turnwise.openenv.run.SpaceProvider` takes: ``project_path`` for a folder in place of
                the Space, ``app``, ``revision``, ``token``.

        Raises:
            StartError: It did not get ready; nothing of it is left running.
        """
        run_space = run_space_image if use_docker else run_space_here
        return cls(**await run_space(repo_id, provider, wait_timeout, options))

    @classmethod
    async def from_hub(cls, repo_id: str, *, token: str | None = None) -> Self:
        """The client of a Space that runs on Hugging Face; many may use it at the same time.

        Args:
            repo_id: ``org/name``.
            token: For a private Space, whose address and sessions it opens.

        Raises:
            EnvLostError: There is no such Space, or it is paused.
        """
        from turnwise.openenv.run.space import space_url

        client = cls(base_url=await asyncio.to_thread(space_url, repo_id, token=token))
        client._headers = bearer(token)  # a subclass's constructor may know no token
        return client


def jsonable(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the socket takes it: keys that are numbers become text, as Python's own writer has them.

    Raises:
        ActionError: Something in it is not JSON.
    """
    try:
        return dict(json.loads(json.dumps(message)))
    except (TypeError, ValueError) as error:
        raise ActionError(f"what is to be sent is not JSON: {error}; see `_step_payload`") from error
