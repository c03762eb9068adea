"""Whether an OpenEnv server, or a package that is to become one, is fit to train on, whoever wrote it.

    report = await validate("http://127.0.0.1:8000", Options(sessions=8))
    report = await validate(Path("shop"), Options())

`turnwise.envs.check` does the same for classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.errors import EnvError, said
from turnwise.openenv.client.address import address
from turnwise.openenv.validate.behaviour import check_concurrency, check_leaks, check_seeds
from turnwise.openenv.validate.conformance import check_frames, check_http
from turnwise.openenv.validate.folder import check_package, check_process, provider, started
from turnwise.openenv.validate.player import Player
from turnwise.openenv.validate.report import Finding, Report

__all__ = ["Finding", "Options", "Report", "validate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a target is looked at."""

    sessions: int = 8
    """How many at once."""
    seconds: float = 10.0
    """For each answer."""
    start_seconds: float = 60.0
    """For a package's server to get ready."""
    token: str | None = None
    """For a server that asks for one."""
    action: Mapping[str, Any] | None = None
    """What to do in every step; None samples the server's schemas."""
    python: str | None = None
    """The interpreter that has a package's dependencies; None is this one."""


async def validate(target: str | Path, options: Options) -> Report:
    """Look at a running server, or start a package's and look at that.

    Args:
        target: A URL, or the package's folder.
        options: How.

    Raises:
        EnvSpecError: No URL, or no folder.
    """
    if isinstance(target, str):
        url, headers = address(target, options.token)
        report = Report(target=url)
        player = Player(url=url, seconds=options.seconds, headers=headers, action=options.action)
        await check_server(report, player, options)
        return report
    report = Report(target=str(target))
    server = provider(target, python=options.python)
    if not check_package(report, target):
        return report
    try:
        if (started_at := await started(report, server, options.start_seconds)) is not None:
            player = Player(url=started_at, seconds=options.seconds, action=options.action)
            if await check_server(report, player, options):
                await check_process(report, player, server)
    finally:
        await asyncio.shield(asyncio.to_thread(server.stop))
    return report


async def check_server(report: Report, player: Player, options: Options) -> bool:
    """Everything about a server that can be seen from outside; whether it answered to the end."""
    try:
        if not await check_http(report, player) or not await check_frames(report, player):
            return False
        comparable = await check_seeds(report, player)
        places = await check_concurrency(report, player, sessions=options.sessions, comparable=comparable)
        await check_leaks(report, player, places=places)
    except (EnvError, OSError, TimeoutError) as error:
        report.add(
            "answers", "conformance", "error", f"it stopped answering: {said(error)}",
            "nothing after this was looked at; a slow server needs a larger --seconds",
        )  # fmt: skip
        return False
    return True
