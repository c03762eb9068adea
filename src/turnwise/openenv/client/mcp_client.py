"""`MCPToolClient`: an `EnvClient` whose actions are tool calls.

    async with MCPToolClient("http://127.0.0.1:8000") as env:
        await env.reset(seed=3)
        print([tool.name for tool in await env.list_tools()])
        print(await env.call_tool("price", item="tea"))

It plays an episode: tools are called as steps, with rewards and an end. Agents, which may not reset, use
``/mcp`` with any MCP client, or this one with ``use_production_mode = True``.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx

from turnwise.errors import EnvSpecError, said
from turnwise.openenv.client.env_client import EnvClient, ServerError
from turnwise.openenv.client.socket import is_loopback
from turnwise.openenv.models import (
    CallToolAction,
    CallToolObservation,
    ListToolsAction,
    ListToolsObservation,
    Observation,
    State,
    StepResult,
    Tool,
    ToolError,
)
from turnwise.openenv.run.provider import Provider


class ToolCallError(ServerError):
    """A tool could not be called, or raised."""


class MCPToolClient(EnvClient[Any, Observation, State]):
    """Lists an environment's tools and calls them.

    Args:
        base_url, connect_timeout_s, message_timeout_s, provider, token: As for `EnvClient`.
        mode: ``production``, as the tools are what agents see; None is the same.
    """

    def __init__(
        self,
        base_url: str,
        connect_timeout_s: float = 10.0,
        message_timeout_s: float = 60.0,
        provider: Provider | None = None,
        mode: str | None = None,
        *,
        token: str | None = None,
    ) -> None:
        if mode is not None and mode.lower() != "production":
            raise EnvSpecError(f"mode={mode!r}: a tool client has 'production' alone; use GenericEnvClient")
        super().__init__(
            base_url, connect_timeout_s, message_timeout_s, provider=provider, mode="production", token=token
        )
        self.use_production_mode = False
        """Call tools at ``POST /mcp``, in a session without an episode, in place of steps."""
        self._tools: list[Tool] | None = None
        self._session: str | None = None
        self._opening = asyncio.Lock()
        self._ids = itertools.count(1)
        self._http: httpx.AsyncClient | None = None

    async def list_tools(self, use_cache: bool = True) -> list[Tool]:
        """The tools; asked for once.

        Args:
            use_cache: False asks again.

        Raises:
            ServerError: The environment has none to list.
        """
        if self._tools is None or not use_cache:
            if self.use_production_mode:
                result = await self._rpc("tools/list", {"session_id": await self._open()})
                self._tools = [tool(row) for row in result["tools"]]
            else:
                answer = (await self.step(ListToolsAction())).observation
                if not isinstance(answer, ListToolsObservation):
                    raise ServerError(f"{self._url} answered list_tools with no tools: {answer}", "NO_TOOLS")
                self._tools = answer.tools
        return self._tools

    async def call_tool(self, name: str, **arguments: Any) -> Any:
        """Call a tool; what it returned.

        Args:
            name: One of `list_tools`.
            **arguments: As its schema has them.

        Raises:
            ToolCallError: There is no such tool, it does not take the arguments, or it raised.
        """
        if self.use_production_mode:
            session = await self._open()
            call = {"name": name, "arguments": arguments, "session_id": session}
            result: Any = await self._rpc("tools/call", call)
            if isinstance(result, dict) and (result.get("is_error") or result.get("isError")):
                raise ToolCallError(f"Tool '{name}' failed: {result.get('content')}", "execution_error")
        else:
            answer = (await self.step(CallToolAction(tool_name=name, arguments=arguments))).observation
            if not isinstance(answer, CallToolObservation):
                raise ServerError(
                    f"{self._url} answered a call of {name} with no result: {answer}", "NO_TOOLS"
                )
            if answer.error is not None:
                kind = answer.error.error_type.value
                raise ToolCallError(f"Tool '{name}' failed: {answer.error.message} (type: {kind})", kind)
            result = answer.result
        return result["data"] if isinstance(result, dict) and "data" in result else result

    async def get_tool(self, name: str) -> Tool | None:
        """One tool; None where there is no such."""
        return next((tool for tool in await self.list_tools() if tool.name == name), None)

    async def has_tool(self, name: str) -> bool:
        """Whether there is such a tool."""
        return await self.get_tool(name) is not None

    async def close(self) -> None:
        """Close the session at ``/mcp`` too."""
        try:
            if self._session is not None:
                session, self._session = self._session, None
                await self._rpc("openenv/session/close", {"session_id": session})
        finally:
            http, self._http = self._http, None
            if http is not None:
                await http.aclose()
            await super().close()

    def _step_payload(self, action: Any) -> dict[str, Any]:
        if isinstance(action, ListToolsAction):
            return {"type": "list_tools"}
        if isinstance(action, CallToolAction):
            return {"type": "call_tool", "tool_name": action.tool_name, "arguments": action.arguments}
        if hasattr(action, "model_dump"):
            return dict(action.model_dump(mode="json"))
        raise EnvSpecError(
            f"a tool client's action is ListToolsAction or CallToolAction; this is {type(action).__name__}"
        )

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Observation]:
        fields = payload.get("observation", {})
        done, reward = payload.get("done", False), payload.get("reward")
        metadata = fields.get("metadata", {})
        observation: Observation
        if "tools" in fields:
            tools = [tool(row) for row in fields["tools"]]
            observation = ListToolsObservation(tools=tools, done=done, reward=reward, metadata=metadata)
        elif "tool_name" in fields:
            observation = CallToolObservation(
                tool_name=fields["tool_name"],
                result=fields.get("result"),
                error=ToolError(**fields["error"]) if fields.get("error") else None,
                done=done,
                reward=reward,
                metadata=metadata,
            )
        else:
            observation = Observation(done=done, reward=reward, metadata={**fields, **metadata})
        return StepResult(observation=observation, reward=reward, done=done)

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)

    async def _open(self) -> str:
        """The session at ``/mcp``."""
        async with self._opening:
            if self._session is None:
                self._session = str((await self._rpc("openenv/session/create", {}))["session_id"])
            return self._session

    async def _rpc(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if self._http is None:
            self._http = httpx.AsyncClient(
                headers=self._headers, timeout=self._message_timeout, trust_env=not is_loopback(self._url)
            )
        request = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
        try:
            response = await self._http.post(f"{self._url}/mcp", json=request)
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self._url}/mcp: {method}: {said(error)}", "TRANSPORT_ERROR") from error
        if "error" in answer:
            told = answer["error"]
            raise ServerError(f"{self._url}/mcp: {method}: {told.get('message')}", str(told.get("code")))
        return dict(answer["result"])


def tool(row: dict[str, Any]) -> Tool:
    """A tool as a server lists it, in either spelling of its schema."""
    schema = row.get("input_schema", row.get("inputSchema", {}))
    return Tool(name=row["name"], description=row.get("description") or "", input_schema=schema)
