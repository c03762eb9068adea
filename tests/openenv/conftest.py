"""For these tests: a ``docker`` on PATH, a port of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.openenv.containers import Docker
from tests.openenv.ports import reserved


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    home = tmp_path / "docker"
    (home / "bin").mkdir(parents=True)
    source = Path(__file__).with_name("fake_docker.py").read_text()
    executable = home / "bin/docker"
    executable.write_text(source.replace("#!PYTHON", f"#!{sys.executable}", 1))
    executable.chmod(0o755)
    monkeypatch.setenv("FAKE_DOCKER", str(home))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    return Docker(home)


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody else's as long as the test runs."""
    with reserved() as port:
        yield port
