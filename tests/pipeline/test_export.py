"""Uploading, against a Hub on loopback that takes what huggingface_hub sends it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.tiny import play, recipe

from turnwise.errors import StoreError
from turnwise.pipeline.context import Run
from turnwise.pipeline.export import model_card
from turnwise.store import RunDir

CHANGES: dict[str, Any] = {
    "rl": None,
    "sft.steps": 8,
    "evaluate.stages": ["sft"],
    "evaluate.tasks": {"catch": 4, "chain_sum": 4},
    "push_to_hub": {"repo": "someone/tiny"},
}


class Hub:
    """What one repository holds, and whether commits are refused."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.refuses = False

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": "http://127.0.0.1/someone/tiny", "id": "someone/tiny"}
        if path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return 200, {"files": [{**one, "shouldIgnore": False} for one in files]}
        if path.endswith("/commit/main"):
            if self.refuses:
                return 507, {"error": "no space left for someone"}
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    self.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
            return 200, {"commitUrl": "http://127.0.0.1/someone/tiny/commit/0", "commitOid": "0" * 40}
        if path.endswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        return 404, {"error": path}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = self.headers.get("Content-Length")
            body = b"".join(iter(self._chunk, b"")) if size is None else self.rfile.read(int(size))
            code, answer = made.answer(self.path.partition("?")[0], body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_is_uploaded_with_its_card(tmp_path: Path, hub: Hub) -> None:
    made, path = recipe(CHANGES), tmp_path / "tiny"
    hub.refuses = True
    with pytest.raises(StoreError, match=r"uploading to someone/tiny: .*507"):
        play(made, path)
    assert RunDir(path).done("evaluate-sft") is not None and RunDir(path).done("export") is None
    assert hub.files == {}

    hub.refuses = False
    before = RunDir(path).finished()
    play(made, path)
    assert {stage: info for stage, info in RunDir(path).finished().items() if stage != "export"} == before
    assert hub.created["visibility"] == "private" and hub.created["name"] == "tiny"
    model = RunDir(path).latest("sft-model").path
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert hub.files[name] == (model / name).read_bytes()
    assert "learner.pt" not in hub.files
    card = hub.files["README.md"].decode()
    assert "library_name: transformers" in card
    summary = RunDir(path).summary()
    assert f"| catch | sft | {summary['catch']['sft']['mean']:.3f} |" in card
    assert "scratch" in card and "push_to_hub" in card


def test_a_card_without_an_evaluation(tmp_path: Path) -> None:
    made = recipe({"evaluate": None, "rl": None, "push_to_hub": {"repo": "someone/tiny"}})
    card = model_card(Run(made, RunDir(tmp_path / "tiny"), lambda _: None))
    assert card.startswith("---\nlibrary_name: transformers\n") and "| environment |" not in card
