"""Hugging Face Spaces: played on where they run, or downloaded and run here, from a stand-in of the Hub."""

from __future__ import annotations

import asyncio
import json
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.openenv.containers import Docker, until
from tests.openenv.hub import TOKEN, Hub, Space
from tests.openenv.serving import running

from turnwise.errors import EnvLostError, EnvSpecError
from turnwise.openenv import GenericEnvClient, MCPToolClient
from turnwise.openenv.hosted import hosted
from turnwise.openenv.run import SpaceProvider, StartError, space, space_url
from turnwise.openenv.scaffold import package_files
from turnwise.openenv.server.app import create_server_app

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "openenv-tiny"
version = "0.1"
dependencies = ["dependency"]
"""
BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "openenv_tiny-0.1-py3-none-any.whl"
    info = "openenv_tiny-0.1.dist-info"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as file:
        file.writestr("tiny.py", "INSTALLED = True")
        metadata = "Metadata-Version: 2.1\\nName: openenv-tiny\\nVersion: 0.1\\nRequires-Dist: dependency\\n"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        file.writestr(f"{info}/RECORD", "")
    return name

build_editable = build_wheel
"""
APP = """
import os, sys
import tiny

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    found = {
        "/health": "ok",
        "/python": sys.prefix,
        "/version": open("version.txt").read(),
        "/secret": os.environ.get("MY_API_KEY", ""),
        "/given": os.environ.get("GIVEN", ""),
        "/home": os.path.expanduser("~"),
    }[scope["path"]]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": found.encode()})
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    with running(hub.app) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def tiny(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    """A Space whose dependencies are in a folder, in place of an index: uvicorn is this environment's own."""
    links = tmp_path / "links"
    links.mkdir()
    here = sysconfig.get_paths()["purelib"]
    for name, files in (("uvicorn", {"host.pth": here}), ("dependency", {"dependency.py": ""})):
        with zipfile.ZipFile(links / f"{name}-99-py3-none-any.whl", "w") as file:
            info = f"{name}-99.dist-info"
            files = {
                **files,
                f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n",
                f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{info}/RECORD": "",
            }
            for inside, text in files.items():
                file.writestr(inside, text)
    for tool in ("UV", "PIP"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(links))
    space = hub.spaces["acme/tiny"] = Space()
    texts = {
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND,
        "server/__init__.py": "",
        "server/app.py": APP,
        "openenv.yaml": "spec_version: 1\nname: tiny\napp: server.app:app\n",
        "version.txt": "one",
    }
    space.files.update({path: text.encode() for path, text in texts.items()})
    return space


@pytest.mark.parametrize("installer", ["uv", pytest.param("pip", marks=pytest.mark.slow)])
def test_a_downloaded_space_runs_in_a_venv_of_its_own(
    tiny: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: str
) -> None:
    if installer == "pip":
        monkeypatch.setattr(space, "find_uv", lambda: None)
    elif space.find_uv() is None:
        pytest.skip("uv is not installed")
    monkeypatch.setenv("MY_API_KEY", "not for other people's code")
    steps: list[list[str]] = []
    install = space.install_step
    monkeypatch.setattr(
        space, "install_step", lambda command, *rest: (steps.append(command), install(command, *rest))
    )
    provider = SpaceProvider("acme/tiny", env_vars={"GIVEN": "yes"})
    for version in ("one", "two"):
        tiny.files["version.txt"] = version.encode()
        with provider:
            seen = {
                path: httpx.get(f"{provider.base_url}/{path}").text
                for path in ("python", "version", "secret", "given", "home")
            }
        for own in ("python", "home"):
            assert Path(seen[own]).is_relative_to(tmp_path / "cache/turnwise/spaces/acme--tiny")
        assert (seen["version"], seen["secret"], seen["given"]) == (version, "", "yes")
    assert len(steps) == 4  # each commit has an environment
    with provider:
        pass
    assert len(steps) == 4  # which is made once


def test_code_that_builds_a_space_sees_no_token(
    tiny: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "me/.cache/huggingface/token"
    saved.parent.mkdir(parents=True)
    saved.write_text("hf_saved")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("UV_PUBLISH_TOKEN", "pypi-secret")
    seen = tmp_path / "seen.json"
    looks = f"""
import json, os
token = os.path.expanduser("~/.cache/huggingface/token")
found = dict(os.environ), os.path.exists(token), os.path.isdir(os.path.expanduser("~"))
json.dump(found, open({str(seen)!r}, "w"))
"""
    tiny.files["backend.py"] = (looks + BACKEND).encode()
    with SpaceProvider("acme/tiny"):
        pass
    environment, token, home = json.loads(seen.read_text())
    assert not {"HF_TOKEN", "UV_PUBLISH_TOKEN"} & set(environment)
    assert TOKEN not in environment.values()
    assert environment["UV_NO_INDEX"] == "1"  # where packages come from is for it to know
    assert (token, home) == (False, True)


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_what_a_package_overrides_is_not_installed(
    tiny: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: str
) -> None:
    """As a new package does with what Turnwise needs for training alone; for pip it lists what is left."""
    if installer == "pip":
        monkeypatch.setattr(space, "find_uv", lambda: None)
        tiny.files["server/requirements.txt"] = b"# nothing\n"
    elif space.find_uv() is None:
        pytest.skip("uv is not installed")
    overrides = "[tool.uv]\noverride-dependencies = [\"dependency; python_version < '0'\"]\n"
    tiny.files["pyproject.toml"] = (PYPROJECT + overrides).encode()
    tiny.files["server/app.py"] = (
        APP.replace("import tiny", "import tiny, importlib.util")
        .replace('os.environ.get("GIVEN", "")', 'str(importlib.util.find_spec("dependency"))')
        .encode()
    )
    monkeypatch.chdir(tmp_path)
    with SpaceProvider("acme/tiny", cache=Path("relative")) as server:
        assert httpx.get(f"{server.base_url}/given").text == "None"


def test_pip_is_told_what_uv_reads_of_a_new_package(tmp_path: Path) -> None:
    """So that it takes the Turnwise that the package carries, without what trains, and no namesake."""
    files = package_files("shop", "Shop")
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (carried,) = (tmp_path / "vendor").iterdir()
    text = files["pyproject.toml"].decode()
    assert space.overridden(tmp_path, text) == [str(carried)]
    (tmp_path / "server/requirements.txt").unlink()
    assert space.overridden(tmp_path, text) is None
    assert space.overridden(tmp_path, PYPROJECT) is None


def test_what_cannot_be_installed_or_found_is_told(tiny: Space, hub: Hub) -> None:
    tiny.files["pyproject.toml"] = PYPROJECT.replace('["dependency"]', '["no-such-package-of-ours"]').encode()
    tiny.files["backend.py"] = BACKEND.replace("Dist: dependency", "Dist: no-such-package-of-ours").encode()
    with pytest.raises(StartError, match=r"failed:[\s\S]*no-such-package-of-ours"):
        SpaceProvider("acme/tiny").start()
    with pytest.raises(StartError, match="acme/none could not be downloaded"):
        SpaceProvider("acme/none").start()
    del tiny.files["pyproject.toml"]
    with pytest.raises(StartError, match="its dependencies are not known"):
        SpaceProvider("acme/tiny").start()
    for wrong in ("tiny", "acme/", "a/b/c"):
        with pytest.raises(EnvSpecError, match="it is ORG/NAME"):
            SpaceProvider(wrong)
    with pytest.raises(EnvSpecError, match="one of them"):
        SpaceProvider()


def test_an_installation_can_be_given_up(
    tiny: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = tmp_path / "began"
    slow = f"import time\nopen({str(began)!r}, 'w').close()\ntime.sleep(600)\n"
    tiny.files["backend.py"] = slow.encode()

    async def play() -> None:
        task = asyncio.create_task(GenericEnvClient.from_env("acme/tiny", use_docker=False))
        await asyncio.to_thread(until, began.exists, 60.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(play(), 100))  # it would wait ten minutes for its thread


def test_a_folder_runs_in_a_venv_of_its_own(tiny: Space, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for path, data in tiny.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    async def play() -> str:
        client = await GenericEnvClient.from_env(
            "acme/tiny", use_docker=False, project_path=folder, env_vars={"GIVEN": "here"}
        )
        try:
            return httpx.get(f"{client._url}/given").text
        finally:
            await client.close()

    assert asyncio.run(play()) == "here"


# Where it runs already


def test_a_running_space_is_played_on(hub: Hub) -> None:
    async def play(url: str) -> None:
        hub.spaces["acme/catch"] = Space(host=url)
        env = await MCPToolClient.from_hub("acme/catch")
        async with env:
            await env.reset(seed=1)
            assert [tool.name for tool in await env.list_tools()] == ["move"]

    with running(create_server_app(hosted("catch"))) as server:
        asyncio.run(play(server.url))


def test_a_space_that_does_not_run_is_told(hub: Hub) -> None:
    hub.spaces["acme/catch"] = Space(stage="PAUSED", host="http://127.0.0.1:9")
    with pytest.raises(EnvLostError, match=r"is PAUSED: start it at .*use_docker=False"):
        space_url("acme/catch")
    with pytest.raises(EnvLostError, match="is the name right, and yours to see"):
        space_url("acme/none")
    hub.spaces["acme/catch"] = Space()
    with pytest.raises(EnvLostError, match="is not served anywhere"):
        space_url("acme/catch")


# Its image


def test_an_image_is_run_for_a_client_and_removed_after_it(
    docker: Docker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "catch_app.py").write_text(
        "from turnwise.openenv.hosted import hosted\n"
        "from turnwise.openenv.server.app import create_server_app\n"
        "app = create_server_app(hosted('catch'))\n"
    )
    monkeypatch.setenv("FAKE_APP", "catch_app:app")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def play() -> None:
        env = await MCPToolClient.from_env("Acme/catch", tag="v1", wait_timeout=120)
        assert len(docker.containers) == 1
        async with env:
            await env.reset(seed=1)
            assert await env.has_tool("move")
        assert not docker.containers
        env = await MCPToolClient.from_docker_image("catch:v2", env_vars={"A": "1"}, wait_timeout=120)
        with env.sync() as sync:
            assert sync.has_tool("move")
        assert not docker.containers

    asyncio.run(play())
    space_run, own_run = (call["argv"] for call in docker.calls if call["argv"][0] == "run")
    assert space_run[-1] == "registry.hf.space/acme-catch:v1"
    assert space_run[space_run.index("--platform") + 1] == "linux/amd64"
    assert own_run[-1] == "catch:v2" and "--platform" not in own_run


def test_an_image_that_fails_leaves_no_container(docker: Docker) -> None:
    with pytest.raises(StartError, match="no such module: shop"):
        asyncio.run(MCPToolClient.from_docker_image("crash"))

    async def give_up() -> None:
        task = asyncio.create_task(MCPToolClient.from_docker_image("pull-me"))
        await asyncio.to_thread(until, (docker.home / "pulling").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert not docker.containers
