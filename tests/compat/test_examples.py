"""The scripts of examples/trl: each trains, and trains with TRL where its one import line names that."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
ONLINE = [name for name in SCRIPTS if name != "sft"]
ONLY_OURS = {"rollout"}
"""TRL has no ``generate_rollout_completions`` any more."""
IMPORT = re.compile(r"^from turnwise import (.+)$", re.MULTILINE)


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
            "PYTHONPATH": str(EXAMPLES),
        },
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def logged(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What was printed of each update."""
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.replace("\r", "\n").split("\n") if line.startswith("{'loss'")]
    return [ast.literal_eval(line) for line in lines]


def check(name: str, lines: list[dict[str, Any]]) -> None:
    """Two updates of something."""
    assert len(lines) == 2
    assert all(float(line["grad_norm"]) > 0 for line in lines)
    if name in ONLINE:
        played = [line for line in lines if "reward" in line]  # The second update of a batch plays nothing.
        assert all(0 < float(line["reward"]) < 2 for line in played)
        assert name == "rollout" or all(float(line["tools/call_frequency"]) > 0.5 for line in played)


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_names_the_library(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    [names] = IMPORT.findall(source)
    assert len(re.findall(r"^\s*(?:from|import) turnwise", source, re.MULTILINE)) == 1
    if name not in ONLY_OURS:
        import trl

        assert all(hasattr(trl, one.strip()) for one in names.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_trains(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    check(name, logged(run(script, "--max-steps", "2", "--output-dir", str(tmp_path))))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ONLY_OURS])
def test_it_trains_with_trl(name: str, tmp_path: Path) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    script = tmp_path / f"{name}.py"
    script.write_text(IMPORT.sub(r"from trl import \1", source), encoding="utf-8")
    check(name, logged(run(script, "--max-steps", "2", "--output-dir", str(tmp_path / "out"))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--env-port", "8001"], "--env-port goes with --env-host"),
        (["--vllm-mode", "server"], "--vllm-server-url and --vllm-mode server go together"),
    ],
)
def test_flags_that_cannot_be_taken(arguments: list[str], told: str) -> None:
    done = run(EXAMPLES / "echo.py", *arguments)
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.slow
def test_the_notebook_runs_and_its_policy_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    first, last = map(float, re.findall(r"\d\.\d+", said))
    assert last > first + 0.1


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.slow
def test_a_script_on_a_server(tmp_path: Path) -> None:
    """``--env-host``: the script's own class, served by Turnwise."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "turnwise", "env", "serve", f"{EXAMPLES / 'catch.py'}:Catch"),
            *("--port", "0"),
        ],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        told = re.search(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())
        assert told is not None, "it says where it is once it is there"
        port = told[1]
        arguments = ["--max-steps", "2", "--output-dir", str(tmp_path / "out")]
        check(
            "catch",
            logged(run(EXAMPLES / "catch.py", *arguments, "--env-host", "127.0.0.1", "--env-port", port)),
        )
    finally:
        server.terminate()
        server.wait(30)
