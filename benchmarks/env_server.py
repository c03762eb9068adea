"""Turnwise's environment server beside openenv-core's: what a step, a session and a client cost.

    python benchmarks/env_server.py [--json PATH] [--rows sync,tool,…] [--sessions 64] [--pairs 5]

    sync, inline, async, tool   microseconds of server CPU per step at 64 sessions; their client on both
    sessions                    memory of the server per open session, KiB; and `opening`, seconds until 1,000
                                sessions that open at once have all been reset
    client, client_async        steps per second at 64 sessions, each `EnvClient` on its own server
    client_train                the same, with what a training run plays on in place of our `EnvClient`

Each server is a process of its own, under uvloop, on loopback. The two take turns, and medians of the pairs
are compared. CPU is what the kernel says the server's process used, in user and system mode, from the first
step to the last: neighbours on the machine matter less to it than to seconds. Each reply is compared with
what was said; one wrong reply and nothing is written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop
from openenv.core.generic_client import GenericEnvClient

HERE = Path(__file__).resolve().parent
TICK = os.sysconf("SC_CLK_TCK")
OPENED = 1000
"""Sessions of the row `sessions`."""
WARM = 10
"""Steps of each session before anything is counted."""

Client = GenericEnvClient  # or Turnwise's, which has the same face
Payload = Callable[[str], dict[str, Any]]


class Server:
    """One server process, from ready to ended."""

    def __init__(self, command: Sequence[str], *, sessions: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--max-sessions", str(sessions)],
            stdout=self._log, stderr=self._log, cwd=HERE.parent,
        )  # fmt: skip

    def wait(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self._process.args} did not come up:\n{self.log()}")

    def cpu(self) -> float:
        """Seconds of processor so far, all threads, those that ended too."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory(self) -> int:
        """KiB that are the process's own."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def ours(env_class: str, *, sessions: int) -> Server:
    return Server(["-m", "turnwise", "env", "serve", f"benchmarks/echo.py:{env_class}"], sessions=sessions)


def theirs(kind: str, *, sessions: int) -> Server:
    return Server(["benchmarks/echo_openenv.py", kind], sessions=sessions)


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Until the block ends."""
    try:
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.close()


@dataclass(frozen=True, kw_only=True)
class Played:
    """One block of steps on one server."""

    seconds: float
    cpu: float
    """Of the server, seconds."""
    steps: int

    @property
    def micros(self) -> float:
        """Of the server's processor, per step."""
        return self.cpu / self.steps * 1e6

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds


def said(number: int) -> str:
    """100 bytes that differ from step to step: an answer to an earlier one is no answer."""
    return f"{number:08d}".ljust(100, ".")


def heard(observation: dict[str, Any]) -> Any:
    """What came back: an observation's text, or a tool's result in either server's spelling."""
    if "result" not in observation:
        return observation["text"]
    result = observation["result"]
    return result["data"] if isinstance(result, dict) else result


class Trained:
    """What a recipe's URL is played on by, with an `EnvClient`'s face."""

    def __init__(self, base_url: str, **_: Any) -> None:
        self.url = base_url

    async def connect(self) -> None:
        from turnwise.envs.registry import make
        from turnwise.envs.session import Limits

        self.session = await make(self.url).open(Limits())

    async def reset(self) -> None:
        await self.session.reset({}, 0)

    async def step(self, action: dict[str, Any]) -> Any:
        from turnwise.types import Message

        told = (await self.session.step(Message.assistant(action["text"]))).observation
        return SimpleNamespace(observation={"text": told if isinstance(told, str) else told[0].text})

    async def close(self) -> None:
        await self.session.close()


@contextlib.asynccontextmanager
async def opened(make: type[Client], url: str, count: int) -> AsyncIterator[list[Client]]:
    """Clients, connected and reset all at once."""
    clients = [make(base_url=url, message_timeout_s=120.0, connect_timeout_s=120.0) for _ in range(count)]
    try:
        await asyncio.gather(*(client.connect() for client in clients))
        await asyncio.gather(*(client.reset() for client in clients))
        yield clients
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def play(make: type[Client], server: Server, payload: Payload, *, sessions: int, steps: int) -> Played:
    """``steps`` of each of ``sessions``, none waiting for another."""

    async def one(client: Client, first: int, count: int) -> None:
        for number in range(first, first + count):
            text = said(number)
            result = await client.step(payload(text))
            if heard(result.observation) != text:
                raise RuntimeError(f"said {text!r}, heard {result.observation!r}")

    async with opened(make, server.url, sessions) as clients:
        await asyncio.gather(*(one(client, i * 10**5, WARM) for i, client in enumerate(clients)))
        cpu, start = server.cpu(), time.perf_counter()
        await asyncio.gather(*(one(client, i * 10**5 + WARM, steps) for i, client in enumerate(clients)))
        # The kernel counts in ticks of 10 ms: a few steps may take none.
        seconds, cpu = time.perf_counter() - start, max(server.cpu() - cpu, 1 / TICK)
    return Played(seconds=seconds, cpu=cpu, steps=sessions * steps)


def reply(text: str) -> dict[str, Any]:
    return {"type": "reply", "text": text}


def message(text: str) -> dict[str, Any]:
    return {"message": text}


def call(text: str) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": "echo", "arguments": {"message": text}}


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What is served and said on either side."""

    ours: str
    theirs: str
    say: tuple[Payload, Payload] = (reply, message)
    steps: int = 200
    """Of each session, in each block."""


STEP_ROWS = {
    "sync": StepRow(ours="Echo", theirs="sync"),
    "inline": StepRow(ours="InlineEcho", theirs="async"),
    "async": StepRow(ours="AsyncEcho", theirs="async"),
    "tool": StepRow(ours="Echo", theirs="tool", say=(call, call), steps=40),
}
CLIENT_ROWS = {
    "client": STEP_ROWS["sync"],
    "client_async": STEP_ROWS["async"],
    "client_train": STEP_ROWS["sync"],
}
ROWS = (*STEP_ROWS, "sessions", *CLIENT_ROWS)

Row = dict[str, Any]


def row(name: str, unit: str, found: Sequence[tuple[float, float]], *, more_is_better: bool = False) -> Row:
    """Medians of (ours, theirs), and how many times better ours is."""
    mine, other = (statistics.median(side) for side in zip(*found, strict=True))
    ratio = mine / other if more_is_better else other / mine
    return {
        "name": name,
        "unit": unit,
        "ours": round(mine, 2),
        "theirs": round(other, 2),
        "ratio": round(ratio, 2),
    }


async def step_pairs(
    spec: StepRow, clients: tuple[type[Client], type[Client]], *, sessions: int, pairs: int
) -> list[tuple[Played, Played]]:
    """(ours, theirs), as often as asked; who is first alternates."""
    servers = ours(spec.ours, sessions=sessions), theirs(spec.theirs, sessions=sessions)
    found = []
    with running(*servers):
        for pair in range(pairs):
            both: dict[int, Played] = {}
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                both[side] = await play(
                    clients[side], servers[side], spec.say[side], sessions=sessions, steps=spec.steps
                )
            found.append((both[0], both[1]))
    return found


async def open_many(server: Server) -> tuple[float, float]:
    """KiB per session that is open, and seconds until all had been reset."""
    with running(server):
        async with opened(GenericEnvClient, server.url, 20):
            pass
        before, start = server.memory(), time.perf_counter()
        async with opened(GenericEnvClient, server.url, OPENED):
            return (server.memory() - before) / OPENED, time.perf_counter() - start


def measure(name: str, *, sessions: int, pairs: int) -> Iterator[Row]:
    """The rows of one name."""
    if name in STEP_ROWS:
        both = (GenericEnvClient, GenericEnvClient)
        found = uvloop.run(step_pairs(STEP_ROWS[name], both, sessions=sessions, pairs=pairs))
        yield row(name, "us/step", [(mine.micros, other.micros) for mine, other in found])
    elif name in CLIENT_ROWS:
        from turnwise.openenv import GenericEnvClient as OurClient

        mine: Any = Trained if name == "client_train" else OurClient
        found = uvloop.run(
            step_pairs(CLIENT_ROWS[name], (mine, GenericEnvClient), sessions=sessions, pairs=pairs)
        )
        rates = [(left.rate, right.rate) for left, right in found]
        yield row(name, "steps/s", rates, more_is_better=True)
    else:
        # A server that has held a thousand sessions holds their memory too: each is a new one.
        opens = [
            (
                uvloop.run(open_many(ours("Echo", sessions=OPENED))),
                uvloop.run(open_many(theirs("sync", sessions=OPENED))),
            )
            for _ in range(min(pairs, 3))
        ]
        yield row("sessions", "KiB", [(mine[0], other[0]) for mine, other in opens])
        yield row("opening", "s", [(mine[1], other[1]) for mine, other in opens])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which, of {', '.join(ROWS)}")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args(argv)
    names = args.rows.split(",")
    unknown = set(names) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    print(f"{'':14}{'Turnwise':>12}{'openenv-core':>14}{'ratio':>8}   (load {os.getloadavg()[0]:.1f})")
    rows = []
    for name in names:
        for one in measure(name, sessions=args.sessions, pairs=args.pairs):
            rows.append(one)
            print(f"{one['name']:14}{one['ours']:>12,}{one['theirs']:>14,}{one['ratio']:>8}   {one['unit']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
