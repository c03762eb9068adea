"""A server in a Docker container, through the ``docker`` command."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from turnwise.openenv.run.guard import Guard
from turnwise.openenv.run.ready import StartError, wait_until_ready, written

PULL_SECONDS = 3600.0
"""How long ``docker run`` may take; it pulls the image where there is none."""
COMMAND_SECONDS = 60.0
STOP_SECONDS = 5
"""How long the server may take to end by itself before it is killed."""
HINTS = {
    "Cannot connect to the Docker daemon": "start Docker, or say where it is in DOCKER_HOST",
    "permission denied while trying to connect": "add yourself to the group `docker`, or run rootless Docker",
    "no matching manifest": 'the image is for another kind of machine: pass platform="linux/amd64"',
    "does not match the specified platform": "the image here is for another one: docker pull it anew",
    "port is already allocated": "leave port= away, and Docker takes a free one",
    "address already in use": "leave port= away, and Docker takes a free one",
    "pull access denied": "check the image's name, or docker login",
    "manifest unknown": "check the image's tag",
    "No such image": "check the image's name, or build it: docker build -t NAME -f server/Dockerfile .",
}
"""What Docker says → what to do about it."""


class LocalDockerProvider:
    """Runs one container and removes it, whatever happens meanwhile.

        provider = LocalDockerProvider()
        url = provider.start_container("echo-env:latest", platform="linux/amd64")
        provider.wait_for_ready(url)
        …
        provider.stop_container()

    Args:
        host: The address of this machine that the container is reached at; nobody else reaches 127.0.0.1.
    """

    def __init__(self, *, host: str = "127.0.0.1") -> None:
        self.host = host
        self._name: str | None = None
        self._guard: Guard | None = None
        self._starting: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start_container(
        self,
        image: str,
        port: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        *,
        platform: str | None = None,
        container_port: int = 8000,
        docker_args: Sequence[str] = (),
    ) -> str:
        """``docker run`` the image, pulled where it is not here, and say where its server will be.

        Args:
            image: Such as ``echo-env:latest``.
            port: Of this machine; None is one that Docker takes.
            env_vars: The container's environment; values are not on the command line, for others to read.
            platform: Such as ``linux/amd64``; None is the machine's own.
            container_port: What the server listens on in there.
            docker_args: Further arguments of ``docker run``: ``["--gpus", "all", "--memory", "4g"]``.

        Raises:
            StartError: Docker is not there, or says no. No container is left.
        """
        executable = docker()
        with self._lock:
            if self._name is not None:
                raise StartError(f"container {self._name} runs already; stop_container() first")
            slug = re.sub(r"[^a-z0-9]+", "-", image.rsplit("/", 1)[-1].split(":")[0].lower()).strip("-")
            name = self._name = f"turnwise-{slug or 'env'}-{secrets.token_hex(4)}"
            # Before the container: however this process ends from here on, the container goes.
            self._guard = Guard([executable, "rm", "--force", "--volumes", name])
        command = [executable, "run", "--detach", "--name", name, "--label", "turnwise=environment"]
        if platform is not None:
            command += ["--platform", platform]
        command += ["--publish", f"{self.host}:{port or ''}:{container_port}"]
        flags, environment = env_flags(env_vars or {})
        try:
            self._run([*command, *flags, *docker_args, image], environment)
            if self._name is None:  # stopped meanwhile, perhaps before Docker had made it
                remove(name)
                raise StartError(f"{image}: the start was given up")
            return f"http://{self.host}:{port or published(name, container_port)}"
        except BaseException as error:
            self._give_up(error)
            raise

    def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
        """Block until the server answers; a container that does not is removed.

        Raises:
            StartError: The container ended, or ``timeout_s`` seconds passed. The message has its log.
        """
        name = self._name
        try:
            wait_until_ready(
                base_url, seconds=timeout_s, ended=lambda: self._ended(name), log=lambda: logs(name)
            )
        except BaseException as error:
            self._give_up(error)
            raise

    def stop_container(self) -> None:
        """Stop the container and remove it with its volumes. May be called twice.

        Raises:
            StartError: Docker could not; the message names the command to try.
        """
        with self._lock:
            name, self._name = self._name, None
            starting, guard = self._starting, self._guard
        if name is None:
            return
        if starting is not None:
            starting.kill()  # a pull that nobody waits for any more
        remove(name)
        if guard is not None:  # not before: where removing failed, the guard tries again at the end
            guard.let_go()

    def _give_up(self, error: BaseException) -> None:
        """Clean up after ``error``, which stays the one that is told."""
        try:
            self.stop_container()
        except StartError as second:
            error.add_note(str(second))

    def _run(self, command: list[str], environment: Mapping[str, str]) -> None:
        # Not subprocess.run: stop_container, in another thread, must be able to end a pull.
        self._starting = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, stderr = self._starting.communicate(timeout=PULL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise StartError(
                f"`{' '.join(command)}` took over {PULL_SECONDS:g} s; docker pull the image first"
            ) from error
        finally:
            self._starting.kill()
            code = self._starting.wait()
            self._starting = None
        if code != 0 and self._name is not None:
            raise refused(command, stderr)

    def _ended(self, name: str | None) -> str | None:
        if name is None or name != self._name:
            return "was stopped"
        state = call(["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name]).split()
        return f"ended with exit code {state[1]}" if state[:1] in (["exited"], ["dead"]) else None


def docker() -> str:
    """The ``docker`` executable.

    Raises:
        StartError: There is none on PATH.
    """
    found = shutil.which("docker")
    if found is None:
        raise StartError(
            "there is no `docker` on PATH: install Docker, or run the environment without it "
            "(from_env(..., use_docker=False)), or connect to a server by its URL"
        )
    return found


def env_flags(env_vars: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """``--env KEY`` for each, whose values ``docker`` takes from its own environment, which comes second."""
    flags: list[str] = []
    environment: dict[str, str] = {}
    for key, value in env_vars.items():
        if key in ("PATH", "HOME") or key.startswith("DOCKER_"):  # these would steer the command itself
            flags += ["--env", f"{key}={value}"]
        else:
            flags += ["--env", key]
            environment[key] = value
    return flags, environment


def call(arguments: Sequence[str]) -> str:
    """What ``docker ARGUMENTS`` prints.

    Raises:
        StartError: It fails, or takes over a minute.
    """
    command = [docker(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise StartError(f"`{' '.join(command)}` did not answer in {COMMAND_SECONDS:g} s") from error
    if done.returncode != 0:
        raise refused(command, done.stderr)
    return done.stdout


def refused(command: Sequence[str], stderr: str) -> StartError:
    """What Docker said to a command, and what to do about it."""
    hint = next((f"; {hint}" for sign, hint in HINTS.items() if sign.lower() in stderr.lower()), "")
    return StartError(f"`{' '.join(command)}` failed{hint}:\n{stderr.strip() or '(it said nothing)'}")


def published(name: str, container_port: int) -> int:
    """The port of this machine that Docker took for a container's.

    Raises:
        StartError: It publishes none.
    """
    printed = call(["port", name, f"{container_port}/tcp"])
    if found := re.search(r":(\d+)\s*$", printed, re.MULTILINE):
        return int(found[1])
    raise StartError(
        f"container {name} publishes no port {container_port}: it ended at once{written(logs(name))}"
    )


def logs(name: str | None) -> str:
    """The last lines of a container."""
    if name is None:
        return ""
    command = [docker(), "logs", "--tail", "50", name]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    return done.stdout


def remove(name: str) -> None:
    """Stop and remove a container; one that is not there is removed already.

    Raises:
        StartError: Docker could not.
    """
    with suppress(StartError):  # it is killed below; where Docker itself is gone, that says so
        call(["stop", "--time", str(STOP_SECONDS), name])
    try:
        call(["rm", "--force", "--volumes", name])
    except StartError as error:
        if "No such container" not in str(error):
            raise StartError(f"container {name} may still run; {error}") from error
