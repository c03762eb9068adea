"""What `turnwise env new` writes is a Turnwise environment and an OpenEnv package, by OpenEnv's own word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import httpx
import pytest
import yaml
from openenv.cli.__main__ import app as openenv_cli
from packaging.requirements import Requirement
from typer.testing import CliRunner

import turnwise
from turnwise.cli.env_serve import chosen_token
from turnwise.cli.main import app as turnwise_cli
from turnwise.errors import EnvSpecError
from turnwise.openenv import scaffold, vendor
from turnwise.openenv.run import ProcessProvider
from turnwise.openenv.run.space import find_uv

OURS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(one) for one in OURS["dependencies"]]
with_uv = pytest.mark.skipif(find_uv() is None, reason="uv, of the extra `dev`, is not installed")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Has uv and pip find empty wheels alone, and among them the namesake that PyPI has."""
    folder = tmp_path_factory.mktemp("wheels")
    for one in NEEDED:
        wheel(folder, one.name, version(one.name))
    for number in (OURS["version"], "99.0"):
        wheel(folder, "turnwise", number)
    wheel(folder, "pytest", version("pytest"))
    return {"UV_OFFLINE": "1", "UV_NO_CACHE": "1", "UV_FIND_LINKS": str(folder)} | {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder),
    }  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("new")
    done = CliRunner().invoke(turnwise_cli, ["env", "new", "web_shop", "--dir", str(folder)], env=wheels)
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


@with_uv
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
    serve = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
sys.argv = ["turnwise", "env", "serve", "environment.py:WebShop", "--port", "{{port}}"]
from turnwise.cli.main import main
main()
"""
    with ProcessProvider([sys.executable, "-c", serve], folder=package) as server:
        assert httpx.get(f"{server.base_url}/schema").status_code == 200


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


@with_uv
def test_uv_locks_it_without_what_trains(package: Path) -> None:
    locked = {one["name"] for one in tomllib.loads((package / "uv.lock").read_text())["package"]}
    assert {"openenv-web-shop", "turnwise", "fastapi", "uvicorn"} <= locked
    assert not locked & {"torch", "transformers", "openenv-core"}


@pytest.mark.parametrize("why", ["uv is not installed", "uv lock` failed"])
def test_what_is_not_locked_has_no_lock_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Where uv is missing, or finds no index."""
    if why == "uv is not installed":
        monkeypatch.setattr(scaffold, "find_uv", lambda: None)
    elif find_uv() is None:
        pytest.skip("uv is not installed")
    done = CliRunner().invoke(
        turnwise_cli,
        ["env", "new", "shop", "--dir", str(tmp_path)],
        env={"UV_OFFLINE": "1", "UV_NO_CACHE": "1"},
    )
    assert done.exit_code == 0 and not (tmp_path / "shop/uv.lock").exists()
    assert why in done.output and f"uv lock --directory {tmp_path / 'shop'}" in done.output


def test_pip_can_leave_out_what_trains(package: Path) -> None:
    """What ``--no-deps`` installs has its requirements in a file, save those that serving does not need."""
    lines = (package / "server/requirements.txt").read_text().splitlines()
    listed = [Requirement(one) for one in lines if not one.startswith("#")]
    assert listed == [one for one in NEEDED if one.name not in scaffold.LEFT_OUT]


def carried(package: Path) -> Path:
    """The wheel in a package."""
    (found,) = (package / "vendor").iterdir()
    return found


def run(*command: str | Path, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


WHO = """
import importlib.metadata, importlib.util
print(importlib.util.find_spec("turnwise").origin, importlib.metadata.version("turnwise"))
"""


@with_uv
def test_uv_installs_the_turnwise_that_wrote_it_and_no_namesake(
    package: Path, wheels: dict[str, str], tmp_path: Path
) -> None:
    there = {**wheels, "UV_PROJECT_ENVIRONMENT": str(tmp_path / "venv")}
    sync = ["uv", "sync", "--locked", "--no-dev", "--no-install-project", "--python", sys.executable]
    done = run(find_uv() or "", *sync[1:], environment=there, folder=package)
    assert done.returncode == 0, done.stderr
    who = run(tmp_path / "venv/bin/python", "-c", WHO, environment={}, folder=tmp_path)
    where, number = who.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and number in carried(package).name


def test_pip_installs_the_turnwise_that_wrote_it_and_no_namesake(
    package: Path, wheels: dict[str, str], tmp_path: Path
) -> None:
    (line,) = [one for one in (package / "README.md").read_text().splitlines() if "--no-deps" in one]
    _, _, _, named, *_ = line.split()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path]
    done = run(*pip, named, environment=wheels, folder=package)
    assert done.returncode == 0, done.stderr
    who = run(sys.executable, "-c", WHO, environment={"PYTHONPATH": str(tmp_path)}, folder=tmp_path)
    where, number = who.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and number in named
    assert (tmp_path / "turnwise/openenv/page.js").exists() and (tmp_path / "bin/turnwise").exists()

    required = tomllib.loads((package / "pyproject.toml").read_text())["project"]["dependencies"]
    (ours,) = [one for one in required if Requirement(one).name == "turnwise"]
    for more, code in (([], 1), (["--find-links", "vendor"], 0)):
        dry = ["--dry-run", "--ignore-installed", *more]
        done = run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            *dry,
            ours,
            environment=wheels,
            folder=package,
        )
        assert done.returncode == code, done.stdout + done.stderr


def test_nothing_in_it_asks_an_index_for_turnwise(package: Path) -> None:
    bare = re.compile(
        r"""(install|add|--with)\b[^`\n]*\s['"]?turnwise['"]?(\s|$)|^\s*['"]?turnwise['"]?,?\s*$""", re.M
    )
    assert bare.search("pip install --no-deps 'turnwise' .") and bare.search('  "turnwise",\n')
    for path in package.rglob("*"):
        if path.suffix in (".md", ".toml", ".txt", ".py") or path.name == "Dockerfile":
            assert not bare.search(path.read_text()), path
    for name in ("README.md", "server/requirements.txt"):
        assert f"pip install --no-deps vendor/{carried(package).name} ." in (package / name).read_text()


def test_the_wheel_is_what_runs_here(package: Path) -> None:
    """Also where the installed metadata are older than the repository, as those of an editable one may be."""
    made = vendor.wheel()
    assert made.data == vendor.wheel().data, "the same files are the same wheel"
    assert carried(package).read_bytes() == made.data
    with zipfile.ZipFile(carried(package)) as file:
        metadata = file.read(f"turnwise-{made.version}.dist-info/METADATA").decode()
        source = Path(turnwise.__file__).parent
        files = {path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert {one for one in file.namelist() if "dist-info" not in one} == {
            f"turnwise/{path.relative_to(source)}" for path in files
        }
    said = [Requirement(one.partition(": ")[2]) for one in metadata.splitlines() if "Requires-Dist" in one]
    assert [one for one in said if "extra" not in str(one.marker)] == NEEDED
    assert Requirement("pillow>=10; extra == 'images'") in said


def test_an_installed_turnwise_is_carried_along_as_it_says_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where there is no repository around it, as in the environment of another package."""
    monkeypatch.setattr(vendor, "_stated", lambda repository: None)
    (tmp_path / "one.whl").write_bytes(vendor.wheel().data)
    with zipfile.ZipFile(tmp_path / "one.whl") as file:
        (name,) = [one for one in file.namelist() if one.endswith("METADATA")]
        metadata = file.read(name).decode()
        scripts = file.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert [one.partition(": ")[2] for one in metadata.splitlines() if "Requires-Dist" in one] == requires(
        "turnwise"
    )
    assert "turnwise = turnwise.cli.main:main" in scripts

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vendor, "distribution", missing)
    with pytest.raises(EnvSpecError, match="its requirements are not known"):
        vendor.wheel()


GIT = {"url": "https://host/turnwise.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}


@pytest.mark.parametrize(
    ("installed", "required"),
    [
        (GIT, "turnwise @ git+https://host/turnwise.git@c0ffee"),
        (
            {"url": "https://host/turnwise-1.whl", "archive_info": {}},
            "turnwise @ https://host/turnwise-1.whl",
        ),
        (None, None),
        ({"url": "file:///somewhere/turnwise", "dir_info": {"editable": True}}, None),
        ({"url": "ssh://git@host/turnwise.git", "vcs_info": GIT["vcs_info"]}, None),
    ],
)
def test_the_package_asks_for_the_turnwise_that_wrote_it(installed: object, required: str | None) -> None:
    found = scaffold.origin(None if installed is None else json.dumps(installed))
    if required is None:
        made = vendor.wheel()
        assert found.requirement == f"turnwise=={made.version}" and made.version.startswith("0.1.0+v")
        assert found.path == found.install == f"vendor/{made.filename}" and found.data == made.data
    else:
        assert found.requirement == required and found.install == f"'{required}'" and found.path is None
    assert Requirement(found.requirement).name == "turnwise"


def test_a_package_of_a_published_turnwise_carries_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaffold, "_direct_url", lambda: json.dumps(GIT))
    texts = scaffold.package_files("shop", "Shop")
    project = tomllib.loads(texts["pyproject.toml"].decode())
    assert "turnwise @ git+https://host/turnwise.git@c0ffee" in project["project"]["dependencies"]
    assert "sources" not in project["tool"]["uv"] and not [one for one in texts if "vendor" in one]
    assert "vendor" not in texts["README.md"].decode()


def test_an_app_and_env_serve_read_the_token_by_one_rule(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import server.app as m; print(repr(m.app.state.sessions.settings.token))"
    for said, token in (("none", None), ("", None), ("s3cret", "s3cret")):
        monkeypatch.setenv("TURNWISE_TOKEN", said)
        assert python(program, folder=package) == f"{token!r}\n"
        assert chosen_token("127.0.0.1", None) == token
    monkeypatch.setenv("TURNWISE_TOKEN", "")
    assert chosen_token("0.0.0.0", None), "a variable that holds nothing lets nobody in"


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
    before = (package / "environment.py").read_text()
    with pytest.raises(EnvSpecError, match="is there already"):
        CliRunner().invoke(
            turnwise_cli,
            ["env", "new", "web_shop", "--dir", str(package.parent)],
            catch_exceptions=False,
        )
    assert (package / "environment.py").read_text() == before
