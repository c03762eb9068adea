"""`RemoteSession`: a `Session` whose environment lives on an OpenEnv server; one connection each.

Calls are checked here against the tools' schemas and refused in the words that any environment uses; what the
server then says is an observation where the action caused it, and an error where nothing that a policy does
could have:

    EXECUTION_ERROR on a step                      the environment raised: the policy is told
    VALIDATION_ERROR on a step                     the action was refused: the policy is told
    no answer within ``call_seconds``              EnvHungError; the next episode gets a fresh connection
    ... and none to a ping then                    EnvLostError: the network or the server, not the call
    SESSION_ERROR, FACTORY_ERROR, a lost socket    EnvLostError: the episode is left out

A Turnwise server's sessions are `turnwise.openenv.client.peer`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from turnwise import errors
from turnwise.envs import observe
from turnwise.envs.opening import opening
from turnwise.envs.session import Limits
from turnwise.envs.tools import told_malformed, told_unknown
from turnwise.envs.validate import ArgumentsError, check_arguments
from turnwise.errors import EnvError, EnvHungError, EnvLostError, ScoringError
from turnwise.openenv.client.balance import Servers, servers
from turnwise.openenv.client.discovery import About, mcp_tools, told
from turnwise.openenv.client.forgotten import when_forgotten
from turnwise.openenv.client.line import Reply, code_of
from turnwise.openenv.client.observation import Reader, tool_result
from turnwise.openenv.client.options import Options
from turnwise.openenv.client.socket import EnvSocket
from turnwise.types import Content, Message, Step, Task, ToolCall, ToolResult, ToolSchema

QUEUE_SECONDS = 60.0
"""A server may keep who opens a session waiting for a place, a Turnwise one for 50 s."""
PONG_SECONDS = 3.0
"""For a ping's answer, once a call has none: a hanging environment leaves the server's event loop free."""
_ERRORS = {
    "invalid_args": "bad_arguments", "tool_not_found": "unknown_tool", "timeout": "timeout",
}  # fmt: skip
"""OpenEnv's names of tool errors; every other means that the tool raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What the sessions of one environment share."""

    name: str
    about: About
    options: Options
    urls: tuple[str, ...]
    seen: tuple[str, ...]
    """Those that answered when this was made, and were alike."""
    headers: Mapping[str, str]
    prompts: bool
    """Rows hold a ``prompt``, which stands before what the environment says."""

    @property
    def servers(self) -> Servers:
        """Shared with other environments at the same addresses, on the running loop."""
        return servers(self.urls, self.headers, self.about.identity, self.seen)

    @property
    def tools(self) -> tuple[ToolSchema, ...]:
        """Those that are known without an episode."""
        if self.options.reply is not None:
            return ()
        return (*self.about.tools, *(one.schema for one in self.about.typed))


class RemoteSession:
    """An environment on a server that is not Turnwise's."""

    margin = 0.0
    """Seconds beyond ``call_seconds`` for a server that keeps that deadline itself, and tells."""

    def __init__(self, remote: Remote, limits: Limits) -> None:
        self.system = remote.options.system if remote.about.system is None else remote.about.system
        self.has_step = remote.about.has_step or remote.options.reply is not None
        self.tools: tuple[ToolSchema, ...] = ()
        self._schemas: dict[str, ToolSchema] = {}
        self._remote, self._limits = remote, limits
        self._socket: EnvSocket | None = None
        self._keep: Callable[[], object] | None = None
        """Has its connection not closed with this object."""
        self._closed = False
        self._rpc = 0
        self._reader = Reader(
            remote.options.shown, cumulative=remote.options.cumulative, what=f"environment {remote.name}"
        )
        self._offer(remote.tools)

    async def connect(self) -> None:
        """Get a connection, and a live environment behind it.

        Raises:
            EnvError: As for `turnwise.openenv.client.balance.Servers.open`.
        """
        servers = self._remote.servers
        if (old := self.give_up()) is not None:
            servers.release(old)
        self._socket = await servers.open(
            max(QUEUE_SECONDS, self._limits.call_seconds),
            patience=self._remote.options.patience,
            what=f"environment {self._remote.name}",
        )
        self._keep = when_forgotten(self, self._socket, servers.release)

    def give_up(self) -> EnvSocket | None:
        """Leave the connection to another session."""
        socket, self._socket = self._socket, None
        if self._keep is not None:
            self._keep()
            self._keep = None
        return socket

    # -- the session protocol ------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the next reply would be the next request's: connected, and nothing outstanding."""
        return self._socket is not None and self._socket.usable and not self._closed

    @property
    def instance(self) -> None:
        """The author's object lives on the server."""
        return None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start an episode, on a fresh connection where this one is of no more use."""
        what = self._what("reset")
        self._remote.servers.wake(self)
        fresh = not self.alive
        if fresh:
            await self.connect()
        asked = self._reset_data(task, seed)
        try:
            reply = await self._ask("reset", asked)
        except EnvLostError:
            if fresh:
                raise
            # It may have gone while nobody used it: nothing was begun on it yet.
            await self.connect()
            reply = await self._ask("reset", asked)
        if reply["type"] == "error":
            raise failure(reply, what)
        data = _data(reply, what)
        messages = await self._begun(data, what)
        if data.get("done"):
            raise EnvError(f"{what}: the episode is over before it began")
        if not self._remote.prompts:
            return messages
        seen: Content | list[Message] = list(messages) if len(messages) > 1 else messages[0].content
        return observe.messages(opening(task.get("prompt"), seen), what)

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one tool call; what the policy or the environment did wrong is in the result."""
        started = perf_counter()
        if call.error is not None:
            return self._result(call, told_malformed(call, self._schemas), "malformed")
        schema = self._schemas.get(call.name)
        if schema is None:
            return self._result(call, told_unknown(call.name, self._schemas), "unknown_tool")
        try:
            checked = check_arguments(call.arguments, schema)
        except ArgumentsError as wrong:
            return self._result(call, str(wrong), "bad_arguments")
        what = self._what(f"tool {call.name}")
        content, error, step = await self._called(call.name, checked.arguments, what)
        return self._result(call, content, error, step=step, coerced=checked.coerced, started=started)

    async def step(self, reply: Message) -> Step:
        """Answer a reply: its text goes into the action's field that ``args.reply`` names."""
        what, field = self._what("step"), self._remote.options.reply
        assert field is not None, "an environment without `step` is never asked to"
        (typed,) = self._remote.about.typed
        try:
            arguments = check_arguments({field: reply.text}, typed.schema).arguments
        except ArgumentsError as wrong:
            return Step(self._cut(str(wrong)), info={"error": "bad_arguments"})
        answer = await self._ask("step", {**typed.constants, **arguments})
        if answer["type"] == "error":
            kind, message = _blamed(answer, what)
            return Step(self._cut(f"The environment failed: {message}"), info={"error": kind})
        data = _data(answer, what)
        content = self._reader.read(data.get("observation"), self._limits.max_observation)
        return _paid(data, content, what) or Step(content)

    async def reward(self) -> dict[str, float | None]:
        """None: what steps pay is all that OpenEnv knows."""
        self._remote.servers.rest(self)
        return {}

    async def teacher(self, messages: Sequence[Message]) -> Message:
        """There is none."""
        raise EnvError(f"environment {self._remote.name} has no teacher: its server is no Turnwise server")

    async def state_key(self) -> str | None:
        """There is none."""
        return None

    async def state(self) -> dict[str, Any]:
        """What the server says of its state; no rollout asks for it."""
        reply = await self._ask("state", None)
        if reply["type"] == "error":
            raise failure(reply, self._what("state"))
        return dict(_data(reply, self._what("state")))

    async def close(self) -> None:
        """Close the connection, and with it the environment."""
        self._closed = True
        self._remote.servers.wake(self)
        socket = self.give_up()
        if socket is not None:
            await asyncio.shield(self._remote.servers.release(socket))

    # ------------------------------------------------------------------------------------------------

    def _reset_data(self, task: Task, seed: int) -> dict[str, Any]:
        return {"seed": seed, **self._remote.options.reset, **self._row(task)}

    def _row(self, task: Task) -> dict[str, Any]:
        return {key: value for key, value in task.items() if not (self._remote.prompts and key == "prompt")}

    async def _begun(self, data: Mapping[str, Any], what: str) -> tuple[Message, ...]:
        """The first messages of the episode that a reset began."""
        about = self._remote.about
        self._reader.begin()
        content = self._reader.read(data.get("observation"), None)
        if not about.typed and not about.tools:
            # Tools that depend on the episode.
            assert self._socket is not None
            self._offer(await mcp_tools(self._socket, about, self._limits.call_seconds) or ())
        return (Message.user(content or about.description),)

    async def _called(
        self, name: str, arguments: Mapping[str, Any], what: str
    ) -> tuple[Content, str | None, Step | None]:
        """A checked call: what is told, the kind of error, and the step where it paid or ended."""
        about = self._remote.about
        constants = next((one.constants for one in about.typed if one.schema.name == name), None)
        if constants is not None:
            reply = await self._ask("step", {**constants, **arguments})
        elif about.calls == "mcp":
            return await self._called_past_steps(name, arguments, what)
        else:
            reply = await self._ask(
                "step", {"type": "call_tool", "tool_name": name, "arguments": dict(arguments)}
            )
        if reply["type"] == "error":
            kind, message = _blamed(reply, what)
            return f"{name}{' failed' if kind == 'raised' else ''}: {message}", kind, None
        data = _data(reply, what)
        content, error = self._seen(name, data.get("observation"), what)
        return content, error, _paid(data, content, what)

    async def _called_past_steps(
        self, name: str, arguments: Mapping[str, Any], what: str
    ) -> tuple[Content, str | None, None]:
        self._rpc += 1
        params = {"name": name, "arguments": dict(arguments)}
        reply = await self._ask(
            "mcp", {"jsonrpc": "2.0", "id": self._rpc, "method": "tools/call", "params": params}
        )
        if reply["type"] == "error":
            raise failure(reply, what)
        answer = _data(reply, what)
        if answer.get("id") != self._rpc:
            raise EnvLostError(f"{what}: call {self._rpc} was answered as {answer.get('id')!r:.40}")
        if (error := answer.get("error")) is not None:
            return f"{name} failed: {error.get('message')}", "raised", None
        content, failed = self._opened(name, answer.get("result"), what)
        return content, failed, None

    def _seen(self, name: str, observation: Any, what: str) -> tuple[Content, str | None]:
        """What is told of the observation of a call, and the kind of error."""
        if not isinstance(observation, Mapping) or "tool_name" not in observation or self._reader.chooses:
            return self._reader.read(observation, self._limits.max_observation), None
        error = observation.get("error")
        if error is not None:
            kind = _ERRORS.get(error.get("error_type"), "raised")
            return f"{name}{' failed' if kind == 'raised' else ''}: {error.get('message')}", kind
        return self._opened(name, observation.get("result"), what)

    def _opened(self, name: str, result: Any, what: str) -> tuple[Content, str | None]:
        """A tool's result out of the form that MCP gives it."""
        try:
            content = tool_result(result, self._limits.max_observation)
        except observe.BadResultError as cause:
            raise EnvError(f"{what}: it returned {cause}") from cause
        failed = isinstance(result, Mapping) and (result.get("is_error") or result.get("isError"))
        if failed and isinstance(content, str):
            content = f"{name} failed: {content}"
        return content, "raised" if failed else None

    async def _ask(self, kind: str, data: Mapping[str, Any] | None) -> Reply:
        socket = self._socket
        if socket is None or self._closed:
            raise EnvLostError(f"{self._what(kind)}: the session is closed")
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        try:
            return await socket.ask(message, seconds=self._limits.call_seconds + self.margin)
        except EnvHungError as hung:
            if await socket.pings(PONG_SECONDS):
                raise
            raise EnvLostError(f"{hung}, nor to a ping: the network or the server is gone") from hung

    def _result(
        self,
        call: ToolCall,
        content: Content,
        error: Any,
        *,
        step: Step | None = None,
        coerced: int = 0,
        started: float | None = None,
    ) -> ToolResult:
        return ToolResult(
            call=call,
            content=self._cut(content) if error is not None and isinstance(content, str) else content,
            error=error,
            step=step,
            coerced=coerced,
            seconds=0.0 if started is None else perf_counter() - started,
        )

    def _offer(self, tools: tuple[ToolSchema, ...]) -> None:
        self.tools, self._schemas = tools, {tool.name: tool for tool in tools}

    def _cut(self, text: str) -> str:
        return observe.cut(text, self._limits.max_observation)

    def _what(self, phase: str) -> str:
        return f"environment {self._remote.name}: {phase}"


def failure(reply: Reply, what: str) -> EnvError | ScoringError:
    """The error that an error frame stands for; a Turnwise server's keep their class."""
    data = reply.get("data")
    code, kind = (data.get("code"), data.get("kind")) if isinstance(data, Mapping) else (None, None)
    if code in ("SESSION_ERROR", "FACTORY_ERROR", "CAPACITY_REACHED"):
        return EnvLostError(f"{what}: {told(reply)}")
    raised = getattr(errors, kind, None) if isinstance(kind, str) else None
    if isinstance(raised, type) and issubclass(raised, EnvError | ScoringError):
        return raised(told(reply))
    return EnvError(f"{what}: {told(reply)}")


def _blamed(reply: Reply, what: str) -> tuple[str, str]:
    """The kind of an error that the action caused, and what the server said.

    Raises:
        EnvError: It did not.
    """
    code = code_of(reply)
    if code == "EXECUTION_ERROR":
        return "raised", told(reply)
    if code == "VALIDATION_ERROR":
        return "bad_arguments", told(reply)
    raise failure(reply, what)


def _data(reply: Reply, what: str) -> Mapping[str, Any]:
    data = reply.get("data")
    if not isinstance(data, Mapping):
        raise EnvError(f"{what}: the server answered without data")
    return data


def _paid(data: Mapping[str, Any], content: Content, what: str) -> Step | None:
    """The step of an answer that paid or ended; None for one that did neither."""
    reward, done = data.get("reward"), bool(data.get("done"))
    if reward is None and not done:
        return None
    metadata = data.get("metadata")
    truncated = done and isinstance(metadata, Mapping) and bool(metadata.get("truncated"))
    return Step(
        content,
        reward=None if reward is None else observe.finite(reward, f"{what}: reward"),
        terminated=done and not truncated,
        truncated=truncated,
    )
