"""Whether a server speaks OpenEnv: its HTTP routes, its frames, its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from turnwise.errors import said
from turnwise.openenv.client.line import code_of, message_of
from turnwise.openenv.client.socket import is_loopback, websocket_url
from turnwise.openenv.models import RESERVED_TOOL_NAMES
from turnwise.openenv.validate.player import Player, Reply, data_of
from turnwise.openenv.validate.report import Report
from turnwise.openenv.wire import load

EPISODE = "turnwise-validate"


async def check_http(report: Report, player: Player) -> bool:
    """The routes; whether anybody is there. Sets the player's schema."""
    async with httpx.AsyncClient(
        base_url=player.url,
        headers=dict(player.headers),
        timeout=player.seconds,
        trust_env=not is_loopback(player.url),
    ) as client:
        health = await fetch(client, "/health")
        well = isinstance(health, dict) and health.get("status") == "healthy"
        report.add(
            "health", "conformance", "ok" if well else "error", f"GET /health: {short(health)}",
            'answer {"status": "healthy"}: launchers wait for it',
        )  # fmt: skip
        if isinstance(health, str):
            return False
        api = await fetch(client, "/openapi.json")
        version = api.get("info", {}).get("version") if isinstance(api, dict) else None
        report.add(
            "openapi", "conformance", "ok" if isinstance(version, str) else "error",
            f"GET /openapi.json: version {version}", "give the API a version: `openenv validate` reads it",
        )  # fmt: skip
        paths = api.get("paths", {}) if isinstance(api, dict) else {}
        has = [path for path in ("/reset", "/step", "/state") if path in paths]
        report.add(
            "mode", "conformance", "ok" if len(has) in (0, 3) else "error",
            f"{'simulation' if has else 'production'} mode: {', '.join(has) or 'no /reset, /step, /state'}",
            "offer all of /reset, /step and /state (simulation), or none (production)",
        )  # fmt: skip
        about = await fetch(client, "/metadata")
        named = isinstance(about, dict) and all(
            isinstance(about.get(key), str) for key in ("name", "description")
        )
        report.add(
            "metadata", "conformance", "ok" if named else "error",
            f"GET /metadata: {short(about.get('name') if isinstance(about, dict) else about)}",
            "answer with name and description",
        )  # fmt: skip
        schemas = await fetch(client, "/schema")
        whole = isinstance(schemas, dict) and all(
            isinstance(schemas.get(key), dict) for key in ("action", "observation", "state")
        )
        report.add(
            "schema", "conformance", "ok" if whole else "error",
            f"GET /schema: {', '.join(schemas) if isinstance(schemas, dict) else schemas}",
            "answer with the JSON schemas of action, observation and state",
        )  # fmt: skip
        if isinstance(schemas, dict) and isinstance(schemas.get("action"), dict):
            player.schema = schemas["action"]
        rpc = await fetch(client, "/mcp", post={})
        speaks = isinstance(rpc, dict) and rpc.get("jsonrpc") == "2.0"
        report.add(
            "mcp", "conformance", "ok" if speaks else "error", f"POST /mcp: {short(rpc)}",
            "answer JSON-RPC at /mcp: agents look for tools there",
        )  # fmt: skip
    return True


async def fetch(client: httpx.AsyncClient, path: str, *, post: Any = None) -> Any:
    """The JSON of a route; text that says what was there in its place."""
    try:
        response = await (client.get(path) if post is None else client.post(path, json=post))
        body = response.json()
    except (httpx.HTTPError, ValueError) as error:
        return said(error)
    return body if response.status_code == 200 else f"HTTP {response.status_code}"


async def check_frames(report: Report, player: Player) -> bool:
    """An episode's frames; whether one can be started at all. Sets the player's tools."""
    async with player.session() as socket:
        first = await player.ask(socket, "reset", {"seed": 0, "episode_id": EPISODE})
        data = data_of(first)
        reward = data.get("reward")
        well = (
            first.get("type") == "observation"
            and isinstance(data.get("observation"), dict)
            and isinstance(data.get("done"), bool)
            and (reward is None or isinstance(reward, (int, float)))
        )
        report.add(
            "reset", "conformance", "ok" if well else "error", f"reset: {short(first)}",
            "answer a reset with {observation: {…}, reward: number or null, done: bool}",
        )  # fmt: skip
        if first.get("type") == "error":
            return False
        state = data_of(await player.ask(socket, "state"))
        counted = isinstance(state.get("step_count"), int) and "episode_id" in state
        report.add(
            "state", "conformance", "ok" if counted else "error", f"state: {short(state)}",
            "answer with episode_id and step_count at least",
        )  # fmt: skip
        report.add(
            "episode_id", "conformance", "ok" if state.get("episode_id") == EPISODE else "warning",
            f"episode_id of the state: {state.get('episode_id')!r}",
            "take the episode_id that reset() is given, so that clients can find their episodes",
        )  # fmt: skip
        await check_tools(report, player, await player.ask(socket, "step", {"type": "list_tools"}))
        await player.reset(socket, 0)
        (action,) = player.actions(0, 1)
        reply = await player.ask(socket, "step", action)
        check_step(report, action, reply)
        refused = await player.ask(socket, "step", {"no_such_field_of_any_action": 1})
        report.add(
            "bad_action", "conformance", "ok" if code_of(refused) == "VALIDATION_ERROR" else "warning",
            f"a step with an unknown field: {short(refused)}",
            "answer VALIDATION_ERROR: a policy's mistake must not pass as an action, nor look like a crash",
        )  # fmt: skip
        alive = (await player.reset(socket, 0)).get("type") == "observation"
        report.add(
            "after_error", "conformance", "ok" if alive else "error",
            f"the session {'goes on' if alive else 'is gone'} after a bad action",
            "keep the session after an error that the policy caused",
        )  # fmt: skip
    await check_garbage(report, player)
    return True


def check_step(report: Report, action: Mapping[str, Any], reply: Reply) -> None:
    """How a step was answered whose action is as the schema has it."""
    found = f"step {short(action)}: {short(reply)}"
    code = code_of(reply)
    if reply.get("type") == "observation":
        report.add("step", "conformance", "ok", found)
    elif code == "VALIDATION_ERROR":
        report.add(
            "step", "conformance", "warning", found,
            "the sampled action was not taken: give one that is, with --action '{…}'",
        )  # fmt: skip
    elif code == "EXECUTION_ERROR":
        report.add(
            "step", "conformance", "error",
            f"step {short(action)}: the environment raised: {message_of(reply)}",
            "mend it; what a policy does wrong is to be answered by an observation, or by VALIDATION_ERROR",
        )  # fmt: skip
    else:
        report.add(
            "step", "conformance", "error", found,
            "answer a step with {observation: {…}, reward: number or null, done: bool}",
        )  # fmt: skip


async def check_tools(report: Report, player: Player, reply: Reply) -> None:
    """The tools, where there are some."""
    listed = data_of(reply).get("observation", {}).get("tools") or []
    rows = [row for row in listed if isinstance(row, dict)]
    player.tools = [
        {"name": row.get("name"), "input_schema": row.get("input_schema", row.get("inputSchema", {}))}
        for row in rows
    ]
    names = [str(row.get("name")) for row in rows]
    wrong = sorted(RESERVED_TOOL_NAMES & set(names))
    report.add(
        "tools", "conformance", "error" if wrong else "ok",
        f"tools: {', '.join(names) or 'none; actions are typed'}",
        f"rename {', '.join(wrong)}: OpenEnv keeps these names",
    )  # fmt: skip


async def check_garbage(report: Report, player: Player) -> None:
    """Frames that are none: they are answered, and the session goes on."""
    async with connect(
        websocket_url(player.url),
        additional_headers=dict(player.headers),
        proxy=None if is_loopback(player.url) else True,
        open_timeout=player.seconds,
        close_timeout=1,
        max_size=None,
    ) as socket:
        for id, frame, code in (
            ("invalid_json", "{", "INVALID_JSON"),
            ("unknown_type", '{"type": "no_such_type"}', "UNKNOWN_TYPE"),
        ):
            found = code_of(await exchange(socket, frame, player.seconds))
            report.add(
                id, "conformance", "ok" if found == code else "warning",
                f"a frame {frame} was answered {found}", f"answer {code}, and keep the session",
            )  # fmt: skip


async def exchange(socket: ClientConnection, frame: str, seconds: float) -> Reply:
    """A raw frame and its answer."""
    await socket.send(frame)
    async with asyncio.timeout(seconds):
        answer = load(await socket.recv())
    return answer if isinstance(answer, dict) else {}


def short(value: Any) -> str:
    """A value in one line of a table."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
