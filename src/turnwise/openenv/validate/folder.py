"""An OpenEnv package before it is published: what is in it, and what its server does here."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from turnwise.errors import EnvSpecError, said
from turnwise.openenv.push import package
from turnwise.openenv.run.process import ProcessProvider
from turnwise.openenv.run.ready import StartError
from turnwise.openenv.validate.player import Player
from turnwise.openenv.validate.report import Report

ROUNDS = 4
ROUND_SESSIONS = 16
GROWTH_BYTES = 1 << 20
"""Of a session that is over; an environment that keeps less for each is told from noise by nobody."""
SETTLE_SECONDS = 0.5
TOKENS = ("TURNWISE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Variables of whoever runs this, which a package's server is not given; what it needs itself stays."""


def check_package(report: Report, folder: Path) -> bool:
    """The files that Docker, uv, a Space and `openenv validate` look for; whether it can be started."""
    try:
        name = package(folder).name
    except EnvSpecError as error:
        report.add("package", "package", "error", str(error), "see `turnwise env new`")
    else:
        report.add("package", "package", "ok", f"{name}: its files and the Space's front matter")
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        report.add(
            "pyproject", "package", "error", f"pyproject.toml: {said(error)}", "write one: uv needs it"
        )
        return (folder / "server/app.py").exists()
    script = str(project.get("scripts", {}).get("server", ""))
    needs = [re.split(r"[^a-z0-9_-]", str(one).lower())[0] for one in project.get("dependencies", [])]
    locked = (folder / "uv.lock").exists()
    named = any(one.startswith("openenv") for one in needs)
    report.add(
        "script", "package", "ok" if script.endswith(":main") else "error",
        f"[project.scripts] server = {script!r}",
        'write server = "NAME.server.app:main", for `uv run server`',
    )  # fmt: skip
    report.add(
        "dependency", "package", "ok" if named else "error", f"dependencies: {', '.join(needs)}",
        "name openenv-core: `openenv validate` asks for it",
    )  # fmt: skip
    report.add(
        "lock", "package", "ok" if locked else "error", f"uv.lock is {'there' if locked else 'missing'}",
        "run `uv lock`: images are built from it",
    )  # fmt: skip
    app = folder / "server/app.py"
    text = app.read_text(encoding="utf-8") if app.exists() else ""
    guarded = "def main(" in text and re.search(r"^if __name__ == .__main__.:\s+main\(", text, re.MULTILINE)
    report.add(
        "main", "package", "ok" if guarded else "error",
        f"server/app.py: {'main()' if guarded else 'no main()'}",
        'write main() and call it under if __name__ == "__main__"',
    )  # fmt: skip
    return app.exists()


def provider(folder: Path, *, python: str | None) -> ProcessProvider:
    """The package's server, with ``python``, or the interpreter that runs this."""
    environment = {name: value for name, value in os.environ.items() if name not in TOKENS}
    return ProcessProvider.of_folder(folder, python=python or sys.executable, environment=environment)


async def check_process(report: Report, player: Player, server: ProcessProvider) -> None:
    """What sessions leave behind in the server's process: memory, threads, files."""
    process = server.pid
    if process is None or not Path(f"/proc/{process}/status").exists():
        report.add("process", "leaks", "skipped", "the process can be looked into on Linux alone")
        return
    readings = []
    for _ in range(ROUNDS):
        for seed in range(ROUND_SESSIONS):
            async with player.session() as socket:
                await player.episode(socket, seed, steps=2)
        await asyncio.sleep(SETTLE_SECONDS)
        readings.append(usage(process))
    # The first round fills caches and pools, which is no leak.
    first, last = readings[1], readings[-1]
    over = (ROUNDS - 2) * ROUND_SESSIONS
    for id, noun, bound, advice in (
        ("memory", "bytes", GROWTH_BYTES, "release in close() what an episode holds"),
        ("threads", "threads", 0.25, "end the environment's threads in close()"),
        ("files", "open files", 0.25, "close files and sockets in close()"),
    ):
        growth = (last[id] - first[id]) / over
        report.add(
            id, "leaks", "ok" if growth < bound else "error",
            f"{growth:+,.2f} {noun} for each of {over} sessions that are over", advice,
        )  # fmt: skip


def usage(pid: int) -> Mapping[str, int]:
    """Resident memory in bytes, threads, and open files of a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "memory": int(fields["VmRSS"].split()[0]) * 1024,
        "threads": int(fields["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


async def started(report: Report, server: ProcessProvider, seconds: float) -> str | None:
    """The URL of the package's server; None where it does not start."""
    try:
        url = server.start()
        await asyncio.to_thread(server.wait_for_ready, seconds)
    except StartError as error:
        report.add(
            "starts", "package", "error", str(error),
            "install what it needs here (uv sync, pip install -e .), or name its interpreter with --python",
        )  # fmt: skip
        return None
    report.add("starts", "package", "ok", "its server starts")
    return url
