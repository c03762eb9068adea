"""What is shown and what is uploaded."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from tests.compat.trainers import ROWS, trainer
from turnwise import RichProgressCallback


def test_completions_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(completions: Any, n: Any, log_extra: Any, **_: Any) -> list[float]:
        log_extra("n", [f"no. {one}" for one in n])
        log_extra("text", [one[0]["content"] for one in completions])
        return [float(len(one[0]["content"])) for one in completions]

    made = trainer(tmp_path, reward_funcs=told, log_completions=True, max_steps=2, num_completions_to_print=3)
    made.train()
    rows = Dataset.from_parquet(str(tmp_path / "completions" / "completions_00002.parquet")).to_list()
    assert len(rows) == 8
    assert {"step", "prompt", "completion", "told", "n", "text", "advantage"} == rows[0].keys()
    for row in rows:
        assert row["step"] == 2
        [reply] = row["completion"]
        # What reads as a call stands apart from the text.
        assert row["text"] == reply["content"] or reply["tool_calls"]
        assert row["told"] == len(row["text"])
        assert row["prompt"][0]["content"] == f"Say {row['n'].removeprefix('no. ')}."
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-5)
    assert capsys.readouterr().out.count("no. ") == 2 * 3


def test_unique_prompts(tmp_path: Path) -> None:
    trainer(tmp_path, log_completions=True, log_unique_prompts=True, max_steps=1).train()
    assert len(Dataset.from_parquet(str(tmp_path / "completions" / "completions_00001.parquet"))) == 2


def test_rich_progress_shows_the_last_log(tmp_path: Path) -> None:
    screen = io.StringIO()
    callback = RichProgressCallback(Console(file=screen, width=120, force_terminal=True))
    trainer(
        tmp_path, callbacks=[callback], eval_dataset=ROWS[:1], eval_strategy="steps", eval_steps=1
    ).train()
    shown = screen.getvalue()
    assert "training" in shown
    assert "3/3" in shown
    assert "mean_length" in shown


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_terminal_shows_trls_metrics_and_the_history_all(
    tmp_path: Path, disable_tqdm: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trainer(tmp_path, disable_tqdm=disable_tqdm, max_steps=1)
    one.train()
    shown = "".join(capsys.readouterr())
    assert "'reward'" in shown and "'completions/mean_length'" in shown
    assert "scheduler/" not in shown and "mismatch" not in shown
    assert {"reward", "scheduler/stale_groups", "mismatch"} <= one.state.log_history[0].keys()
    one.remove_callback(PrinterCallback if disable_tqdm else ProgressCallback)  # As scripts do.


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and a commit, as the Hub does."""

    uploads: ClassVar[list[tuple[str, Any]]] = []

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Who asks."""
        self._answer({"name": "me", "type": "user", "auth": {"type": "access_token"}})

    def do_POST(self) -> None:
        """A repository, a pre-upload check, a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        Hub.uploads.append((self.path, body))
        if self.path.endswith("/repos/create"):
            self._answer(
                {"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}", "id": "me/tiny"}
            )
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self._answer({"files": [{**one, "shouldIgnore": False} for one in files]})
        else:
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1", "commitOid": "1"})

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """A stand-in on loopback; what it was sent."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Hub.uploads = []
    yield Hub.uploads
    server.shutdown()
    server.server_close()


def test_the_model_is_uploaded_without_the_runs_records(tmp_path: Path, hub: list[tuple[str, Any]]) -> None:
    made = trainer(tmp_path / "tiny", save_strategy="steps", save_steps=1, max_steps=1, hub_token="hf_x")
    made.train()
    made.push_to_hub(dataset_name="me/rows", tags="games")
    commit = next(body for path, body in hub if "/commit/" in path)
    sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()} - {None}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= sent
    assert not any("checkpoint" in path or path.endswith(".jsonl") or "learner" in path for path in sent)
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "me/rows" in card
    assert "games" in card


def commits(hub: list[tuple[str, Any]]) -> list[tuple[str, set[str]]]:
    """The summary of each, and what it has in it."""
    found = []
    for path, body in hub:
        if "/commit/" in path:
            header, *files = [json.loads(line)["value"] for line in body.splitlines()]
            found.append((header["summary"], {one["path"] for one in files}))
    return found


@pytest.mark.parametrize(
    ("strategy", "during"),
    [
        ("end", []),
        ("every_save", ["step 1", "step 2"]),
        ("checkpoint", ["step 1", "step 1, checkpoint", "step 2", "step 2, checkpoint"]),
        ("all_checkpoints", ["step 1", "step 1, checkpoint", "step 2", "step 2, checkpoint"]),
    ],
)
def test_what_is_saved_is_uploaded_where_that_is_asked_for(
    tmp_path: Path, hub: list[tuple[str, Any]], strategy: str, during: list[str]
) -> None:
    made = trainer(
        tmp_path / "tiny", save_strategy="steps", save_steps=1, max_steps=2, push_to_hub=True,
        hub_strategy=strategy, hub_always_push=True, hub_token="hf_x", save_total_limit=1,
    )  # fmt: skip
    assert hub[0][0].endswith("/repos/create"), "at once"
    made.train()
    told = commits(hub)
    assert [summary for summary, _ in told] == [f"Training in progress, {one}" for one in during]
    place = {"checkpoint": "last-checkpoint/", "all_checkpoints": "checkpoint-2/"}.get(strategy)
    for summary, files in told:
        if summary.endswith("checkpoint"):
            assert place is not None
            assert {Path(one).name for one in files} >= {"model.safetensors", "learner.pt"}
        else:
            assert {"model.safetensors", "tokenizer.json", "config.json"} <= files
            assert not {"learner.pt", "trainer_state.json", "turnwise.json"} & files
    assert place is None or all(one.startswith(place) for one in told[-1][1])
    assert [one.name for one in (tmp_path / "tiny").glob("checkpoint-*")] == ["checkpoint-2"]
    made.save_model()
    assert [summary for summary, _ in commits(hub)][len(during) :] == ["Model save"]


def test_nothing_is_uploaded_unasked(tmp_path: Path, hub: list[tuple[str, Any]]) -> None:
    made = trainer(tmp_path / "tiny", save_strategy="steps", save_steps=1, max_steps=1, hub_token="hf_x")
    made.train()
    made.save_model()
    assert hub == []


def test_a_hub_that_refuses_an_upload_does_not_end_the_run(
    tmp_path: Path, hub: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    made = trainer(
        tmp_path / "tiny", save_strategy="steps", save_steps=1, max_steps=1, push_to_hub=True, hub_token="x"
    )
    monkeypatch.setattr(Hub, "do_POST", lambda self: self.send_error(403, "no room left"))
    made.train()
    assert "checkpoint-1 was not uploaded" in caplog.text
    assert "403 Forbidden" in caplog.text
    assert (tmp_path / "tiny" / "checkpoint-1").is_dir()
