"""Hugging Face Spaces: where one runs, and how to run one here, under uvicorn in a venv of its own."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from turnwise.errors import EnvLostError, EnvSpecError, boundary
from turnwise.openenv.run.process import ProcessProvider, signal_group
from turnwise.openenv.run.ready import StartError

INSTALL_SECONDS = 3600.0
LOG_CHARS = 4000
REACHABLE = ("RUNNING", "RUNNING_BUILDING", "RUNNING_APP_STARTING", "SLEEPING", "APP_STARTING", "BUILDING")
"""Stages in which a Space answers, or will when it has woken up."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "SSL_CERT_FILE",
    *PROXIES,
    *(name.upper() for name in PROXIES),
)
"""What a Space's code sees of this process's environment. Tokens and keys are not for other people's code;
nor is HOME, where the Hub's token is saved: it gets a folder of its own."""
INDEX = ("UV_", "PIP_")
"""How the names of variables begin that installing sees beside these: where packages come from."""
NOT_INDEX = "UV_PUBLISH_"


def space_url(repo_id: str, *, token: str | None = None) -> str:
    """Where a Space is served: ``https://org-name.hf.space``.

    Args:
        repo_id: ``org/name``.
        token: For a private one; None is the one that ``hf auth login`` saved, if any.

    Raises:
        EnvSpecError: No ``org/name``.
        EnvLostError: There is no such Space, or it is paused.
    """
    from huggingface_hub import HfApi

    named(repo_id)
    with boundary(EnvLostError, f"Space {repo_id} (is the name right, and yours to see?)"):
        info = HfApi().space_info(repo_id, token=token)
    stage = getattr(info.runtime, "stage", None)
    if stage is not None and stage not in REACHABLE:
        raise EnvLostError(
            f"Space {repo_id} is {stage}: start it at https://huggingface.co/spaces/{repo_id}, or run it "
            "here: from_env(...) with Docker, from_env(..., use_docker=False) without"
        )
    if not info.host:
        raise EnvLostError(f"Space {repo_id} is not served anywhere: is it an OpenEnv Space (sdk: docker)?")
    return str(info.host).rstrip("/")


class SpaceProvider(ProcessProvider):
    """A Space, or any OpenEnv package, under uvicorn in a virtual environment of its own.

    It runs the Space's code with your rights, also to install it, though without your environment's
    variables and with a HOME of its own: read the code first, or use Docker. Where packages come from is said
    by variables UV_… and PIP_…, which installing sees; files of settings in your HOME are not read.

    Args:
        repo_id: ``org/name`` of a Space, downloaded when it is started.
        project_path: A package's folder instead.
        app: The ASGI application; None is what ``openenv.yaml`` says, or ``server.app:app``.
        env_vars: The process's environment, beside `PASSED_ON`.
        revision: A branch, tag or commit of the Space.
        token: For a private Space; None is the saved one.
        cache: Where environments are kept, one for each commit; None is ``~/.cache/turnwise/spaces``.
    """

    def __init__(
        self,
        repo_id: str | None = None,
        *,
        project_path: str | Path | None = None,
        app: str | None = None,
        env_vars: Mapping[str, str] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache: Path | None = None,
    ) -> None:
        if (repo_id is None) == (project_path is None):
            raise EnvSpecError("a Space's repo_id or a project_path: one of them, not both")
        if repo_id is not None:
            named(repo_id)
        super().__init__([], env_vars=env_vars)
        self.repo_id, self.revision, self._token = repo_id, revision, token
        self.project_path = None if project_path is None else Path(project_path)
        self.app = app
        self.cache = (
            cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "turnwise/spaces"
        ).absolute()

    def start(
        self, port: int | None = None, env_vars: Mapping[str, str] | None = None, workers: int = 1
    ) -> str:
        """Download it and make its environment where they are not here yet, then start it. Blocks.

        Raises:
            StartError: It could not be downloaded, installed or started.
        """
        self._begin()
        source, home = self._source()
        self._environment = passed_on(home)
        with locked(home):
            python = installed(source, home, self._stopping, editable=self.project_path is not None)
        server = ProcessProvider.of_folder(source, app=self.app, python=str(python), env_vars=self._env_vars)
        self.command, self.folder, self._env_vars = server.command, server.folder, server._env_vars
        return self._launch(port, env_vars, workers)

    def _source(self) -> tuple[Path, Path]:
        """The package's folder, and the folder that its environment is made in."""
        if self.project_path is not None:
            source = self.project_path.resolve()
            if not source.is_dir():
                raise StartError(f"{self.project_path} is no folder")
            return source, self.cache / "local" / str(source).strip("/").replace("/", "--")
        from huggingface_hub import snapshot_download

        assert self.repo_id is not None  # one of both is given
        with boundary(StartError, f"Space {self.repo_id} could not be downloaded"):
            snapshot = Path(
                snapshot_download(self.repo_id, repo_type="space", revision=self.revision, token=self._token)
            )
        home = self.cache / self.repo_id.replace("/", "--") / snapshot.name
        source = home / "source"
        with locked(home):
            if (
                not source.exists()
            ):  # a copy: installing writes into the folder, and the Hub's cache is not ours
                shutil.copytree(snapshot, home / "copying", dirs_exist_ok=True)
                (home / "copying").rename(source)
        return source, home


def passed_on(home: Path) -> dict[str, str]:
    """The environment of a Space's server: `PASSED_ON`, and a HOME of its own in ``home``."""
    own = home / "home"
    own.mkdir(parents=True, exist_ok=True)
    return {**{name: os.environ[name] for name in PASSED_ON if name in os.environ}, "HOME": str(own)}


def installing(home: Path) -> dict[str, str]:
    """The environment of what installs a Space, and so of its build code."""
    index = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(INDEX) and not name.startswith(NOT_INDEX)
    }
    # Beside the Spaces, not in each one's HOME: what one downloaded, the next need not.
    caches = {"UV_CACHE_DIR": str(home.parents[1] / "uv"), "PIP_CACHE_DIR": str(home.parents[1] / "pip")}
    return {**caches, **index, **passed_on(home)}


def installed(source: Path, home: Path, stopping: threading.Event, *, editable: bool) -> Path:
    """The interpreter of a virtual environment that has a package's dependencies.

    Args:
        source: The package: ``pyproject.toml``, or ``server/requirements.txt``, or ``requirements.txt``.
        home: Where its ``venv`` is made; one that was made of the same file is used again.
        stopping: Set when nobody waits for it any more.
        editable: The package may change after it is installed.

    Raises:
        StartError: It says no dependencies, or they could not be installed.
    """
    names = ("pyproject.toml", "server/requirements.txt", "requirements.txt")
    said = next((source / name for name in names if (source / name).exists()), None)
    if said is None:
        raise StartError(f"{source} has none of {', '.join(names)}: its dependencies are not known")
    venv, done = home / "venv", home / "venv.made-of"
    python = venv / "bin/python"
    text = said.read_text(encoding="utf-8")
    made_of = "".join(
        (source / name).read_text(encoding="utf-8") for name in names if (source / name).exists()
    )
    if python.exists() and done.exists() and done.read_text(encoding="utf-8") == made_of:
        return python
    wanted = (
        ["-r", str(said)] if said.suffix == ".txt" else [*(["--editable"] if editable else []), str(source)]
    )
    if said.suffix == ".toml" and not installable(text):
        raise StartError(f"{said} has no [project]: its dependencies are not known")
    done.unlink(missing_ok=True)
    environment = installing(home)

    def run(command: list[str]) -> None:
        install_step(command, stopping, environment)

    if (uv := find_uv()) is not None:
        run([uv, "venv", "--clear", "--python", sys.executable, str(venv)])
        # From the package's folder: uv reads there which requirements it overrides ([tool.uv]).
        run([uv, "pip", "install", "--directory", str(source), "--python", str(python), *wanted, "uvicorn"])
    else:
        run([sys.executable, "-m", "venv", "--clear", str(venv)])
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        alone = overridden(source, text) if said.suffix == ".toml" else None
        if alone is None:
            run([*pip, *wanted, "uvicorn"])
        else:
            run([*pip, "-r", str(source / "server/requirements.txt"), "uvicorn"])
            run([*pip, "--no-deps", *alone, *wanted])
    done.write_text(made_of, encoding="utf-8")
    return python


def overridden(source: Path, pyproject: str) -> list[str] | None:
    """What pip installs of a package without requirements, beside ``server/requirements.txt``.

    pip knows nothing of ``[tool.uv]``, where a package may say that some requirements of its requirements are
    not needed (a server's torch), or which file is one: where it does, and lists what is left, that is taken.

    Args:
        source: The package.
        pyproject: Its ``pyproject.toml``.

    Returns:
        Its own requirements that are left; None where it overrides nothing, or does not list what is needed.
    """
    said = tomllib.loads(pyproject)
    uv = said.get("tool", {}).get("uv", {})
    dropped = set(map(_name, uv.get("override-dependencies", ())))
    if not dropped or not (source / "server/requirements.txt").exists():
        return None
    files = {_name(name): one["path"] for name, one in uv.get("sources", {}).items() if "path" in one}
    needed = [one for one in said["project"].get("dependencies", ()) if _name(one) not in dropped]
    return [str(source / files[_name(one)]) if _name(one) in files else one for one in needed]


def _name(requirement: str) -> str:
    """A requirement's name, as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def installable(pyproject: str) -> bool:
    """Whether a ``pyproject.toml`` describes a project."""
    try:
        return "project" in tomllib.loads(pyproject)
    except tomllib.TOMLDecodeError:
        return False


def find_uv() -> str | None:
    """The ``uv`` command, on PATH or beside this interpreter: faster than pip, and not needed."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def install_step(command: list[str], stopping: threading.Event, environment: Mapping[str, str]) -> None:
    """Run a command with ``environment`` alone until it ends, or ``stopping`` is set.

    Raises:
        StartError: It failed; the message has the end of what it wrote.
    """
    shown = " ".join(command)
    deadline = time.monotonic() + INSTALL_SECONDS
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"`{shown}`: {error}") from error
        try:
            while process.poll() is None:
                if stopping.wait(0.1):
                    raise StartError(f"`{shown}` was given up")
                if time.monotonic() > deadline:
                    raise StartError(f"`{shown}` took over {INSTALL_SECONDS:g} s")
        finally:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            wrote = log.read()[-LOG_CHARS:].decode(errors="replace").rstrip()
            raise StartError(f"`{shown}` failed:\n{wrote}")


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """One process at a time makes what is in ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def named(repo_id: str) -> None:
    """Raises `EnvSpecError` if ``repo_id`` is no ``org/name``."""
    owner, slash, name = repo_id.partition("/")
    if not owner or not slash or not name or "/" in name:
        raise EnvSpecError(f"{repo_id!r} is no Space: it is ORG/NAME, as in openenv/echo_env")
