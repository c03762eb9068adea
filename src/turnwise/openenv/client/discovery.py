"""`About`: what a server says of its environment, and the tools that follow from it.

a Turnwise server      its tools, system message, limits and rewards as they are      (/metadata)
MCP tools              as tools/list has them, called by call_tool steps
neither                one tool, made from the JSON schema of its actions, or one for each member of a union
                                                                                      (/schema)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

import httpx

from turnwise.envs.registry import unsigned
from turnwise.errors import EnvLostError, EnvSpecError
from turnwise.openenv.client.actions import TypedAction, action_schema, is_mcp, mapping, members, untitled
from turnwise.openenv.client.line import message_of
from turnwise.openenv.client.refused import FORBIDDEN, GIVE_TOKEN
from turnwise.openenv.client.socket import EnvSocket, is_loopback, same_server
from turnwise.openenv.wire import PROTOCOL
from turnwise.types import ToolSchema

HTTP_SECONDS = 30.0
"""A server may make an environment to answer."""
MOST_REDIRECTS = 5
BESIDE = ("done", "reward", "metadata")
"""Fields of an observation that are sent beside it, or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a server says of its environment."""

    name: str
    url: str
    """Where it answered: on the same host, past redirects."""
    description: str
    peer: bool
    """It is a Turnwise server."""
    tools: tuple[ToolSchema, ...] = ()
    """Those that are known without an episode."""
    calls: Literal["step", "mcp"] = "step"
    """How MCP tools are called: by steps, which pay and end, or past them."""
    typed: tuple[TypedAction, ...] = ()
    """Several where the action is a union."""
    system: str | None = None
    has_step: bool = False
    max_turns: int | None = None
    max_tool_calls: int | None = None
    forfeit: float = 0.0
    teacher: bool = False
    splits: tuple[str, ...] = ()
    tasks_path: str | None = None
    """Where its tasks are listed: ``/catch``."""
    identity: str = ""
    """A hash of all this and of the schemas."""
    action: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its actions."""
    untold: str | None = None
    """Why that is not known: what ``/schema`` was answered with, on a server that is well otherwise."""
    shown: tuple[str, ...] | None = None
    """Fields of its observations; None where they are not known beforehand."""

    @property
    def speaks_mcp(self) -> bool:
        """Whether its actions are those of MCP tools: a call, a list."""
        names = set(self.action.get("properties", {})) - {"metadata"}
        if (kinds := members(self.action)) is not None:
            return all(map(is_mcp, kinds))
        return not names or {"tool_name", "arguments"} <= names


def http(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of an httpx client for a server."""
    return {
        "base_url": url,
        "headers": dict(headers),
        "timeout": HTTP_SECONDS,
        "trust_env": not is_loopback(url),
    }


async def look(url: str, headers: Mapping[str, str]) -> About:
    """What a server says over HTTP; MCP tools are asked for by `mcp_tools`.

    Raises:
        EnvLostError: It does not answer.
        EnvSpecError: It is no OpenEnv server, or refuses this client, or speaks a later protocol, or leads to
            another host.
    """
    url, found = await _settled(url, headers)
    metadata = mapping(found)
    name = str(metadata.get("name") or "env")
    ours = metadata.get("turnwise")
    async with httpx.AsyncClient(**http(url, headers)) as client:
        if isinstance(ours, Mapping):
            # Which answers, if only that it takes no GET, wherever anybody but agents may play.
            if (await _response(client, "/reset", optional=True)).status_code == 404:
                raise EnvSpecError(
                    f"{url} is in production mode: agents have its tools at /mcp, and nobody resets it; "
                    "play on a server without `--mode production`"
                )
            return _peer(name, metadata, ours, url)
        # A schema that cannot be made, as of a field that is an array, does not keep a server from playing.
        response = await _response(client, "/schema", optional=bool(metadata))
        schemas = mapping(_json(response))
        untold = f"GET /schema: HTTP {response.status_code}" if response.status_code >= 500 else None
        tasks_path = await _tasks_path(client, name) if schemas or untold else None
    if not schemas and untold is None:
        raise EnvSpecError(f"{url}: there is neither /metadata nor /schema: no OpenEnv server, or one of 0.1")
    action = {} if untold else action_schema(schemas.get("action", {}), url)
    return About(
        name=name,
        url=url,
        description=str(metadata.get("description") or ""),
        peer=False,
        action=action,
        untold=untold,
        shown=_fields(mapping(schemas.get("observation"))),
        tasks_path=tasks_path,
        identity=_hash([name, metadata.get("version"), action, schemas.get("observation")]),
    )


async def mcp_tools(socket: EnvSocket, about: About, seconds: float) -> tuple[ToolSchema, ...] | None:
    """The tools of a session as MCP lists them; None where the environment has nothing to do with MCP.

    Raises:
        EnvSpecError: A tool that cannot be described.
        EnvError: As for `EnvSocket.ask`.
    """
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    reply = await socket.ask({"type": "mcp", "data": request}, seconds=seconds)
    listed = (reply.get("data", {}).get("result") or {}).get("tools") if reply["type"] == "mcp" else None
    if listed is None and about.speaks_mcp and about.action:
        # A server from before MCP went past steps, or an environment with tools of its own making.
        reply = await socket.ask({"type": "step", "data": {"type": "list_tools"}}, seconds=seconds)
        if reply["type"] == "observation":
            listed = reply["data"].get("observation", {}).get("tools")
    if not isinstance(listed, list):
        return None
    tools = tuple(_mcp_tool(one, socket.url) for one in listed)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise EnvSpecError(f"{socket.url}: two tools have the same name: {', '.join(sorted(names))}")
    return tools


# ---------------------------------------------------------------------------------------------------


def _peer(name: str, metadata: Mapping[str, Any], ours: Mapping[str, Any], url: str) -> About:
    if ours.get("protocol") != PROTOCOL:
        raise EnvSpecError(
            f"{url}: its Turnwise speaks protocol {ours.get('protocol')!r}, this one {PROTOCOL}; "
            "install the same version on both sides"
        )
    limits = ours["limits"]
    splits = tuple(ours["splits"])
    return About(
        name=name,
        url=url,
        description=str(metadata.get("description") or ""),
        peer=True,
        tools=tuple(
            ToolSchema(
                name=one["name"],
                description=one["description"],
                parameters=one["parameters"],
                shown=one.get("shown"),
            )
            for one in ours["tools"]
        ),
        system=ours["system"],
        has_step=ours["has_step"],
        max_turns=limits["max_turns"],
        max_tool_calls=limits["max_tool_calls"],
        forfeit=ours["forfeit"],
        teacher=ours["teacher"],
        splits=splits,
        tasks_path=f"/{quote(name)}" if splits else None,
        identity=ours["fingerprint"],
    )


def _fields(schema: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names in an observation, as it is sent, by its schema; None where that leaves others open."""
    names = [name for name in mapping(schema.get("properties")) if name not in BESIDE]
    return None if schema.get("additionalProperties", True) else tuple(names)


async def _settled(url: str, headers: Mapping[str, str]) -> tuple[str, Any]:
    """The address that a server's redirects lead to, and its metadata; other hosts are sent no headers."""
    for _ in range(MOST_REDIRECTS):
        async with httpx.AsyncClient(**http(url, headers)) as client:
            response = await _response(client, "/metadata")
        if not response.has_redirect_location:
            return url, _json(response)
        to = unsigned(str(response.url.join(response.headers["location"])))
        if not (same_server(url, to) and to.endswith("/metadata")):
            raise EnvSpecError(f"{url} leads to {to}; if that is the server that you mean, give its address")
        url = to.removesuffix("/metadata")
    raise EnvSpecError(f"{url}: its redirects do not end")


async def _tasks_path(client: httpx.AsyncClient, name: str) -> str | None:
    """Where the Task API lists tasks, on servers that have it and for environments that have some."""
    names = _json(await _response(client, "/list_environments", optional=True))
    listed = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else name
    path = f"/{quote(listed)}"
    return path if _json(await _response(client, f"{path}/splits", optional=True)) else None


async def _response(client: httpx.AsyncClient, path: str, *, optional: bool = False) -> httpx.Response:
    """What a server answers; where it fails at what is not ``optional``, it may be asked again."""
    url = str(client.base_url).rstrip("/")
    try:
        response = await client.get(path)
    except httpx.HTTPError as cause:
        raise EnvLostError(f"{url}{path}: {cause or type(cause).__name__}") from cause
    if response.status_code == 401:
        raise EnvSpecError(f"{url}: HTTP 401: it wants a token, or another one: {GIVE_TOKEN}")
    if response.status_code == 403:
        raise EnvSpecError(f"{url}{path}: HTTP 403: {FORBIDDEN}")
    status = response.status_code
    if status in (429, 502, 503, 504) or (status >= 500 and not optional):
        raise EnvLostError(f"{url}{path}: HTTP {status}")
    return response


def _json(response: httpx.Response) -> Any:
    """None where the server has no such path."""
    try:
        return response.json() if response.status_code == 200 else None
    except ValueError:
        return None


def _mcp_tool(listed: Any, url: str) -> ToolSchema:
    if not isinstance(listed, Mapping) or not isinstance(listed.get("name"), str):
        raise EnvSpecError(f"{url}: tools/list holds what is no tool: {listed!r:.80}")
    # SDKs differ in how they spell it.
    schema = listed.get("input_schema") or listed.get("inputSchema") or {}
    return ToolSchema(
        name=listed["name"],
        description=str(listed.get("description") or "").strip(),
        parameters={"type": "object", "properties": {}, **untitled(schema)},
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def told(reply: Mapping[str, Any]) -> str:
    """What an error frame says, with where an action was wrong."""
    data = reply.get("data")
    errors = data.get("errors") if isinstance(data, Mapping) else None
    if not isinstance(errors, list) or not errors:
        return message_of(reply)
    parts = [one for one in errors if isinstance(one, Mapping)]
    return "; ".join(
        f"{'.'.join(map(str, one.get('loc', ()))) or 'action'}: {one.get('msg', '')}" for one in parts
    )
