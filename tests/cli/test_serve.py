"""``turnwise env serve`` as people start it: what is announced is served, what cannot be is told and ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

COMMAND = shutil.which("turnwise", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
MODULE = """
from turnwise.openenv import Action, Environment, Observation, State


class Abstract(Environment[Action, Observation, State]):
    def reset(self, seed=None, episode_id=None, **more):
        return Observation(reward=1)

    def step(self, action, timeout_s=None, **more):
        return Observation(reward=1)


class Whole(Abstract):
    @property
    def state(self):
        return State()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "board_game").mkdir()
    (tmp_path / "board_game" / "envs.py").write_text(textwrap.dedent(MODULE))
    return tmp_path


def command(*args: str) -> list[str]:
    assert COMMAND is not None, "the console script is not installed"
    return [COMMAND, "env", "serve", *args]


def refused(*args: str, folder: Path) -> str:
    """What it says; it ends by itself, and has announced nothing."""
    done = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "serving" not in done.stdout
    return done.stderr


def test_a_module_is_found_from_where_it_is_started_and_serves_once_it_says_so(folder: Path) -> None:
    server = subprocess.Popen(
        command("board_game.envs:Whole", "--port", "0"), cwd=folder, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("serving board_game.envs:Whole at http://127.0.0.1:")
        url = said.split()[3]
        assert httpx.post(f"{url}/reset").json()["reward"] == 1
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["board_game.envs:Abstract"], "Can't instantiate abstract class Abstract"),
        (["board_game.envs:Whole", "--arg", "nix=1"], "unexpected keyword argument 'nix'"),
        (["board_game/envs.py:Nope"], "envs.py has no 'Nope'; environments there: Abstract, Whole"),
        (["catch", "--arg", "rows=abc"], "environment catch: constructor: TypeError"),
        (["127.0.0.1:8311"], "http://127.0.0.1:8311"),
    ],
)
def test_what_cannot_be_made_is_never_announced(args: list[str], why: str, folder: Path) -> None:
    told = refused(*args, "--port", "0", folder=folder)
    assert why in told and told.count("error: ") == 1


def test_neither_is_what_cannot_listen(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "address already in use" in refused(
            "catch", "--port", str(taken.getsockname()[1]), folder=folder
        )
    assert "ERROR" in refused("catch", "--host", "300.1.1.1", "--token", "none", folder=folder)
