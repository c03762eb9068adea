"""`RemoteSpec`: an environment that is given as the address of an OpenEnv server, whoever wrote it.

    make("http://127.0.0.1:8000")
    make(["http://10.0.0.1:8000", "http://10.0.0.2:8000"], args={"show": "board"})

What the server offers is asked for when the spec is made, so that a wrong address is an error then. Each
session is a connection of its own, to the least busy server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import httpx

from turnwise.envs import observe
from turnwise.envs.session import Limits, Session
from turnwise.errors import EnvError, EnvLostError, EnvSpecError, TaskError, boundary, said
from turnwise.openenv import payload
from turnwise.openenv.client import background
from turnwise.openenv.client.actions import TypedAction, typed_actions
from turnwise.openenv.client.balance import servers
from turnwise.openenv.client.discovery import About, http, look, mcp_tools
from turnwise.openenv.client.options import Options, options_of
from turnwise.openenv.client.peer import PeerSession
from turnwise.openenv.client.session import Remote, RemoteSession
from turnwise.openenv.client.socket import base_url
from turnwise.types import Task, ToolSchema

log = logging.getLogger(__name__)

OWN = ("reset", "show", "cumulative", "reply", "system", "forfeit")
"""Options that a Turnwise server leaves nothing to."""
RETRY_SECONDS = 0.5
LISTING_SECONDS = 60.0
"""For a place on a server, and then for its tools."""


class RemoteSpec:
    """A `turnwise.envs.session.EnvSpec`; made by `make_spec`."""

    def __init__(self, remote: Remote) -> None:
        self.remote, self.urls = remote, remote.urls

    @property
    def name(self) -> str:
        """What the run calls it; the server's name for it if it was not said."""
        return self.remote.name

    @property
    def tools(self) -> tuple[ToolSchema, ...]:
        """Those that are known without an episode."""
        return self.remote.tools

    @property
    def limits(self) -> Limits:
        """A Turnwise server's own; none elsewhere."""
        about = self.remote.about
        return Limits(max_turns=about.max_turns, max_tool_calls=about.max_tool_calls)

    @property
    def forfeit(self) -> float:
        """What ``args`` say, else the server."""
        given = self.remote.options.forfeit
        return self.remote.about.forfeit if given is None else given

    @property
    def fingerprint(self) -> str:
        """Hash of what the server says and of what ``args`` make of it, wherever the server is."""
        tools = [tool.as_function() for tool in self.remote.tools]
        parts = [self.remote.about.identity, self.remote.options.identity, tools]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def tasks(self, split: str) -> Iterator[Task]:
        """The rows of a split, as the first server that answers lists them; one empty row where none are.

        Raises:
            TaskError: The server has no such split, or its rows are none.
            EnvLostError: No server answers.
        """
        path = self.remote.about.tasks_path
        if path is None:
            yield {}
            return
        what = f"environment {self.name}: tasks('{split}')"
        for number, row in enumerate(self._listed(f"{path}/tasks", split, what)):
            if self.remote.about.peer:
                yield payload.read_task(row["task"])
            else:  # By these two a reset finds it again.
                yield {"split": split, "index": number, **observe.task_row(row, f"{what}: row {number}")}

    async def open(self, limits: Limits) -> Session:
        """A connection with a live environment behind it.

        Raises:
            EnvError: As for `turnwise.openenv.client.balance.Servers.open`.
        """
        kind = PeerSession if self.remote.about.peer else RemoteSession
        session = kind(self.remote, limits)
        await session.connect()
        return session

    def _listed(self, path: str, split: str, what: str) -> list[Any]:
        lost: list[str] = []
        for url in self.urls:
            try:
                with httpx.Client(**http(url, self.remote.headers)) as client:
                    response = client.post(path, json={"split": split})
            except httpx.HTTPError as cause:
                lost.append(f"{url}: {said(cause)}")
                continue
            if response.status_code == 429 or response.status_code >= 500:
                lost.append(f"{url}: HTTP {response.status_code}")
                continue
            if response.status_code in (400, 404, 422):
                raise TaskError(f"{what}: {url} has no such split: {response.text[:200]}")
            with boundary(TaskError, f"{what}: {url} answers with no JSON"):
                rows = response.json().get("tasks") if response.status_code == 200 else None
            if not isinstance(rows, list) or not rows:
                raise TaskError(f"{what}: {url} lists no tasks: HTTP {response.status_code}")
            return rows
        raise EnvLostError(f"{what}: no server answers: {'; '.join(lost)}")


def make_spec(
    urls: str | Sequence[str], /, name: str | None, args: Mapping[str, Any], *, prompts: bool = False
) -> RemoteSpec:
    """The environment behind one server or several that are alike.

    Args:
        urls: ``http://host:port`` each.
        name: What the run calls it; the server's own name if None.
        args: `turnwise.openenv.client.options.Options`.
        prompts: Rows hold a ``prompt``, which stands before what the environment says.

    Raises:
        EnvSpecError: No server answers, they differ, or they cannot be played on with these ``args``.
    """
    return background.run(discover(urls, name, args, prompts=prompts))


async def discover(
    urls: str | Sequence[str], /, name: str | None, args: Mapping[str, Any], *, prompts: bool = False
) -> RemoteSpec:
    """`make_spec`, where a loop runs.

    Raises:
        EnvSpecError: As for `make_spec`.
    """
    bases = list(dict.fromkeys(map(base_url, [urls] if isinstance(urls, str) else urls)))
    if not bases:
        raise EnvSpecError("an environment on servers needs the address of at least one")
    what = name or bases[0]
    options = options_of(args, what)
    headers = options.request_headers
    try:
        about, seen, bases = await _alike(bases, headers, options.patience)
        if not about.peer:
            about = await _with_tools(about, bases, seen, headers, options)
    except EnvError as error:
        raise EnvSpecError(f"environment {what}: {error}") from error
    if about.peer and (set_here := sorted(set(args) & set(OWN))):
        raise EnvSpecError(
            f"environment {what}: args.{set_here[0]} does nothing with a Turnwise server, which says itself "
            "what its environment shows and pays; remove it"
        )
    return RemoteSpec(
        Remote(
            name=name or about.name,
            about=about,
            options=options,
            urls=tuple(bases),
            seen=seen,
            headers=headers,
            prompts=prompts,
        )
    )


async def _alike(
    urls: Sequence[str], headers: Mapping[str, str], patience: float
) -> tuple[About, tuple[str, ...], list[str]]:
    """What all servers that answer say, which those are, and all; redirects lead to other addresses."""
    began = monotonic()
    while True:
        found = await asyncio.gather(*(look(url, headers) for url in urls), return_exceptions=True)
        abouts: dict[str, About] = {}
        lost: dict[str, EnvLostError] = {}
        for url, about in zip(urls, found, strict=True):
            if isinstance(about, About):
                abouts[url] = about
            elif isinstance(about, EnvLostError):
                lost[url] = about
            else:
                raise about
        if abouts:
            break
        if monotonic() - began > patience:
            raise EnvSpecError(
                f"no server answers at {', '.join(urls)} ({next(iter(lost.values()))}); "
                "start it, for instance with `turnwise env serve`, or correct the address"
            )
        await asyncio.sleep(RETRY_SECONDS)
    (first, about), *others = abouts.items()
    for url, other in others:
        if other.identity != about.identity:
            raise EnvSpecError(
                f"{first} serves '{about.name}' and {url} serves '{other.name}', or another version of it; "
                "the servers of one environment must be alike"
            )
    if lost:
        log.warning("%s does not answer yet; %s does", ", ".join(lost), ", ".join(abouts))
    settled = [abouts[url].url if url in abouts else url for url in urls]
    return about, tuple(one.url for one in abouts.values()), list(dict.fromkeys(settled))


async def _with_tools(
    about: About, urls: Sequence[str], seen: Sequence[str], headers: Mapping[str, str], options: Options
) -> About:
    """MCP tools, asked for on a session of its own; else the one tool that stands for its actions."""
    if options.reply is not None:
        _check_shown(about, options)
        return replace(about, typed=(_reply_action(about, options.reply, urls[0]),))
    alike = servers(urls, headers, about.identity, seen)
    try:
        async with asyncio.timeout(max(options.patience, LISTING_SECONDS)):
            socket = await alike.open(LISTING_SECONDS, patience=options.patience, what=urls[0])
    except TimeoutError:
        raise EnvLostError(
            f"{', '.join(urls)}: no place came free to ask for the tools; close other sessions, or let the "
            "server have more (max_concurrent_envs)"
        ) from None
    try:
        tools = await mcp_tools(socket, about, seconds=LISTING_SECONDS)
    finally:
        await alike.release(socket)
    if tools is not None and about.speaks_mcp and (tools or about.untold is None):
        return replace(about, tools=tools)
    if about.untold is not None:
        raise EnvSpecError(
            f"{urls[0]}: {about.untold}, and it lists no MCP tools, so that its actions are not known; "
            "mend the environment's models, or name the action's field of text in args.reply"
        )
    _check_shown(about, options)
    typed = typed_actions(about.action, urls[0])
    if both := {tool.name for tool in tools or ()} & {one.schema.name for one in typed}:
        raise EnvSpecError(f"{urls[0]}: a tool and the action are both called '{both.pop()}'")
    return replace(about, tools=tools or (), typed=typed, calls="mcp")


def _check_shown(about: About, options: Options) -> None:
    """Raises `EnvSpecError` if ``args.show`` names what no observation of typed actions has."""
    unknown = [name for name in options.shown if about.shown is not None and name not in about.shown]
    if unknown:
        raise EnvSpecError(
            f"args.show: the observation has no field '{unknown[0]}'; it has {', '.join(about.shown or ())}"
        )


def _reply_action(about: About, field: str, url: str) -> TypedAction:
    if about.untold is not None:
        text = {"type": "object", "properties": {field: {"type": "string"}}, "required": [field]}
        return TypedAction(
            schema=ToolSchema(name="act", description="Act in the environment.", parameters=text),
            constants={},
        )
    typed = typed_actions(about.action, url)
    having = [one for one in typed if field in one.schema.parameters["properties"]]
    if not having:
        fields = ", ".join(name for one in typed for name in one.schema.parameters["properties"])
        raise EnvSpecError(f"args.reply: the action has no field '{field}'; it has {fields}")
    alone = [one for one in having if set(one.schema.parameters.get("required", ())) <= {field}]
    if not alone:
        missing = [name for name in having[0].schema.parameters["required"] if name != field]
        raise EnvSpecError(
            f"args.reply: a reply is '{field}' alone, and actions need {', '.join(missing)} too"
        )
    if len(alone) > 1:
        names = ", ".join(one.schema.name for one in alone)
        raise EnvSpecError(f"args.reply: '{field}' alone could be any of {names}")
    return alone[0]
