"""`ProcessEnv`: a `Session` whose environment lives in a child process, so that anything in it can be killed.

    parent: ProcessEnv ── JSON frames over a socket pair ── child: HostedEnv, inline on the child's loop

The child plays by the same code as an environment here; only the deadline on sync methods is the parent's:
past it the child is killed, with all that it started. JSON and not pickle, because what a policy runs there
should not reach back. A child whose parent is gone exits by itself, even if it hangs.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from pydantic import TypeAdapter

from turnwise import images
from turnwise.envs.contain import CANCEL_SECONDS
from turnwise.envs.host import GRACE_SECONDS, HostedEnv
from turnwise.envs.session import Limits
from turnwise.errors import (
    EnvCrashedError,
    EnvError,
    EnvHungError,
    EnvLostError,
    EnvSpecError,
    ScoringError,
    TurnwiseError,
    UnscoredError,
    message_of,
)
from turnwise.types import ImageBlock, Message, Step, Task, ToolCall, ToolResult, ToolSchema

if TYPE_CHECKING:
    from turnwise.envs.spec import ClassSpec

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""For the child's interpreter and imports, on top of the constructor's deadline."""
MARGIN_SECONDS = CANCEL_SECONDS + 0.5
"""The child stops its own coroutines at the deadline; only after this is it killed."""
DYING_SECONDS = 0.5
"""How long a child that closed its wire may take to exit, so that its exit code can be told."""
MAX_ANSWER = 1 << 29
"""Bytes; what claims to be longer is no answer, but something else that was written to the wire."""
CLOSE_SECONDS = 5.0
"""How long a child may take to exit once nobody talks to it."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from turnwise.envs.process import serve; serve(int(sys.argv[1]))"
)
ERRORS: tuple[type[TurnwiseError], ...] = (
    EnvHungError, UnscoredError, EnvLostError, ScoringError, EnvSpecError, EnvError,
)  # fmt: skip
"""What crosses the wire as itself, most special first."""

_messages = TypeAdapter(tuple[Message, ...])
_message = TypeAdapter(Message)
_step = TypeAdapter(Step)
_tool_call = TypeAdapter(ToolCall)
_tool_result = TypeAdapter(ToolResult)
_tools = TypeAdapter(tuple[ToolSchema, ...])


class ProcessEnv:
    """The parent's end; made by `open`. See `turnwise.envs.session.Session`."""

    def __init__(
        self,
        name: str,
        limits: Limits,
        child: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name = name
        self.tools: tuple[ToolSchema, ...] = ()
        self.system: str | None = None
        self.has_step = False
        self._limits = limits
        self._child = child
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._asked = self._answered = 0
        """Ids of the last request and of the last that was answered."""
        self._size: int | None = None
        """Bytes of the answer whose head was read."""
        self._end: EnvError | None = None
        self._closed = False

    @classmethod
    async def open(cls, spec: ClassSpec, limits: Limits) -> Self:
        """Start a child and construct the environment in it.

        Raises:
            EnvError: The constructor raised.
            EnvHungError: It hung.
            EnvCrashedError: The child died.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # A group of its own, so that what it starts is killed with it.
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        env = cls(spec.name, limits, child, reader, writer)
        try:
            opened = await env._ask(
                "constructor",
                {"open": spec.reference, "name": spec.name, "args": spec.args, "limits": limits},
                seconds=START_SECONDS + limits.call_seconds,
            )
        except BaseException:
            await env.close()
            raise
        env.tools = _tools.validate_python(opened["tools"])
        env.system = opened["system"]
        env.has_step = opened["has_step"]
        return env

    @property
    def alive(self) -> bool:
        """Whether another episode can be played: what a policy left behind may end the child at any time."""
        return self._end is None and not self._closed and self._child.poll() is None

    @property
    def instance(self) -> Any:
        """It lives in the child."""
        return None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start an episode."""
        files = [images.STORE.read(sha256) for sha256 in sorted(images.named_in_json(task))]
        request = {"task": task, "seed": seed, "images": [_text(file) for file in files]}
        return _messages.validate_python(await self._ask("reset", request))

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one tool call; one that hangs is killed, and the environment with it."""
        answer = await self._ask("call", {"call": call}, what=f"tool {call.name}")
        return dataclasses.replace(_tool_result.validate_python(answer), call=call)

    async def step(self, reply: Message) -> Step:
        """The environment's answer to a reply."""
        return _step.validate_python(await self._ask("step", {"reply": reply}))

    async def reward(self) -> dict[str, float | None]:
        """The environment's own rewards, by name."""
        try:
            rewards: dict[str, float | None] = await self._ask("reward", {})
        except EnvHungError as hung:
            raise ScoringError(str(hung)) from hung
        return rewards

    async def teacher(self, messages: Sequence[Message]) -> Message:
        """What the environment's demonstrator says."""
        return _message.validate_python(await self._ask("teacher", {"messages": list(messages)}))

    async def state_key(self) -> str | None:
        """The key of the present state, where the environment defines one."""
        key: str | None = await self._ask("state_key", {})
        return key

    async def close(self) -> None:
        """Close the environment in the child and end the child, by force if need be."""
        if self._closed:
            return
        try:
            if self._end is None:
                # In a call whose caller was cancelled: it may take all its time, and nobody waits for it.
                left = self._answered < self._asked
                await self._ask("close", {}, seconds=GRACE_SECONDS if left else None)
        except TurnwiseError as error:
            log.warning("%s", error)
        finally:
            self._closed = True
            self._writer.close()
            await asyncio.shield(asyncio.to_thread(self._reap, CLOSE_SECONDS))

    async def _ask(
        self, method: str, request: dict[str, Any], *, what: str = "", seconds: float | None = None
    ) -> Any:
        """The child's answer; its errors are raised here."""
        what = f"environment {self.name}: {what or method}"
        if self._end is not None or self._closed:
            raise self._end or EnvLostError(f"{what}: the environment is closed")
        async with self._lock:
            self._asked += 1
            asked = self._asked
            seconds = self._limits.call_seconds + MARGIN_SECONDS if seconds is None else seconds
            try:
                async with asyncio.timeout(seconds):
                    self._writer.write(_frame({"id": asked, "method": method, **request}))
                    await self._writer.drain()
                    answer = await self._answer(asked)
            except TimeoutError:
                log.warning("%s hangs; its process is killed", what)
                limit = self._limits.call_seconds
                self._end = EnvHungError(f"{what}: it did not return within {limit:g} s and was killed")
            except (EOFError, OSError):
                self._end = EnvCrashedError(f"{what}: its process died")
                code = await asyncio.to_thread(self._reap, DYING_SECONDS)
                self._end = EnvCrashedError(f"{what}: its process died ({_exit(code)})")
            except (ValueError, LookupError, TypeError, RecursionError):
                self._end = EnvCrashedError(f"{what}: what its process sent cannot be read; it was killed")
            if self._end is not None:
                await asyncio.to_thread(self._reap, 0)
                raise self._end
        if "error" in answer:
            kinds = {kind.__name__: kind for kind in ERRORS}
            raise kinds[answer["error"]](answer["message"])
        return answer["value"]

    async def _answer(self, asked: int) -> dict[str, Any]:
        while True:
            if self._size is None:  # Else a call was cancelled between an answer's head and its body.
                self._size = int.from_bytes(await self._reader.readexactly(4), "big")
            if self._size > MAX_ANSWER:
                raise ValueError(f"an answer of {self._size} bytes")
            body = await self._reader.readexactly(self._size)
            self._size = None
            answer: dict[str, Any] = json.loads(body)
            if "image" in answer:
                images.receive(base64.b64decode(answer["image"]))
                continue
            # An answer to a call whose caller was cancelled comes late, and is nobody's.
            if answer["id"] == asked:
                self._answered = asked
                return answer

    def _reap(self, seconds: float) -> int:
        """Wait for the child, then kill its whole group."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
        with suppress(ProcessLookupError, PermissionError):  # Nothing of the group is left.
            os.killpg(self._child.pid, signal.SIGKILL)
        return self._child.wait()


# ---------------------------------------------------------------------------------------------------
# The child's end


def serve(descriptor: int) -> None:
    """The child's life: answer requests from the socket until it closes."""
    # OSError: the wire is closed at either end, and nobody is left to be told.
    with suppress(OSError), socket.socket(fileno=descriptor) as wire:
        asyncio.run(_serve(wire))
    # Not by returning: a thread that some tool left behind must not keep the child alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _serve(wire: socket.socket) -> None:
    inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    threading.Thread(target=_listen, args=(wire, inbox, asyncio.get_running_loop()), daemon=True).start()
    env: HostedEnv | None = None
    shown: set[str] = set()
    while (request := await inbox.get()) is not None:
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            if request["method"] == "constructor":
                env = await _open(request)
                answer["value"] = {"tools": env.tools, "system": env.system, "has_step": env.has_step}
            elif env is not None:
                answer["value"] = await _perform(env, request)
            else:
                assert request["method"] == "close", "the constructor failed: there is nothing else to ask"
                answer["value"] = None
        except TurnwiseError as error:
            kind = next((kind for kind in ERRORS if isinstance(error, kind)), EnvError)
            answer |= {"error": kind.__name__, "message": message_of(error)}
        # What an answer names comes before it, each file once.
        for sha256 in sorted(_named_in(answer.get("value")) - shown):
            wire.sendall(_frame({"id": request["id"], "image": _text(images.STORE.read(sha256))}))
            shown.add(sha256)
        wire.sendall(_frame(answer))
    if env is not None:
        await env.close()


async def _open(request: dict[str, Any]) -> HostedEnv:
    from turnwise.envs.registry import make
    from turnwise.envs.spec import ClassSpec

    spec = make(request["open"], name=request["name"], args=request["args"])
    assert isinstance(spec, ClassSpec)
    return await spec.open_here(Limits(**request["limits"]))


async def _perform(env: HostedEnv, request: dict[str, Any]) -> Any:
    method = request["method"]
    if method == "reset":
        for file in request["images"]:
            images.receive(base64.b64decode(file))
        return await env.reset(request["task"], request["seed"])
    if method == "call":
        result = await env.call(_tool_call.validate_python(request["call"]))
        # The parent has the call; it need not travel back.
        return dataclasses.replace(result, call=ToolCall(name="", arguments={}))
    if method == "step":
        return await env.step(_message.validate_python(request["reply"]))
    if method == "teacher":
        return await env.teacher(_messages.validate_python(request["messages"]))
    assert method in ("reward", "state_key", "close")
    return await getattr(env, method)()


def _listen(
    wire: socket.socket, inbox: asyncio.Queue[dict[str, Any] | None], loop: asyncio.AbstractEventLoop
) -> None:
    """On a thread, so that a parent that is gone is noticed while a tool hangs."""
    with wire.makefile("rb") as stream:
        while len(head := stream.read(4)) == 4:
            request = json.loads(stream.read(int.from_bytes(head, "big")))
            loop.call_soon_threadsafe(inbox.put_nowait, request)
    loop.call_soon_threadsafe(inbox.put_nowait, None)
    time.sleep(CLOSE_SECONDS)
    os._exit(1)


def _named_in(value: Any) -> set[str]:
    """The images that an answer names."""
    if isinstance(value, ImageBlock):
        return {value.sha256}
    if isinstance(value, list | tuple):
        return {sha256 for one in value for sha256 in _named_in(one)}
    held: tuple[Any, ...] = ()
    if isinstance(value, Message):
        held = (value.content,)
    elif isinstance(value, ToolResult):
        held = (value.content, value.step)
    elif isinstance(value, Step):
        held = (value.observation,)
    return {sha256 for one in held for sha256 in _named_in(one)}


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _frame(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, default=_plain).encode()
    return len(body).to_bytes(4, "big") + body


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else list(value)


def _exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
