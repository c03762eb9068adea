"""`TypedSession`: one live environment of a class written for OpenEnv."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from turnwise.envs import contain
from turnwise.errors import ActionError, EnvError, EnvHungError, boundary, message_of
from turnwise.openenv import faults, wire
from turnwise.openenv.environment import MCPEnvironment
from turnwise.openenv.mcp_tools import ServerTools
from turnwise.openenv.served import Answer, CallAnswer
from turnwise.openenv.typed_class import is_own, mcp_actions, parameters_of

if TYPE_CHECKING:
    from turnwise.openenv.typed import TypedEnv

log = logging.getLogger(__name__)

CLOSE_SECONDS = 30.0
"""How long an environment may take to close."""
TURN_SECONDS = 1.0
"""How much longer closing waits for its thread to be done with another call."""
APART = {"reward", "done", "metadata"}
"""Fields of an observation that stand beside it on the wire."""


class TypedSession:
    """One live environment; made by `open`. See `turnwise.openenv.served.ServedSession`."""

    def __init__(self, served: TypedEnv) -> None:
        self._served = served
        self._what = f"environment {served.name}"
        self._thread, self._shared = served.thread()
        self._env: Any = None
        self._tools: ServerTools | None = None
        self._hung = self._closed = False

    @classmethod
    async def open(cls, served: TypedEnv) -> TypedSession:
        """Construct an environment where it will live.

        Raises:
            EnvError: The constructor raised or hung.
        """
        session = cls(served)
        try:
            await session._run("constructor", session._construct)
        except BaseException:
            await session.close()
            raise
        return session

    async def reset(self, data: Mapping[str, Any]) -> Answer:
        """Start an episode; what ``reset`` takes no parameter for is left out and named in the metadata."""
        taken = (
            data if self._reset_takes is None else {k: v for k, v in data.items() if k in self._reset_takes}
        )
        observation = await self._run("reset", partial(self._reset, **taken), on_loop=self._reset_on_loop)
        answer = self._answer("reset", observation)
        if len(taken) == len(data):
            return answer
        ignored = [name for name in data if name not in taken]
        return dataclasses.replace(answer, metadata={**answer.metadata, "ignored": ignored})

    async def step(self, action: Mapping[str, Any], *, seconds: float | None = None) -> Answer:
        """Act; who takes ``timeout_s`` keeps it themselves."""
        parsed = self._parsed(action)
        if seconds is not None and self._step_takes_timeout:
            step, seconds = partial(self._step, parsed, timeout_s=seconds), None
        else:
            step = partial(self._step, parsed)
        observation = await self._run("step", step, on_loop=self._step_on_loop, seconds=seconds)
        return self._answer("step", observation)

    async def state(self) -> Mapping[str, Any]:
        """Every field, a subclass's too."""

        def read() -> Any:
            state = self._env.state
            return state() if callable(state) else state

        if self._step_on_loop:
            with boundary(EnvError, f"{self._what}: state"):
                state = contain.call(read)
        else:
            state = await self._run("state", read)
        return {"episode_id": None, "step_count": 0, **plain(state)}

    async def list_tools(self) -> Sequence[Mapping[str, Any]]:
        """Those of an MCP environment; others have none."""
        handle = getattr(self._env, "_async_handle_list_tools", None)
        if handle is None:
            return ()
        listed = await self._run("tools", handle, on_loop=True)
        if "error" in listed.metadata:
            raise EnvError(f"{self._what}: tools: {listed.metadata['error']}")
        return [tool.model_dump() for tool in listed.tools]

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> CallAnswer:
        """One call, past the environment's own ``step``: no reward, no turn."""
        if self._call_class is None:
            return CallAnswer(content=[_text(f"There is no tool '{name}'")], is_error=True)
        call = self._call_class(tool_name=name, arguments=dict(arguments))
        handle = partial(self._env._async_handle_call_tool, call)
        done = await self._run(f"tool {name}", handle, on_loop=True)
        if done.error is not None:
            return CallAnswer(content=[_text(done.error.message)], is_error=True)
        content = getattr(done.result, "content", None)
        if content is None:
            return CallAnswer(content=[_text(str(done.result))], data=done.result)
        return CallAnswer(content=[_block(block) for block in content], data=done.result.data)

    async def ask(self, method: str, data: Mapping[str, Any]) -> Any:
        """Nothing: rewards are in the steps here."""
        raise ActionError(f"{self._what} was written for OpenEnv: it answers no '{method}'")

    async def metadata(self) -> Mapping[str, Any]:
        """What ``get_metadata`` says, with its own name where it has no such method."""
        get = getattr(self._env, "get_metadata", None)
        if get is None:
            return {"name": self._served.name, "description": f"{self._served.name} environment"}
        return plain(await self._run("get_metadata", get))

    async def close(self) -> None:
        """Close the environment where it lives, once; a hung one is closed if its call ever returns."""
        if self._closed:
            return
        self._closed = True
        if self._hung:
            return
        try:
            if self._tools is not None:
                with boundary(EnvError, f"{self._what}: close"):
                    await contain.bounded(self._tools.aclose(), CLOSE_SECONDS)
            async with asyncio.timeout(CLOSE_SECONDS + TURN_SECONDS):
                await self._run("close", self._close_env, seconds=CLOSE_SECONDS)
        except (EnvError, contain.OverranError, contain.StuckError) as error:
            log.warning("%s", error)
        except TimeoutError:
            # In a call that nobody waits for any more, or in one of another's: its turn comes after that.
            log.warning("%s: close: its thread is in another call", self._what)
            if not self._shared:
                self._hung = True
                self._thread.abandon(self._close_env)
        if not self._shared and not self._hung:
            self._thread.stop()

    # -- the environment's face, read once -----------------------------------------------------------

    def _construct(self) -> None:
        self._env = env = self._served.make()
        cls = type(env)
        self._served.cls = self._served.cls or cls
        self._reset_on_loop, self._step_on_loop = is_own(cls, "reset_async"), is_own(cls, "step_async")
        self._reset = env.reset_async if self._reset_on_loop else env.reset
        self._step = env.step_async if self._step_on_loop else env.step
        self._reset_takes = parameters_of(self._reset)
        step_takes = parameters_of(self._step)
        self._step_takes_timeout = step_takes is None or "timeout_s" in step_takes
        self._model = self._served.action
        call, self._list_class = mcp_actions(cls, self._model)
        self._call_class = call if hasattr(env, "_async_handle_call_tool") else None
        # Tool calls are told by their type only where no action of the author's own could mean another thing.
        generic = self._model is None or (
            call is not None and self._model in (*call.__mro__, self._list_class)
        )
        self._takes_calls = generic and call is not None
        self._anything = call
        if hasattr(env, "_mode_tools") or isinstance(env, MCPEnvironment):
            env._mode = self._served.mode
        if isinstance(env, MCPEnvironment):
            # The session's own in place of the class's, for this environment alone.
            env._beside, self._tools = self._beside, env._served  # type: ignore[method-assign]
        elif self._call_class is not None and getattr(env, "mcp_server", None) is not None:
            self._shorten(env)

    def _shorten(self, env: Any) -> None:
        """Spare an `MCPEnvironment` of theirs the MCP client between itself and its own tools."""
        if hasattr(env, "_async_list_tools") and hasattr(env, "_async_call_tool"):
            self._tools = tools = ServerTools(env.mcp_server)
            env._async_list_tools, env._async_call_tool = tools.list, tools.call

    def _parsed(self, action: Mapping[str, Any]) -> Any:
        model = self._action_class(action)
        if model is None:
            return action
        try:
            with boundary(EnvError, f"{self._what}: its action's validators"):
                return model.model_validate(action)
        except EnvError as error:
            if isinstance(error.__cause__, ValidationError):
                wrong = error.__cause__
                raise ActionError(f"no such action: {message_of(wrong, 500)}") from wrong
            faults.tell(str(error), error.__cause__ or error)
            raise

    def _action_class(self, action: Mapping[str, Any]) -> type[BaseModel] | None:
        if self._takes_calls:
            kind = action.get("type")
            if kind == "call_tool":
                return self._anything
            if kind == "list_tools":
                return self._list_class
        return self._model

    def _answer(self, what: str, observation: Any) -> Answer:
        if isinstance(observation, BaseModel):
            fields = observation.model_dump(exclude=APART)
            reward, done = getattr(observation, "reward", None), getattr(observation, "done", False)
            metadata = getattr(observation, "metadata", None) or {}
        elif _is_result(observation):
            return self._unwrapped(what, observation)
        elif dataclasses.is_dataclass(observation) or isinstance(observation, Mapping):
            fields = plain(observation)
            reward, done = fields.pop("reward", None), fields.pop("done", False)
            metadata = fields.pop("metadata", None) or {}
        else:
            raise EnvError(
                f"{self._what}: {what} returned {type(observation).__name__}; return an Observation"
            )
        if metadata:
            metadata = _sendable(metadata)
        return Answer(observation=fields, reward=self._paid(what, reward), done=bool(done), metadata=metadata)

    def _unwrapped(self, what: str, result: Any) -> Answer:
        """Of a ``StepResult``, which is what clients return: the observation in it, paid as it says."""
        answer = self._answer(what, result.observation)
        return dataclasses.replace(
            answer,
            reward=answer.reward if result.reward is None else self._paid(what, result.reward),
            done=answer.done or bool(result.done),
            metadata={**answer.metadata, **_sendable(getattr(result, "metadata", None) or {})},
        )

    def _paid(self, what: str, reward: Any) -> float | None:
        """A whole number stays one."""
        if reward is None or isinstance(reward, bool | int):
            return reward
        try:
            return float(reward)
        except (TypeError, ValueError):
            raise EnvError(f"{self._what}: {what} paid {reward!r:.80}, which is no number") from None

    # -- where it runs -------------------------------------------------------------------------------

    async def _run(
        self, what: str, function: Callable[[], Any], *, on_loop: bool = False, seconds: float | None = None
    ) -> Any:
        """What ``function`` returns, on the thread; on the loop what it comes to."""
        seconds = self._served.call_seconds if seconds is None else min(seconds, self._served.call_seconds)
        with faults.telling():
            if on_loop:
                self._check(what)
                return await self._awaited(what, function, seconds)
            with boundary(EnvError, f"{self._what}: {what}"):
                result = await self._beside(function, what, seconds)
            if inspect.isawaitable(result):
                return await self._awaited(what, lambda: result, seconds)
            return result

    async def _beside(self, function: Callable[[], Any], what: str = "tool", seconds: float = 1e9) -> Any:
        """What ``function`` returns or raises, on the environment's own thread."""
        self._check(what)
        try:
            return await self._thread.run(partial(contain.call, function), seconds)
        except EnvHungError as hung:
            self._hung = True
            self._served.abandon(self._thread)
            self._thread.abandon(self._close_env, shared=self._shared)
            raise EnvHungError(f"{self._what}: {what}: {message_of(hung)}") from None

    def _close_env(self) -> None:
        """On the thread, once; the constructor may have made it after nobody waited for it any more."""
        env, self._env = self._env, None
        close_env(env)

    def _check(self, what: str) -> None:
        if self._hung:
            raise EnvHungError(f"{self._what}: {what}: the environment hangs in an earlier call")

    async def _awaited(self, what: str, function: Callable[[], Any], seconds: float) -> Any:
        """In the caller's own task: one of its own would cost more than most steps."""
        task = asyncio.current_task()
        try:
            with boundary(EnvError, f"{self._what}: {what}"):
                async with asyncio.timeout(seconds) as deadline:
                    return await function()
        except EnvError:
            if deadline.expired():
                raise EnvError(f"{self._what}: {what}: it did not finish within {seconds:g} s") from None
            raise
        except asyncio.CancelledError:
            if task is not None and task.cancelling():
                raise
            raise EnvError(f"{self._what}: {what}: it cancelled itself") from None
        except (KeyboardInterrupt, SystemExit) as odd:
            raise EnvError(f"{self._what}: {what}: it raised {type(odd).__name__}") from odd


def plain(value: Any) -> dict[str, Any]:
    """A model, a dataclass or a mapping as a dictionary."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if value else {}


def _is_result(value: Any) -> bool:
    """Whether it is a ``StepResult``, whoever's."""
    return dataclasses.is_dataclass(value) and type(value).__name__ == "StepResult"


def _sendable(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata that is no JSON never kept an observation from being sent, for it was never sent itself."""
    kept: dict[str, Any] = {}
    for name, value in metadata.items():
        try:
            wire.dump(value)
        except EnvError:
            kept.setdefault("not_json", []).append(name)
        else:
            kept[name] = value
    return kept


def _text(text: str) -> Mapping[str, Any]:
    return {"type": "text", "text": text}


def _block(block: Any) -> Mapping[str, Any]:
    if isinstance(block, BaseModel):
        return block.model_dump(by_alias=True, exclude_none=True, mode="json")
    return dict(block)


def close_env(env: Any) -> None:
    """Close it, where there is one and it can be closed."""
    close = getattr(env, "close", None)
    if close is not None:
        close()
