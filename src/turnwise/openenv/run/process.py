"""A server as a process of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import yaml

from turnwise.errors import EnvSpecError
from turnwise.openenv.run.guard import Guard
from turnwise.openenv.run.ready import StartError, free_port, taken, wait_until_ready

STOP_SECONDS = 10.0
"""How long a server may take to end by itself before it is killed."""
LOG_CHARS = 4000
END = 'kill -TERM "-$1"; sleep 5; kill -KILL "-$1"'
"""What the guard does to the server's process group when this process is gone."""


class ProcessProvider:
    """Starts a server by a command, and ends it with everything that it started.

        with ProcessProvider(["turnwise", "env", "serve", "catch", "--port", "{port}"]) as server:
            env = GenericEnvClient(server.base_url)

    Args:
        command: What to run; ``{port}`` stands for the port.
        folder: Where to run it; None is the present directory.
        env_vars: Added to the process's environment.
        environment: The environment itself; None is a copy of this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: str | Path | None = None,
        env_vars: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.folder = None if folder is None else Path(folder)
        self._env_vars = dict(env_vars or {})
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._log: IO[bytes] | None = None
        self._base_url: str | None = None
        self._stopping = threading.Event()
        """Set by `stop`, for a start that is under way in another thread."""

    @classmethod
    def of_folder(
        cls,
        folder: str | Path,
        *,
        app: str | None = None,
        python: str = sys.executable,
        env_vars: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """An OpenEnv package under uvicorn, from its own folder.

        Args:
            folder: Where ``openenv.yaml`` is.
            app: The ASGI application; None is what ``openenv.yaml`` says, or ``server.app:app``.
            python: The interpreter that has the package's dependencies.
            env_vars: Added to the environment.
            environment: As for the class.

        Raises:
            EnvSpecError: The folder is none, or its ``openenv.yaml`` cannot be read.
        """
        where = Path(folder)
        command = [python, "-m", "uvicorn", app or manifest(where).get("app", "server.app:app")]
        return cls(
            [*command, "--host", "127.0.0.1", "--port", "{port}"],
            folder=where,
            env_vars={"PYTHONPATH": str(where.resolve()), **(env_vars or {})},
            environment=environment,
        )

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT`` of the running server."""
        if self._base_url is None:
            raise StartError("the server was not started; call start(), or use `with`")
        return self._base_url

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(
        self, port: int | None = None, env_vars: Mapping[str, str] | None = None, workers: int = 1
    ) -> str:
        """Start the process and say where it will be; `wait_for_ready` says when.

        Args:
            port: Of 127.0.0.1; None is a free one.
            env_vars: Added to the environment, over those of the constructor.
            workers: 1, as a session lives in one process.

        Raises:
            StartError: It runs already, there is no such command, or the port is taken.
        """
        self._begin()
        return self._launch(port, env_vars, workers)

    def _begin(self) -> None:
        if self._process is not None:
            raise StartError(f"it runs already at {self._base_url}; stop() it first, or use another provider")
        self._stopping.clear()

    def _launch(self, port: int | None, env_vars: Mapping[str, str] | None, workers: int) -> str:
        if workers != 1:
            raise StartError(
                f"workers={workers}: a server's sessions live in one process; start several servers and give "
                "turnwise.connect() all their URLs"
            )
        if port and taken(port):  # whoever it is would answer in the server's place
            raise StartError(f"port {port} of this machine is taken; leave port= away for a free one")
        port = port or free_port()
        command = [part.replace("{port}", str(port)) for part in self.command]
        environment = os.environ if self._environment is None else self._environment
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs
        try:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**environment, **self._env_vars, **(env_vars or {})},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own group, so that its children end with it
            )
        except OSError as error:
            self.stop()
            raise StartError(f"{' '.join(command)}: {error}; is it installed, and on PATH?") from error
        self._guard = Guard(["/bin/sh", "-c", END, "sh", str(self._process.pid)])
        url = self._base_url = f"http://127.0.0.1:{port}"
        if self._stopping.is_set():
            self.stop()
            raise StartError(f"{' '.join(command)}: the start was given up")
        return url

    def wait_for_ready(self, timeout_s: float = 60.0) -> None:
        """Block until the server answers; what does not is stopped.

        Raises:
            StartError: It ended, or ``timeout_s`` seconds passed.
        """
        url = self.base_url
        try:
            wait_until_ready(url, seconds=timeout_s, ended=self._ended, log=self.log)
        except BaseException:
            self.stop()
            raise

    def log(self) -> str:
        """The last of what the server wrote."""
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        # pread: the process writes through the same file, whose position must stay where it is
        return os.pread(self._log.fileno(), LOG_CHARS, max(size - LOG_CHARS, 0)).decode(errors="replace")

    def stop(self) -> None:
        """End the server and its children, or a start that is under way. May be called twice."""
        self._stopping.set()
        process, self._process = self._process, None
        self._base_url = None
        if process is not None:
            signal_group(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:  # also on Ctrl-C; and what the server left behind in its group ends too
                signal_group(process.pid, signal.SIGKILL)
            process.wait()
        if self._guard is not None:
            self._guard.let_go()
            self._guard = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _ended(self) -> str | None:
        process = self._process
        if process is None:
            return "was stopped"
        code = process.poll()
        return None if code is None else f"ended with exit code {code}"

    def __enter__(self) -> Self:
        self.start()
        self.wait_for_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process group, if there is one still."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def manifest(folder: Path) -> dict[str, str]:
    """What a package's ``openenv.yaml`` says; {} where there is none.

    Raises:
        EnvSpecError: There is no such folder, or the file is no YAML mapping.
    """
    if not folder.is_dir():
        raise EnvSpecError(
            f"{folder} is no folder; an OpenEnv package has openenv.yaml and server/app.py in it"
        )
    path = folder / "openenv.yaml"
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EnvSpecError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise EnvSpecError(f"{path} holds {type(found).__name__}, not the mapping of an OpenEnv package")
    return found
