"""`turnwise env push`, against a stand-in of the Hub's HTTP API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.openenv.hub import TOKEN, Hub, Space
from tests.openenv.serving import running

from turnwise.cli.env_new import scaffold
from turnwise.errors import EnvSpecError
from turnwise.openenv.push import PushError, check_readme, files, package, push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    with running(hub.app) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scaffold("web_shop", tmp_path)
    folder = tmp_path / "web_shop"
    (folder / "uv.lock").write_text("version = 1\n")
    (folder / ".env").write_text("KEY=secret\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/client.pyc").write_bytes(b"")
    (folder / "data").mkdir()
    (folder / "data/prices.csv").write_text("tea,420\n")
    return folder


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which finds the Hub as anybody's does: by HF_ENDPOINT."""
    command = [sys.executable, "-m", "turnwise", "env", "push", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))


def test_a_package_becomes_a_space(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_TOKEN", "only-for-us")
    done = cli(
        str(folder), "--repo-id", "acme/shop", "--private", "--var", "THINGS=3", "--secret", "TURNWISE_TOKEN",
        "--hardware", "cpu-upgrade", "--message", "First",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "acme/shop" in done.stdout and "turnwise env validate" in done.stdout
    assert "only-for-us" not in done.stdout + done.stderr
    space = hub.spaces["acme/shop"]
    assert (space.sdk, space.private, space.hardware) == ("docker", True, "cpu-upgrade")
    assert (space.variables, space.secrets) == ({"THINGS": "3"}, {"TURNWISE_TOKEN": "only-for-us"})
    assert space.messages == ["First"]
    assert space.files["Dockerfile"] == (folder / "server/Dockerfile").read_bytes()
    assert "server/Dockerfile" not in space.files  # one Dockerfile, where the Space looks for it
    assert space.files["data/prices.csv"] == b"tea,420\n"
    assert {"environment.py", "server/app.py", "uv.lock", ".dockerignore"} <= set(space.files)
    assert not [path for path in space.files if "pycache" in path or path == ".env"]


def test_a_second_push_goes_to_the_same_space(hub: Hub, folder: Path) -> None:
    (folder / "openenv.yaml").write_text(
        (folder / "openenv.yaml").read_text() + "variables:\n  THINGS: 2\n  ITEMS: a\n"
    )
    first = push(folder, variables={"ITEMS": "b"})
    assert first.repo_id == "ada/web_shop" and first.url.endswith("/spaces/ada/web_shop")
    assert hub.spaces["ada/web_shop"].variables == {"THINGS": "2", "ITEMS": "b"}
    (folder / "data/prices.csv").write_text("tea,421\n")
    push(folder, "web_shop", exclude=["tests"])
    assert list(hub.spaces) == ["ada/web_shop"]
    assert hub.spaces["ada/web_shop"].files["data/prices.csv"] == b"tea,421\n"
    assert "tests/test_web_shop.py" not in files(folder, exclude=["tests"])
    assert "data/prices.csv" not in files(folder, exclude=["data/*.csv"])


def test_links_do_not_lead_out_of_the_package(folder: Path, tmp_path: Path) -> None:
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/pyvenv.cfg").write_text("home = /usr\n")
    (folder / "venv/bin/python").symlink_to(sys.executable)
    (folder / "costs.csv").symlink_to("data/prices.csv")
    sent = files(folder)
    assert sent["costs.csv"].read_text() == "tea,420\n"
    assert not [path for path in sent if path.startswith("venv")]
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/id_rsa").write_text("secret")
    for target in (tmp_path / "keys/id_rsa", tmp_path / "keys", folder / ".env", folder / "data", "nowhere"):
        (folder / "link").symlink_to(target)
        with pytest.raises(EnvSpecError, match=r"is a link to .*--exclude link"):
            files(folder)
        assert "link" not in files(folder, exclude=["link"])
        (folder / "link").unlink()


def test_a_pull_request_changes_no_settings(hub: Hub, folder: Path) -> None:
    hub.spaces["acme/shop"] = Space(files={"README.md": b"theirs"})
    pushed = push(folder, "acme/shop", pull_request=True)
    assert pushed.url.endswith("/acme/shop/discussions/1")
    assert hub.spaces["acme/shop"].files == {"README.md": b"theirs"}
    assert "environment.py" in hub.spaces["acme/shop"].proposed
    with pytest.raises(EnvSpecError, match="carries files alone"):
        push(folder, "acme/shop", pull_request=True, secrets={"A": "b"})


def test_who_is_not_known_is_told_to_log_in(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PushError, match=r"log in: `hf auth login`, or HF_TOKEN"):
        push(folder, "acme/shop")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=r"log in: `hf auth login`, or HF_TOKEN"):
        push(folder)
    assert not hub.spaces


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path) -> None:
    with (folder / "openenv.yaml").open("a") as manifest:
        manifest.write("variables: {A: 0, SIZE: 8}\n")
    done = cli(str(folder), "--dry-run", "--var", "A=1", "--secret", "B=hidden")
    assert done.returncode == 0, done.stderr
    told = {"variable A, of --var", "variable SIZE, of openenv.yaml", "secret B, of --secret"}
    assert {"Space YOUR-NAME/web_shop", "Dockerfile", "environment.py", *told} <= set(
        done.stdout.splitlines()
    )
    assert cli(str(folder), "--dry-run", "-r", "acme/shop").stdout.startswith("Space acme/shop\n")
    assert "hidden" not in done.stdout and not hub.spaces
    done = cli(str(folder), "--secret", "=nobody-may-see")
    assert done.returncode != 0 and "--secret number 1 is not KEY=VALUE" in done.stderr
    assert "nobody-may-see" not in done.stdout + done.stderr


def test_what_no_space_could_build_is_told(folder: Path, tmp_path: Path) -> None:
    assert package(folder).name == "web_shop"
    readme = folder / "README.md"
    whole = readme.read_text()
    for text, said in (
        ("# Shop\n", "has no front matter.*\n---\nsdk: docker\napp_port: 8000"),
        (whole.replace("app_port: 8000", "app_port: 7860"), "app_port: 7860, and the server listens on 8000"),
        (whole.replace("sdk: docker", "sdk: gradio"), "sdk: gradio"),
        ("---\n- a: [\n---\n", "no YAML"),
    ):
        readme.write_text(text)
        with pytest.raises(EnvSpecError, match=said):
            check_readme(readme, port=8000)
    (folder / "server/Dockerfile").unlink()
    with pytest.raises(EnvSpecError, match=r"server/Dockerfile missing; `turnwise env new NAME`"):
        package(folder)
    with pytest.raises(EnvSpecError, match="is no folder"):
        package(tmp_path / "none")
