"""A vLLM server as a process: started with what runs need of it, watched until it is up, ended by its id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from turnwise.cli.vllm_install import CACHE
from turnwise.errors import EngineError

MODULE = "vllm.entrypoints.openai.api_server"
"""Started by its module: the `vllm` command looks for a package of that name, which the CPU build is not."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that ``--max-lora-rank`` takes."""
STOP_SECONDS = 30.0
"""For a server to end by itself when it is asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to serve, and how."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    tensor_parallel_size: int = 1
    lora_rank: int | None = None
    nccl: bool = False
    cpu: bool = False
    flags: tuple[str, ...] = ()

    def command(self, interpreter: Path) -> list[str]:
        """The whole command line; vLLM takes the last of a flag that stands twice, so the user's win."""
        backend = "nccl" if self.nccl else "turnwise"
        command = [str(interpreter), "-m", MODULE, "--model", self.model]
        command += ["--host", self.host, "--port", str(self.port)]
        command += ["--tensor-parallel-size", str(self.tensor_parallel_size)]
        command += ["--enable-scale-out", "--enable-prompt-tokens-details"]
        command += ["--logprobs-mode", "processed_logprobs"]
        command += ["--weight-transfer-config", json.dumps({"backend": backend})]
        if self.cpu:
            # Where a prompt is prefilled in parts vLLM 0.32 turns the seed's generator back, which one on CPU
            # does not know: the server ends with "CPU Generator does not use offset".
            command += ["--no-enable-chunked-prefill"]
        if self.lora_rank is not None:
            rank = next((rank for rank in LORA_RANKS if rank >= self.lora_rank), None)
            if rank is None:
                raise EngineError(f"--lora-rank {self.lora_rank} is more than vLLM takes, {LORA_RANKS[-1]}")
            # Two versions of each run's adapter are there at a time.
            command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "4"]
        return [*command, *self.flags]

    def variables(self, interpreter: Path) -> dict[str, str]:
        """The process's environment; what is set already stays."""
        needed = {"VLLM_SERVER_DEV_MODE": "1"}
        if self.lora_rank is not None:
            needed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        usual = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
        path = f"{interpreter.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**usual, **os.environ, **needed, "PATH": path}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A server that `start` started."""

    pid: int
    port: int
    url: str
    model: str
    log: str

    @property
    def alive(self) -> bool:
        """Whether that process still is this server: ids are given out again."""
        with suppress(ChildProcessError):  # Not ours to wait for where another process started it.
            os.waitpid(self.pid, os.WNOHANG)
        shown = _command_of(self.pid)
        return MODULE in shown and f"--port {self.port} " in shown

    def wait(self) -> int:
        """Until it ends, or Ctrl-C ends it; its exit status, 0 for the latter."""
        try:
            while self.alive:
                time.sleep(1.0)
        except KeyboardInterrupt:
            self.stop()
            return 0
        self._forget()
        return 1

    def stop(self) -> None:
        """End it, and after a while its workers with it."""
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
            until = time.monotonic() + STOP_SECONDS
            while self.alive and time.monotonic() < until:
                time.sleep(0.2)
        # It leads a session of its own: whoever is left of that is its worker.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._forget()

    def last_words(self, lines: int = 25) -> str:
        """The end of its log."""
        text = (
            Path(self.log).read_text(encoding="utf-8", errors="replace") if Path(self.log).is_file() else ""
        )
        return "\n".join(text.splitlines()[-lines:])

    def _forget(self) -> None:
        _note(self.port).unlink(missing_ok=True)


def start(
    interpreter: Path, plan: Plan, *, seconds: float, tell: Callable[[str], None] = lambda text: None
) -> ServerProcess:
    """Start a server and wait until it is up.

    Raises:
        EngineError: The port is taken, or it ended or was not up in time; the message has its last words.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise EngineError(
                f"{plan.host}:{plan.port} cannot be listened on ({error.strerror}): choose another --port, "
                f"or end the server there with `turnwise vllm down --port {plan.port}`"
            ) from error
    note = _note(plan.port)
    note.parent.mkdir(parents=True, exist_ok=True)
    log = note.with_suffix(".log")
    command = plan.command(interpreter)
    tell(f"starting {plan.model} on port {plan.port}; its log is {log}")
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=plan.variables(interpreter),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours: it must not reach the server in the middle of a step.
        )
    reached = "127.0.0.1" if plan.host == "0.0.0.0" else plan.host
    server = ServerProcess(
        pid=child.pid, port=plan.port, url=f"http://{reached}:{plan.port}", model=plan.model, log=str(log)
    )
    note.write_text(json.dumps(asdict(server)), encoding="utf-8")
    try:
        _wait_until_up(server, child, seconds)
    except BaseException:
        server.stop()
        raise
    return server


def _wait_until_up(server: ServerProcess, child: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        if child.poll() is not None:
            raise EngineError(
                f"vLLM ended with status {child.returncode} before it was up:\n{server.last_words()}\n\n"
                f"The whole log: {server.log}"
            )
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5.0).is_success:
                return
        if time.monotonic() > until:
            raise EngineError(
                f"vLLM is not up after {seconds:g} s; a large model needs more: --seconds. Its last words:\n"
                f"{server.last_words()}"
            )
        time.sleep(1.0)


def running() -> Iterator[ServerProcess]:
    """The servers that `start` started and that still run."""
    for note in sorted(_note(0).parent.glob("*.json")):
        server = ServerProcess(**json.loads(note.read_text(encoding="utf-8")))
        if server.alive:
            yield server
        else:
            note.unlink(missing_ok=True)


def _command_of(pid: int) -> str:
    """A process's command line; nothing where it has ended."""
    if Path("/proc/self").exists():
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return ""
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]  # Not on Linux.
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _note(port: int) -> Path:
    """Where a server's process is written down."""
    return CACHE.expanduser() / "servers" / f"{port}.json"
