"""`ServerTools`: the tools of a FastMCP server that lives in an environment, called without a client between.

openenv-core's `MCPEnvironment` reaches its own tools through an MCP client, an in-memory transport and back:
1.4 ms of CPU for a call that takes the server's own ``call_tool`` 0.2 (fastmcp 4.1.2). What needs a client's
session, tools that take a ``Context``, still goes that way. Nothing of FastMCP is imported; the server is
the author's own object.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from turnwise.errors import EnvSpecError
from turnwise.openenv import wire

OWN_LAYER = "DereferenceRefsMiddleware"
"""The middleware that every FastMCP server has; it only changes what is listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A tool as a server lists it, with MCP's own names."""

    name: str
    description: str
    inputSchema: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What a call came to, with the names that FastMCP's client gives it and OpenEnv's clients read."""

    content: list[Any]
    """MCP content blocks."""
    structured_content: Mapping[str, Any] | None
    """The result where it is an object; anything else under ``result``."""
    data: Any
    """The result itself."""
    meta: Mapping[str, Any] | None = None
    is_error: bool = False

    @classmethod
    def of(cls, value: Any) -> Called:
        """A plain value as the result of a call."""
        structured = dict(value) if isinstance(value, Mapping) else {"result": value}
        text = value if isinstance(value, str) else wire.dump(value).decode()
        return cls(content=[{"type": "text", "text": text}], structured_content=structured, data=value)


class ServerTools:
    """Lists and calls one server's tools.

    Args:
        server: A FastMCP server.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._direct: dict[str, bool] = {}
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def list(self) -> list[Listed]:
        """The tools, in the server's order."""
        if hasattr(self._server, "list_tools"):
            tools = await self._server.list_tools()
        else:  # FastMCP 2
            tools = (await self._server.get_tools()).values()
        return [
            Listed(name=tool.name, description=tool.description or "", inputSchema=tool.parameters or {})
            for tool in tools
        ]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the tool returned: `Called`, or the same as FastMCP's client has it.

        Raises:
            Exception: What the server raises: the tool's own error in its words, no such tool, bad arguments.
        """
        if name not in self._direct:
            self._direct[name] = await self._is_direct(name)
        if not self._direct[name]:
            return await (await self._connected()).call_tool(name, dict(arguments))
        result = await self._server.call_tool(name, dict(arguments), run_middleware=False)
        structured, meta = result.structured_content, result.meta or {}
        if getattr(result, "is_error", False):
            raise RuntimeError("\n".join(getattr(block, "text", "") for block in result.content))
        wrapped = isinstance(structured, dict) and (meta.get("fastmcp") or {}).get("wrap_result")
        return Called(
            content=list(result.content),
            structured_content=structured,
            data=structured["result"] if wrapped and structured else structured,
            meta=result.meta,
        )

    async def aclose(self) -> None:
        """End the client's session, if there ever was one."""
        await self._stack.aclose()

    async def _is_direct(self, name: str) -> bool:
        """Whether nothing on the way to the tool asks for a client's session."""
        server = self._server
        called = inspect.signature(getattr(server, "call_tool", _client_of)).parameters
        if "run_middleware" not in called or not hasattr(server, "list_tools"):
            return False
        if any(type(layer).__name__ != OWN_LAYER for layer in getattr(server, "middleware", ())):
            return False
        for tool in await server.list_tools():
            if tool.name == name:
                function = getattr(tool, "fn", None)
                shown = (tool.parameters or {}).get("properties", {})
                return function is not None and set(inspect.signature(function).parameters) == set(shown)
        return True  # There is none, and the server says so.

    async def _connected(self) -> Any:
        if self._client is None:
            self._client = await self._stack.enter_async_context(_client_of(self._server))
        return self._client


def _client_of(server: Any) -> Any:
    """A client with one session for all calls: by default FastMCP 4 has one for each, and no state lasts."""
    client = getattr(sys.modules[type(server).__module__.partition(".")[0]], "Client", None)
    if client is None:
        raise EnvSpecError(f"{type(server).__name__} is no FastMCP server: its package has no Client")
    modes = {"mode": "legacy"} if "mode" in inspect.signature(client).parameters else {}
    return client(server, **modes)
