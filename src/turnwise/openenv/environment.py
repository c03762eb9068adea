"""`Environment` and `MCPEnvironment`: the base classes that environments written for OpenEnv have.

    class Counter(Environment[Add, Total, State]):
        def reset(self, seed=None, episode_id=None, **more): ...
        def step(self, action, timeout_s=None, **more): ...
        @property
        def state(self): ...

Contracts are those of ``openenv.core`` (read from 0.3.0); a class that inherits from theirs is hosted as it
is. To write one anew, write a `turnwise.envs.base.Env`: it is served to the same clients.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from turnwise.envs.tools import Tool as OwnTool
from turnwise.envs.tools import function_tool
from turnwise.envs.validate import ArgumentsError
from turnwise.errors import EnvSpecError, message_of, said
from turnwise.openenv import faults
from turnwise.openenv.mcp_tools import Called, ServerTools
from turnwise.openenv.models import (
    RESERVED_TOOL_NAMES,
    Action,
    CallToolAction,
    CallToolObservation,
    EnvironmentMetadata,
    ListToolsAction,
    ListToolsObservation,
    Message,
    Observation,
    State,
    Tool,
    ToolError,
    ToolErrorType,
)

ActT = TypeVar("ActT", bound=Action)
ObsT = TypeVar("ObsT", bound=Observation)
StateT = TypeVar("StateT", bound=State)
Function = TypeVar("Function", bound=Callable[..., Any])
Mode = Literal["production", "simulation"]

TOOL_SECONDS = 30.0
"""One tool call, where the client sets no deadline."""


class Transform(ABC, Generic[ObsT]):
    """Makes another observation of one: a reward, a measure, a view."""

    @abstractmethod
    def __call__(self, observation: ObsT) -> ObsT:
        """The observation that is sent in place of ``observation``."""


class CompositeTransform(Transform[Any]):
    """Several, one after another."""

    def __init__(self, transforms: list[Transform[Any]]) -> None:
        self.transforms = transforms

    def __call__(self, observation: Any) -> Any:
        """What the last one makes of what the others made."""
        for transform in self.transforms:
            observation = transform(observation)
        return observation


class NullTransform(Transform[Any]):
    """None at all."""

    def __call__(self, observation: Any) -> Any:
        """The same."""
        return observation


class ModelTokenizer(Protocol):
    """What chat environments ask of a tokenizer; those of ``transformers`` have it."""

    def apply_chat_template(
        self,
        conversation: list[Message],
        tokenize: bool = True,
        return_tensors: str | None = None,
        **more: Any,
    ) -> Any:
        """Messages as the model's text, or its tokens."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **more: Any) -> str:
        """Tokens as text."""
        ...


class Environment(ABC, Generic[ActT, ObsT, StateT]):
    """An environment written for OpenEnv.

    Args:
        transform: For `_apply_transform`; nothing calls that but the author.
        rubric: For `_apply_rubric`, likewise: ``rubric(action, observation)`` is a reward.
    """

    SUPPORTS_CONCURRENT_SESSIONS: bool = False
    """Several instances may live at once."""
    REQUIRES_SINGLE_THREAD_EXECUTOR: bool = False
    """All instances must live on one and the same thread."""

    def __init__(self, transform: Transform[ObsT] | None = None, rubric: Any = None) -> None:
        self.transform = transform
        self.rubric = rubric

    @abstractmethod
    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> ObsT:
        """Start an episode."""

    @abstractmethod
    def step(self, action: ActT, timeout_s: float | None = None, **more: Any) -> ObsT:
        """Act."""

    @property
    @abstractmethod
    def state(self) -> StateT:
        """What the environment knows of the episode."""

    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> ObsT:
        """As `reset`; where a subclass has one, the server awaits it on its loop."""
        return self.reset(seed=seed, episode_id=episode_id, **more)

    async def step_async(self, action: ActT, timeout_s: float | None = None, **more: Any) -> ObsT:
        """As `step`, likewise."""
        return self.step(action, timeout_s=timeout_s, **more)

    def get_metadata(self) -> EnvironmentMetadata:
        """What ``GET /metadata`` answers."""
        name = type(self).__name__
        return EnvironmentMetadata(name=name, description=f"{name} environment", version="1.0.0")

    def close(self) -> None:
        """Let go of what the environment holds; called once, on the thread that made it."""

    def _apply_transform(self, observation: ObsT) -> ObsT:
        return observation if self.transform is None else self.transform(observation)

    def _apply_rubric(self, action: ActT, observation: ObsT) -> Any:
        return 0.0 if self.rubric is None else self.rubric(action, observation)

    async def _apply_rubric_async(self, action: ActT, observation: ObsT) -> Any:
        reward = self._apply_rubric(action, observation)
        return await reward if inspect.isawaitable(reward) else reward

    def _reset_rubric(self) -> None:
        if self.rubric is not None:
            self.rubric.reset()

    async def _reset_rubric_async(self) -> None:
        if self.rubric is not None:
            done = getattr(self.rubric, "reset_async", self.rubric.reset)()
            if inspect.isawaitable(done):
                await done


class MCPEnvironment(Environment[Any, Any, Any]):
    """An environment whose actions are tool calls; other actions go to `_step_impl`.

    Args:
        mcp_server: A FastMCP server whose tools these are; `tool` adds more, and suffices without one.
        transform: As for `Environment`.

    Raises:
        ValueError: A tool has the name of what controls the episode (`RESERVED_TOOL_NAMES`).
    """

    def __init__(self, mcp_server: Any = None, transform: Transform[Any] | None = None) -> None:
        super().__init__(transform=transform)
        self.mcp_server = mcp_server
        self._served = None if mcp_server is None else ServerTools(mcp_server)
        self._own: dict[str, dict[Mode | None, OwnTool]] = {}
        self._mode: Mode | None = None
        if self._served is not None:
            for listed in _finished(self._served.list()):
                _allow(listed.name)

    def tool(self, mode: Mode | None = None) -> Callable[[Function], Function]:
        """A decorator that makes a function with type hints and a docstring a tool.

        Args:
            mode: Of the server that shows it; None is both.

        Raises:
            ValueError: There is no such mode, the name is reserved, or the function cannot be described.
        """
        if mode is not None and mode not in get_args(Mode):
            raise EnvSpecError(f"Invalid mode '{mode}'. Mode must be 'production', 'simulation', or None.")

        def add(function: Function) -> Function:
            own = function_tool(function)
            _allow(own.schema.name)
            self._own.setdefault(own.schema.name, {})[mode] = own
            return function

        return add

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Any:
        """Act. Tools that are coroutines, and a server's, run in a loop of their own."""
        if not isinstance(action, ListToolsAction | CallToolAction):
            return self._step_impl(action, timeout_s=timeout_s, **more)
        return _finished(MCPEnvironment.step_async(self, action, timeout_s=timeout_s, **more))

    async def step_async(self, action: Any, timeout_s: float | None = None, **more: Any) -> Any:
        """Act. Tools that are no coroutines, and `_step_impl`, run beside the loop."""
        if isinstance(action, ListToolsAction):
            return await self._async_handle_list_tools()
        if isinstance(action, CallToolAction):
            return await self._async_handle_call_tool(action, timeout_s=timeout_s)
        return await self._beside(partial(self._step_impl, action, timeout_s=timeout_s, **more))

    @abstractmethod
    def _step_impl(self, action: Any, timeout_s: float | None = None, **more: Any) -> Any:
        """Act on what is no tool call."""

    def close(self) -> None:
        """Let go of the server; call it from a `close` of your own."""
        self.mcp_server = self._served = None

    async def _async_handle_list_tools(self) -> ListToolsObservation:
        own = [tool.schema for tool in self._shown().values()]
        tools = [Tool(name=s.name, description=s.description, input_schema=dict(s.parameters)) for s in own]
        if self._served is not None:
            tools += [
                Tool(name=listed.name, description=listed.description, input_schema=dict(listed.inputSchema))
                for listed in await self._served.list()
                if listed.name not in self._own
            ]
        return ListToolsObservation(tools=tools)

    async def _async_handle_call_tool(
        self, action: CallToolAction, timeout_s: float | None = None
    ) -> CallToolObservation:
        seconds = TOOL_SECONDS if timeout_s is None else timeout_s
        wrong = partial(_wrong, action.tool_name)
        try:
            async with asyncio.timeout(seconds):
                result = await self._called(action.tool_name, action.arguments)
        except TimeoutError:
            return wrong(ToolErrorType.TIMEOUT, f"it did not finish within {seconds:g} s")
        except ArgumentsError as told:
            return wrong(ToolErrorType.INVALID_ARGS, str(told))
        except _NoToolError as told:
            return wrong(ToolErrorType.TOOL_NOT_FOUND, message_of(told))
        except Exception as raised:  # noqa: BLE001 - a tool's own code; the caller is told, the episode goes on
            if action.tool_name in self._own:  # A FastMCP server logs its own.
                faults.tell(f"{type(self).__name__}: tool {action.tool_name}: {said(raised)}", raised)
            return wrong(_kind(raised), message_of(raised))
        return CallToolObservation(tool_name=action.tool_name, result=result)

    async def _called(self, name: str, arguments: dict[str, Any]) -> Any:
        own = self._shown().get(name)
        if own is None:
            if self._served is None or name in self._own:
                raise _NoToolError(f"There is no tool '{name}'")
            return await self._served.call(name, arguments)
        function = partial(own.bind(self), **own.check(arguments).arguments)
        result: Any = await function() if own.is_async else await self._beside(function)
        return Called.of(result)

    def _shown(self) -> dict[str, OwnTool]:
        found = {name: modes.get(self._mode) or modes.get(None) for name, modes in self._own.items()}
        return {name: tool for name, tool in found.items() if tool is not None}

    async def _beside(self, function: Callable[[], Any]) -> Any:
        """Off the loop: the server that hosts the environment puts its one thread here."""
        return await asyncio.to_thread(function)


def load_environment_metadata(env: Any, env_name: str | None = None) -> EnvironmentMetadata:
    """What an instance says of itself; of a class or a function, its name and the README there is.

    That is ``/app/README.md``, the file that ``ENV_README_PATH`` names, or ``src/envs/<env_name>/README.md``.
    """
    if not (inspect.isclass(env) or inspect.isroutine(env)) and hasattr(env, "get_metadata"):
        metadata: EnvironmentMetadata = env.get_metadata()
        return metadata
    own = getattr(env, "__name__", type(env).__name__)
    described = env_name or own if inspect.isroutine(env) else own
    places = ["/app/README.md", os.environ.get("ENV_README_PATH", "")]
    places += [f"src/envs/{env_name}/README.md"] if env_name else []
    return EnvironmentMetadata(
        name=env_name or own,
        description=f"{described} environment",
        version="1.0.0",
        readme_content=next((Path(at).read_text("utf-8") for at in places if Path(at).is_file()), None),
    )


class _NoToolError(LookupError):
    """No tool has that name."""


def _allow(name: str) -> None:
    if name in RESERVED_TOOL_NAMES:
        raise EnvSpecError(
            f"MCP tools cannot use reserved names: ['{name}']; "
            f"reserved are {', '.join(sorted(RESERVED_TOOL_NAMES))}, so that no agent controls the episode"
        )


def _wrong(name: str, kind: ToolErrorType, message: str) -> CallToolObservation:
    return CallToolObservation(tool_name=name, error=ToolError(error_type=kind, message=message))


def _kind(raised: Exception) -> ToolErrorType:
    """Of a FastMCP server's own errors, by their classes' names: nothing of it is imported here."""
    name = type(raised).__name__
    if name == "NotFoundError":
        return ToolErrorType.TOOL_NOT_FOUND
    return ToolErrorType.INVALID_ARGS if name == "ValidationError" else ToolErrorType.EXECUTION_ERROR


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What ``coroutine`` comes to, for callers that cannot await."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as beside:
        return beside.submit(asyncio.run, coroutine).result()
