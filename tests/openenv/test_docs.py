"""The Python of docs/openenv.md runs as it stands there, and what it says of options is what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient
from tests.openenv.serving import Serving, as_app, running

from turnwise.openenv.client.options import Options, options_of

PAGE = Path(__file__).parents[2] / "docs/openenv.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def catch() -> Iterator[Serving]:
    with running(as_app("catch")) as server:
        yield server


def run(code: str, url: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "example"}
    source = code.replace("http://127.0.0.1:8000", url)
    exec(compile(source, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_there_are_blocks() -> None:
    assert len(PYTHON) == 4


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_block_runs(number: int, catch: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(PYTHON[number], catch.url)
    if "app" not in names:
        assert "paddle 1 rows 8" in capsys.readouterr().out  # One step left, by whichever client.
        return
    with TestClient(names["app"]) as client, client.websocket_connect("/ws") as ws:
        ws.send_json({"type": "reset", "data": {}})
        ws.receive_json()
        ws.send_json({"type": "step", "data": {"column": 3}})
        assert ws.receive_json()["data"]["observation"] == {"heights": [0, 0, 0, 1, 0, 0, 0]}


def test_options_are_all_there_and_the_recipe_takes_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.search(r"^\| key \| what it does \|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert rows is not None
    named = {name for row in rows.group(1).splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(Options.model_fields)
    (recipe,) = (yaml.safe_load(code) for kind, code in BLOCKS if kind == "yaml")
    for name, given in recipe["environments"].items():
        options_of(given.get("args", {}), name)
