"""Ways to run a server: what was started answers, and is gone afterwards, whatever happened meanwhile.

Docker is a stand-in on PATH (`fake_docker`), whose containers are processes; the rest is real.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.openenv.containers import Docker, gone, until

from turnwise.errors import EnvSpecError
from turnwise.openenv import GenericEnvClient
from turnwise.openenv.run import LocalDockerProvider, ProcessProvider, StartError, StartTimeoutError, ready
from turnwise.openenv.run.ready import free_port, wait_until_ready

APP = """
import os

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    found = {"/health": b"ok", "/folder": os.getcwd().encode(), "/key": os.environ.get("KEY", "").encode()}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": found.get(scope["path"], b"")})
"""


# Docker


def test_a_container_answers_and_is_removed(docker: Docker) -> None:
    provider = LocalDockerProvider()
    url = provider.start_container("acme/web-shop:v2", platform="linux/amd64", docker_args=["--memory", "1g"])
    provider.wait_for_ready(url)
    assert httpx.get(f"{url}/health").status_code == 200
    ((name, box),) = docker.containers.items()
    assert name.startswith("turnwise-web-shop-") and box["platform"] == ["linux/amd64"]
    assert docker.calls[0]["argv"][-3:] == ["--memory", "1g", "acme/web-shop:v2"]
    provider.stop_container()
    provider.stop_container()  # nothing to do, and nothing wrong with it
    assert not docker.containers and gone(box["pid"])


def test_the_port_is_the_one_that_was_asked_for(docker: Docker, port: int) -> None:
    provider = LocalDockerProvider()
    url = provider.start_container("web-shop", port=port)
    try:
        assert url == f"http://127.0.0.1:{port}"
        provider.wait_for_ready(url)
    finally:
        provider.stop_container()


def test_values_of_the_environment_are_not_on_the_command_line(docker: Docker) -> None:
    provider = LocalDockerProvider()
    url = provider.start_container("web-shop", env_vars={"GREETING": "top-secret", "PATH": "/usr/bin:/bin"})
    try:
        provider.wait_for_ready(url)
        assert httpx.get(f"{url}/health").text == "top-secret"
        assert "top-secret" not in " ".join(docker.calls[0]["argv"])
        assert "PATH=/usr/bin:/bin" in docker.calls[0]["argv"]  # not the one that finds `docker` itself
    finally:
        provider.stop_container()


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        ("bad-platform", StartError, 'pass platform="linux/amd64"'),
        ("crash-at-once", StartError, "no such module: shop"),
        ("mute", StartTimeoutError, "loading"),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(
    docker: Docker, image: str, error: type[StartError], said: str
) -> None:
    provider = LocalDockerProvider()
    with pytest.raises(error, match=said):
        provider.wait_for_ready(provider.start_container(image), timeout_s=3.0 if image == "mute" else 30.0)
    assert not docker.containers
    url = provider.start_container("web-shop")  # it can be used again
    provider.wait_for_ready(url)
    provider.stop_container()


def test_a_pull_can_be_given_up(docker: Docker) -> None:
    provider = LocalDockerProvider()
    raised: list[BaseException] = []

    def start() -> None:
        try:
            provider.start_container("pull-me")
        except StartError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    until((docker.home / "pulling").exists)
    provider.stop_container()
    thread.join(10)
    assert raised and "given up" in str(raised[0])
    assert not docker.containers and gone(int((docker.home / "pulling").read_text()))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_container_goes_when_this_process_is_killed(docker: Docker, end: signal.Signals) -> None:
    program = """
        import time
        from turnwise.openenv.run import LocalDockerProvider

        provider = LocalDockerProvider()
        provider.wait_for_ready(provider.start_container("web-shop"))
        print("ready", flush=True)
        time.sleep(60)
    """
    user = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert user.stdout is not None and user.stdout.readline() == b"ready\n"
    ((_, box),) = docker.containers.items()
    user.send_signal(end)
    user.wait(10)
    user.stdout.close()
    until(lambda: not docker.containers and gone(box["pid"]))


def test_without_docker_there_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match=r"no `docker` on PATH: install Docker, or .*use_docker=False"):
        LocalDockerProvider().start_container("web-shop")
    with pytest.raises(StartError, match=r"^there is no `docker` on PATH"):  # and no container to be removed
        asyncio.run(GenericEnvClient.from_docker_image("web-shop"))


def test_why_a_start_failed_is_told_though_stopping_fails_too() -> None:
    class Broken:
        def start_container(self, image: str, *args: object, **kwargs: object) -> str:
            raise StartError("no such image")

        def stop_container(self) -> None:
            raise RuntimeError("nothing to stop")

        def wait_for_ready(self, base_url: str, timeout_s: float = 1.0) -> None: ...

    with pytest.raises(StartError, match="no such image") as info:
        asyncio.run(GenericEnvClient.from_docker_image("web-shop", Broken()))
    (note,) = info.value.__notes__
    assert "could not be stopped" in note and "nothing to stop" in note


# Processes


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    (folder / "server").mkdir(parents=True)
    (folder / "server/__init__.py").write_text("")
    (folder / "server/app.py").write_text(APP)
    (folder / "openenv.yaml").write_text("spec_version: 1\nname: pack\napp: server.app:app\nport: 8000\n")
    return folder


def test_a_package_runs_from_its_own_folder_and_ends(package: Path) -> None:
    with ProcessProvider.of_folder(package, env_vars={"KEY": "a"}) as server:
        assert httpx.get(f"{server.base_url}/folder").text == str(package)
        assert httpx.get(f"{server.base_url}/key").text == "a"
        url, process = server.base_url, server._process
        assert process is not None
    assert gone(process.pid)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    with pytest.raises(StartError, match="was not started"):
        _ = server.base_url


def test_a_server_that_dies_says_what_it_wrote(package: Path) -> None:
    (package / "server/app.py").write_text("import no_such_module")
    server = ProcessProvider.of_folder(package)
    began = time.monotonic()
    server.start()
    with pytest.raises(StartError, match=r"exit code 1[\s\S]*No module named 'no_such_module'"):
        server.wait_for_ready(timeout_s=60)
    assert time.monotonic() - began < 30  # nobody waits for the dead
    assert server._process is None and server._guard is None


def test_a_server_of_somebody_else_is_not_taken_for_the_one_that_was_started(package: Path) -> None:
    with ProcessProvider.of_folder(package) as stranger:
        port = int(stranger.base_url.rpartition(":")[2])
        with pytest.raises(StartError, match=f"port {port} of this machine is taken"):
            ProcessProvider.of_folder(package).start(port=port)
        with pytest.raises(StartError, match="ended with exit code 1"):  # it lost the port meanwhile
            wait_until_ready(
                stranger.base_url, seconds=5.0, ended=lambda: "ended with exit code 1", log=lambda: ""
            )
    server = ProcessProvider.of_folder(package)
    assert server.start(port=port) == f"http://127.0.0.1:{port}"  # free again
    server.stop()


def test_a_free_port_is_none_that_is_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever binds to 0 before the server does would have it otherwise; one that is taken is passed over."""
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if file.exists():
        assert free_port() < int(file.read_text().split()[0])
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(ready, "PORTS", [port] * 99 + [port - 1])
        monkeypatch.setattr(ready, "taken", lambda one, really=ready.taken: one == port and really(one))
        assert free_port() == port - 1
        monkeypatch.setattr(ready, "PORTS", [port] * 100)
        with pytest.raises(StartError, match="none of 100 ports"):
            free_port()


def test_children_of_the_server_end_with_it(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)'],"
        " stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid) + '\\n')\n"
        "time.sleep(600)\n"
    )
    server = ProcessProvider([sys.executable, "-c", program])
    server.start()
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    child = int((tmp_path / "pid").read_text())
    server.stop()
    until(lambda: gone(child))


def test_the_process_goes_when_this_one_is_killed(package: Path) -> None:
    program = f"""
        import time
        from turnwise.openenv.run import ProcessProvider

        server = ProcessProvider.of_folder({str(package)!r})
        server.start()
        server.wait_for_ready()
        print(server._process.pid, flush=True)
        time.sleep(60)
    """
    user = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert user.stdout is not None
    pid = int(user.stdout.readline())
    assert not gone(pid)
    user.kill()
    user.wait(10)
    user.stdout.close()
    until(lambda: gone(pid))


def test_what_cannot_be_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no-such-command.*is it installed"):
        ProcessProvider(["no-such-command-of-ours"]).start()
    with pytest.raises(EnvSpecError, match="is no folder"):
        ProcessProvider.of_folder(tmp_path / "none")
    (tmp_path / "openenv.yaml").write_text("- 1\n")
    with pytest.raises(EnvSpecError, match="holds list"):
        ProcessProvider.of_folder(tmp_path)
