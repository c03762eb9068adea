"""What `turnwise env new` writes is a Turnwise environment and an OpenEnv package, by OpenEnv's own word."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from openenv.cli.__main__ import app as openenv_cli
from packaging.requirements import Requirement
from typer.testing import CliRunner

from turnwise.cli.main import app as turnwise_cli
from turnwise.openenv.run import ProcessProvider
from turnwise.openenv.run.space import find_uv


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    done = CliRunner().invoke(turnwise_cli, ["env", "new", "web_shop", "--dir", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"turnwise env validate {folder / 'web_shop'}" in done.output
    return folder / "web_shop"


@pytest.fixture(scope="module")
def url(package: Path) -> Iterator[str]:
    server = ProcessProvider([sys.executable, "-m", "server.app", "--port", "{port}"], folder=package)
    try:
        url = server.start()
        server.wait_for_ready(timeout_s=120)
        yield url
    finally:
        server.stop()


def python(program: str, *, folder: Path) -> str:
    """What a program prints that is run in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_a_turnwise_environment(package: Path) -> None:
    done = CliRunner().invoke(turnwise_cli, ["env", "check", f"{package / 'environment.py'}:WebShop"])
    assert done.exit_code == 0 and "ready to train on" in done.output, done.output
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)]
    ran = subprocess.run(tests, capture_output=True, text=True, check=False, cwd=package)
    assert "2 passed" in ran.stdout, ran.stdout


def test_openenv_validates_the_folder(package: Path) -> None:
    done = CliRunner().invoke(openenv_cli, ["validate", str(package), "--json", "--verbose"])
    report = json.loads(done.stdout)
    assert report["passed"] and not report["issues"]
    assert all(report["deployment_modes"].values())
    from openenv.cli._cli_utils import validate_env_structure  # what `openenv push` asks for

    assert validate_env_structure(package) == ["Recommended directory missing: outputs/"]


def test_openenv_validates_the_running_server(url: str) -> None:
    done = CliRunner().invoke(openenv_cli, ["validate", "--url", url])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["passed"]
    assert report["summary"]["passed_count"] == report["summary"]["total_count"] == 6


def test_its_client_plays_an_episode(package: Path, url: str) -> None:
    program = f"""
        from web_shop import WebShopEnv

        with WebShopEnv({url!r}).sync() as env:
            first = env.reset(seed=3).observation
            assert first.messages[0]["content"] == first.text
            basket = first.text.split(": ")[1].rstrip("?").split(", ")
            total = sum(int(env.call_tool("price", item=item)) for item in basket)
            from web_shop.models import WebShopAction
            last = env.step(WebShopAction(tool_name="answer", arguments={{"total": total}}))
            print(last.reward, last.done)
    """
    assert python(program, folder=package.parent) == "1.0 True\n"


def test_openenvs_own_client_plays_on_it(url: str) -> None:
    from openenv.core.mcp_client import MCPToolClient

    with MCPToolClient(url).sync() as env:
        env.reset(seed=3)
        assert [tool.name for tool in env.list_tools()] == ["price", "answer"]
        assert int(env.call_tool("price", item="tea")) == 420


def test_it_works_installed_and_from_its_folder(package: Path) -> None:
    for folder, module in ((package.parent, "web_shop.server.app"), (package, "server.app")):
        assert python(f"import {module} as m; print(m.app.title)", folder=folder).strip()


def test_its_server_needs_nothing_that_trains(package: Path) -> None:
    left_out = tomllib.loads((package / "pyproject.toml").read_text())["tool"]["uv"]["override-dependencies"]
    names = [Requirement(one).name.replace("-", "_") for one in left_out]
    assert {"torch", "transformers", "openenv_core"} <= set(names)
    blocked = [*names, "openenv"]
    program = f"""
        import asyncio, sys
        sys.modules.update(dict.fromkeys({blocked!r}))  # importing one of them raises
        from fastapi.testclient import TestClient
        from server.app import app
        with TestClient(app) as client, client.websocket_connect("/ws") as socket:
            socket.send_json({{"type": "reset", "data": {{"seed": 1}}}})
            print(socket.receive_json()["type"])
            print(client.get("/web").status_code)
    """
    assert python(program, folder=package).split() == ["observation", "200"]


def test_the_space_knows_where_the_server_listens(package: Path) -> None:
    _, front, _ = (package / "README.md").read_text().split("---\n", 2)
    space, manifest = yaml.safe_load(front), yaml.safe_load((package / "openenv.yaml").read_text())
    assert space["sdk"] == "docker" and space["app_port"] == manifest["port"] == 8000
    assert space["base_path"] == "/web" and "openenv" in space["tags"]
    docker = (package / "server/Dockerfile").read_text()
    assert f"EXPOSE {manifest['port']}" in docker and '"--host", "0.0.0.0"' in docker
    assert manifest == {
        "spec_version": 1, "name": "web_shop", "type": "space", "runtime": "fastapi",
        "app": "server.app:app", "port": 8000,
    }  # fmt: skip


@pytest.mark.skipif(find_uv() is None, reason="uv is not installed")
def test_uv_locks_it_without_what_trains(package: Path, tmp_path: Path) -> None:
    """Against wheels that say the same requirements as the real ones, and hold nothing."""
    ours = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = [Requirement(one) for one in ours["dependencies"]]
    for one in needed:
        wheel(tmp_path, one.name, version(one.name))
    wheel(tmp_path, "turnwise", ours["version"], [str(one) for one in needed])
    wheel(tmp_path, "pytest", version("pytest"))
    uv = find_uv()
    assert uv is not None
    lock = [uv, "lock", "--no-index", "--find-links", str(tmp_path), "--no-cache", "--python", sys.executable]
    before = (package / "uv.lock").read_text()
    done = subprocess.run(lock, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    locked = {one["name"] for one in tomllib.loads((package / "uv.lock").read_text())["package"]}
    (package / "uv.lock").write_text(before)
    assert {"openenv-web-shop", "turnwise", "fastapi", "uvicorn"} <= locked
    assert not locked & {"torch", "transformers", "openenv-core", "huggingface-hub"}


def wheel(folder: Path, name: str, number: str, requirements: list[str] | None = None) -> None:
    """A wheel with metadata and nothing else."""
    stem = f"{name.replace('-', '_')}-{number}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
        lines += [f"Requires-Dist: {one}" for one in requirements or []]
        file.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        file.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{stem}.dist-info/RECORD", "")


def test_nothing_is_written_over(package: Path) -> None:
    from turnwise.errors import EnvSpecError

    before = (package / "environment.py").read_text()
    with pytest.raises(EnvSpecError, match="is there already"):
        CliRunner().invoke(
            turnwise_cli,
            ["env", "new", "web_shop", "--dir", str(package.parent)],
            catch_exceptions=False,
        )
    assert (package / "environment.py").read_text() == before
