"""``/mcp``: an environment's tools for agents, and nothing else of it.

Two dialects share the URL and the socket frames. OpenEnv's is JSON-RPC without a handshake: ``tools/list``,
``tools/call``, and ``openenv/session/create`` and ``close`` where calls shall meet one environment. MCP's own
begins with ``initialize``, and over HTTP an ``Mcp-Session-Id`` header names the environment from then on
(Streamable HTTP, revisions 2024-11-05 to 2025-11-25; the stateless 2026-07-28 has no sessions to hold one).
A call without a session meets an environment of its own, which is closed again.

Nobody resets, steps or reads a state here: of a session's methods `Mcp` has `list_tools` and `call_tool`, and
asks an environment of ours to begin, whose first observation is in the handshake's ``instructions``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turnwise.errors import ActionError, EnvError, TurnwiseError, message_of
from turnwise.openenv import wire
from turnwise.openenv.models import RESERVED_TOOL_NAMES
from turnwise.openenv.served import CallAnswer, ServedSession
from turnwise.openenv.server.sessions import CapacityError, Live, Sessions
from turnwise.openenv.server.socket import Connection, Socket

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
INTERNAL_ERROR, SERVER_ERROR, UNSUPPORTED_VERSION = -32603, -32000, -32022
VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
"""Revisions of MCP that begin with a handshake."""
KEYS = {"jsonrpc", "method", "params", "id"}
SESSION_HEADER, VERSION_HEADER = "mcp-session-id", "mcp-protocol-version"


class RpcError(TurnwiseError):
    """What a request is answered with in place of a result."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.data = code, data


class Mcp:
    """Answers requests, and holds the sessions that HTTP clients made here.

    Args:
        sessions: Of the server.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.own: dict[str, Live] = {}
        """By id; agents reach these alone, never a socket's."""
        self._handshaken: set[str] = set()

    async def __call__(
        self, live: Live, request: Mapping[str, Any], *, mcp: bool = False
    ) -> Mapping[str, Any]:
        """The response to one request on a socket, whose session is the caller's own.

        Args:
            live: That session.
            request: JSON-RPC.
            mcp: The client made MCP's handshake: results have MCP's own form.
        """
        try:
            method, params, id = read(request)
            return _result(id, await self._on_socket(live, method, params, mcp))
        except RpcError as wrong:
            return _error(request, wrong)
        except TurnwiseError as error:
            return _error(request, RpcError(INTERNAL_ERROR, str(error)))

    async def http(self, request: Request) -> Response:
        """POST: one request. DELETE: the end of a session. GET: no stream is offered."""
        name = request.headers.get(SESSION_HEADER)
        if request.method == "GET":
            return Response(status_code=405, headers={"allow": "POST, DELETE"})
        if request.method == "DELETE":
            known = name in self.own
            await self._end(name or "")
            return Response(status_code=204 if known else 404)
        body: Any = None
        headers = {"content-type": "application/json"}
        status = 200
        try:
            body = load(await request.body())
            if _is_notification(body):
                if name in self.own:
                    self.sessions.keep(self.own[name])
                return Response(status_code=202 if name is None or name in self.own else 404)
            method, params, id = read(body)
            if name is not None and name not in self.own:
                status = 404  # By which a client of MCP knows that it must begin anew.
                raise RpcError(INVALID_REQUEST, f"Unknown session: {name[:80]}: initialize again")
            answer = _result(id, await self._over_http(request, method, params, headers))
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody is there to read it, or the body was too long.
        except RpcError as wrong:
            answer = _error(body, wrong)
        except CapacityError as full:
            more = {"active_sessions": full.active, "max_sessions": full.limit}
            answer = _error(body, RpcError(SERVER_ERROR, str(full), more))
        except TurnwiseError as error:
            answer = _error(body, RpcError(INTERNAL_ERROR, str(error)))
        return Response(dumped(answer), status_code=status, headers=headers)

    # ------------------------------------------------------------------------------------------------

    async def _on_socket(self, live: Live, method: str, params: Mapping[str, Any], mcp: bool) -> Any:
        if method == "openenv/session/create":
            return {"session_id": live.id}
        if method == "openenv/session/close":
            if params.get("session_id") == live.id:
                raise RpcError(INVALID_REQUEST, "this session ends with its WebSocket: close that")
            return await self._closed(params)
        return await self._answer(live.session, method, params, mcp=mcp)

    async def _over_http(
        self, request: Request, method: str, params: Mapping[str, Any], headers: dict[str, str]
    ) -> Any:
        revision = request.headers.get(VERSION_HEADER)
        if method == "server/discover" or (revision is not None and revision not in VERSIONS):
            raise RpcError(
                UNSUPPORTED_VERSION,
                f"an environment lives in a session, which this revision of MCP has none of: {revision}",
                {"supported": list(VERSIONS), "requested": revision},
            )
        if method == "openenv/session/create":
            live = await self._opened()
            async with self.sessions.turn(live):
                return {"session_id": live.id}
        if method == "openenv/session/close":
            return await self._closed(params)
        name = request.headers.get(SESSION_HEADER)
        if method == "initialize" and name is None:
            live = await self._opened()
            self._handshaken.add(live.id)
            try:
                async with self.sessions.turn(live) as session:
                    begun = await self._initialized(session, params)
            except BaseException:
                await self._end(live.id)  # Its client never learns its name.
                raise
            headers[SESSION_HEADER] = live.id
            return begun
        name = name or params.get("session_id")
        if name is None:
            async with self.sessions.passing() as session:
                return await self._answer(session, method, params, mcp=revision is not None)
        live = self._known(name)
        self.sessions.keep(live)
        mcp = name in self._handshaken
        async with self.sessions.turn(live) as session:
            return await self._answer(session, method, params, mcp=mcp)

    async def _opened(self) -> Live:
        name = uuid.uuid4().hex
        try:
            live = await self.sessions.open(evict=partial(self._evict, name), id=name, lent=True)
            self.own[name] = live
        except EnvError as error:
            raise RpcError(SERVER_ERROR, str(error), {"factory_name": self.sessions.served.name}) from error
        return live

    async def _closed(self, params: Mapping[str, Any]) -> Any:
        name = params.get("session_id")
        if not name:
            raise RpcError(INVALID_PARAMS, "Invalid params - 'session_id' is required")
        self._known(name)
        await self._end(name)
        return {"session_id": name, "closed": True}

    def _known(self, name: Any) -> Live:
        live = self.own.get(name) if isinstance(name, str) else None
        if live is None:
            raise RpcError(INVALID_PARAMS, f"Unknown session_id: {str(name)[:80]}")
        return live

    async def _end(self, name: str) -> None:
        """Close a session once its requests are answered; from now on it takes no more."""
        self._handshaken.discard(name)
        live = self.own.pop(name, None)
        if live is not None:
            async with live.lock:
                await self.sessions.close(live)

    async def _evict(self, name: str, _: str) -> None:
        self._handshaken.discard(name)
        live = self.own.pop(name, None)
        if live is not None:
            await self.sessions.close(live)

    # -- the methods ---------------------------------------------------------------------------------

    async def _answer(
        self, session: ServedSession, method: str, params: Mapping[str, Any], *, mcp: bool
    ) -> Any:
        if method == "tools/call":
            return await _call(session, params, mcp=mcp)
        if method == "tools/list":
            tools = [tool for tool in await session.list_tools() if tool["name"] not in RESERVED_TOOL_NAMES]
            return {"tools": [_listed(tool, mcp=mcp) for tool in tools]}
        if method == "initialize":
            return await self._initialized(session, params)
        if method == "ping":
            return {}
        raise RpcError(METHOD_NOT_FOUND, f"Method not found: {method}")

    async def _initialized(self, session: ServedSession, params: Mapping[str, Any]) -> Any:
        asked = params.get("protocolVersion")
        try:
            told = await session.ask("begin", {})
        except ActionError:  # Of a class written for OpenEnv: it begins as it is.
            told = None
        about = {} if told else await session.metadata()
        return {
            "protocolVersion": asked if asked in VERSIONS else VERSIONS[-1],
            "capabilities": {"tools": {"listChanged": False}},
            "serverInfo": {"name": self.sessions.served.name, "version": version("turnwise")},
            "instructions": told or about.get("description") or "",
        }


class McpSocket(Socket):
    """WS ``/mcp``: JSON-RPC and nothing else, one environment a socket."""

    def __init__(self, sessions: Sessions, mcp: Mcp) -> None:
        super().__init__(sessions)
        self.rpc = mcp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await McpConnection(self, receive, send).serve()


class McpConnection(Connection):
    """One such socket and its session."""

    def __init__(self, endpoint: McpSocket, receive: Receive, send: Send) -> None:
        super().__init__(endpoint, receive, send)
        self._rpc, self._handshaken = endpoint.rpc, False

    async def _answer(self, live: Live, text: str | bytes) -> str | None:
        request: Any = None
        try:
            request = load(text)
            if _is_notification(request):
                return ""
            self._handshaken |= isinstance(request, dict) and request.get("method") == "initialize"
            return dumped(await self._rpc(live, request, mcp=self._handshaken)).decode()
        except RpcError as wrong:
            return dumped(_error(request, wrong)).decode()

    def _told(self, code: wire.Code, message: str, **more: Any) -> str:
        return dumped(_error(None, RpcError(SERVER_ERROR, message, {"code": code, **more}))).decode()


# -- JSON-RPC ------------------------------------------------------------------------------------------


def load(text: str | bytes) -> Any:
    """A body or frame.

    Raises:
        RpcError: It is no JSON.
    """
    try:
        return wire.asked(text)
    except wire.FrameError as error:
        raise RpcError(PARSE_ERROR, f"Parse error: {error}") from error


def read(request: Any) -> tuple[str, Mapping[str, Any], str | int | None]:
    """Method, parameters and id of a request.

    Raises:
        RpcError: It is none.
    """
    if not isinstance(request, dict):
        raise RpcError(INVALID_REQUEST, f"a request is a JSON object; found {type(request).__name__}")
    method, params, id = request.get("method"), request.get("params", {}), request.get("id")
    if request.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise RpcError(
            INVALID_REQUEST, 'a request is {"jsonrpc": "2.0", "method": …, "params": {…}, "id": …}'
        )
    if not isinstance(params, dict):
        raise RpcError(INVALID_REQUEST, f"params is an object; found {type(params).__name__}")
    if not (id is None or type(id) in (str, int)):
        raise RpcError(INVALID_REQUEST, f"an id is text or a whole number; found {type(id).__name__}")
    if len(request) > 3 and (extra := set(request) - KEYS):
        raise RpcError(INVALID_REQUEST, f"a request has no such keys: {', '.join(sorted(extra))[:200]}")
    return method, params, id


def dumped(answer: Mapping[str, Any]) -> bytes:
    """A response as JSON; where its result is none, an error in its place."""
    try:
        return wire.dump(answer)
    except EnvError as error:
        return wire.dump(_error(answer, RpcError(INTERNAL_ERROR, str(error))))


def _result(id: str | int | None, result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "result": result}


def _error(request: Any, wrong: RpcError) -> dict[str, Any]:
    id = request.get("id") if isinstance(request, Mapping) else None
    error = {"code": wrong.code, "message": message_of(wrong), "data": wrong.data}
    return {"jsonrpc": "2.0", "id": id if type(id) in (str, int) else None, "error": error}


def _is_notification(request: Any) -> bool:
    """Whether no answer is owed. OpenEnv's requests need no id, so a missing one does not tell."""
    method = request.get("method") if isinstance(request, dict) else None
    return isinstance(method, str) and method.startswith("notifications/") and "id" not in request


# -- tools ---------------------------------------------------------------------------------------------


def _listed(tool: Mapping[str, Any], *, mcp: bool) -> Mapping[str, Any]:
    schema = tool["input_schema"]
    listed = {"name": tool["name"], "description": tool["description"], "inputSchema": schema}
    return listed if mcp else {**listed, "input_schema": schema}


async def _call(session: ServedSession, params: Mapping[str, Any], *, mcp: bool) -> Mapping[str, Any]:
    name, arguments = params.get("name"), params.get("arguments")
    if not name or not isinstance(name, str):
        raise RpcError(INVALID_PARAMS, "Missing 'name' in params")
    if name in RESERVED_TOOL_NAMES:
        raise RpcError(INVALID_PARAMS, f"Unknown tool: {name}: no agent controls the episode")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RpcError(INVALID_PARAMS, f"arguments is an object; found {type(arguments).__name__}")
    answer = await session.call_tool(name, arguments)
    if answer.is_error:
        told = "\n".join(str(block.get("text", "")) for block in answer.content)
        if name not in {tool["name"] for tool in await session.list_tools()}:
            raise RpcError(INVALID_PARAMS, told)
        if not mcp:  # There a tool that fails is an error of the request.
            raise RpcError(INTERNAL_ERROR, told)
    return _mcp_result(answer) if mcp else _openenv_result(answer)


def _mcp_result(answer: CallAnswer) -> Mapping[str, Any]:
    result: dict[str, Any] = {"content": list(answer.content), "isError": answer.is_error}
    if answer.is_error:
        return result
    if isinstance(answer.data, Mapping):
        result["structuredContent"] = answer.data
    elif answer.data is not None:
        # What is no object must be in one; FastMCP's clients know this mark and take it out again.
        result["structuredContent"] = {"result": answer.data}
        result["_meta"] = {"fastmcp": {"wrap_result": True}}
    return result


def _openenv_result(answer: CallAnswer) -> Mapping[str, Any]:
    """As openenv-core's server sends what FastMCP's client returned."""
    data = answer.data
    wrapped = data if isinstance(data, Mapping) else None if data is None else {"result": data}
    return {
        "content": list(answer.content),
        "structured_content": wrapped,
        "meta": None,
        "data": data,
        "is_error": answer.is_error,
    }
