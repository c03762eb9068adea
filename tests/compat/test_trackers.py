"""Trackers get metrics, a table of completions, and traces; nothing of it leaves the machine."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.support.trajectories import trajectory
from turnwise.compat.trackers import SHOWN_IN_TENSORBOARD, Completions, conversation, show, spans, trackers
from turnwise.errors import MissingExtraError

LOGS = {"loss": 0.5, "reward": 0.25, "kl": None}


def played(count: int = 2) -> Completions:
    episodes = [trajectory(f"rl/0/catch/0/s{i}") for i in range(count)]
    return Completions(
        step=3,
        columns={
            "step": [3] * count,
            "prompt": [[{"role": "user", "content": "ball | 3"}]] * count,
            "completion": [conversation(one)[1:] for one in episodes],
            "Catch": [1.0, *[None] * (count - 1)],
            "advantage": [0.5] * count,
        },
        episodes=episodes,
    )


def track(name: str, directory: Path, completions: Completions) -> None:
    """One log and one table, as a trainer tells its callbacks of them."""
    args = TrainingArguments(
        output_dir=str(directory), report_to=name, use_cpu=True, run_name="a-run", project="a-project"
    )
    state, control = TrainerState(global_step=3), TrainerControl()
    callbacks = trackers(args.report_to)
    for callback in callbacks:
        callback.on_train_begin(args, state, control, model=None)
        callback.on_log(args, state, control, model=None, logs=dict(LOGS))
    show(callbacks, completions)
    for callback in callbacks:
        callback.on_train_end(args, state, control, model=None)


def test_tensorboard_has_scalars_and_the_first_completions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path, played(SHOWN_IN_TENSORBOARD + 1))
    [events] = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload()
    [reward] = found.Scalars("train/reward")
    assert (reward.step, reward.value) == (3, 0.25)
    [table] = found.Tensors("completions/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "|step|prompt|completion|Catch|advantage|"
    assert len(lines) == 2 + SHOWN_IN_TENSORBOARD
    assert "ball \\| 3" in lines[2] and '"name": "move"' in lines[2] and "|1.0|" in lines[2]


TRACKIO = """
import json, sys
from pathlib import Path
from tests.compat.test_trackers import played, track
from trackio.sqlite_storage import SQLiteStorage

track("trackio", Path(sys.argv[1]), played())
[run] = SQLiteStorage.get_runs("a-project")
logs = SQLiteStorage.get_logs("a-project", run)
metrics = {key: value for one in logs for key, value in one.items()}
print(json.dumps([metrics, SQLiteStorage.get_traces("a-project", run)]))
"""


def test_trackio_has_metrics_the_table_and_traces(tmp_path: Path) -> None:
    """In a process of its own: where trackio writes is settled when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path)],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        timeout=200,
    )
    metrics, traces = json.loads(done.stdout.splitlines()[-1])
    assert (metrics["train/reward"], metrics["train/kl"]) == (0.25, None)
    [first, second] = metrics["completions"]["_value"]
    assert (first["Catch"], second["Catch"], second["advantage"]) == (1.0, None, 0.5)
    [trace, _] = sorted(traces, key=lambda one: one["metadata"]["episode"])
    assert trace["metadata"]["episode"] == "rl/0/catch/0/s0"
    assert trace["metadata"]["reward"] == 1.0 and trace["metadata"]["status"] == "ok"
    roles = [message["role"] for message in trace["messages"]]
    assert roles == ["system", "user", *["assistant", "tool"] * 2]
    assert [span["kind"] for span in trace["spans"]] == ["generation", "tool"] * 2


def test_wandb_is_offline_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    track("wandb", tmp_path, played())
    wandb.finish()
    [run] = tmp_path.glob("wandb/offline-run-*")
    [record] = run.glob("*.wandb")
    deadline = time.monotonic() + 30
    while b"train/reward" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)  # A process of wandb's own writes it.
    assert b"train/reward" in record.read_bytes()
    [table] = run.rglob("media/table/completions*.json")
    assert '"name\\": \\"move\\"' in table.read_text()


def test_pushing_a_model_makes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio

    asked: list[Any] = []
    monkeypatch.setattr(trackio, "sync", lambda **settings: asked.append(settings["space_id"]) or "a/b")
    monkeypatch.setattr(
        trackio.context_vars, "current_project", contextvars.ContextVar("p", default="a-project")
    )
    [tracker] = trackers(["trackio"])
    for space, expected in ((None, []), ("a/space", ["a/space"])):
        args = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, trackio_static_space_id=space
        )
        tracker.on_push_begin(args, TrainerState(), TrainerControl(), model=SimpleNamespace())
        assert asked == expected


def test_the_ids_of_calls_and_results_agree() -> None:
    messages = conversation(trajectory())
    [call] = messages[2]["tool_calls"]
    assert call["id"] == messages[3]["tool_call_id"] == "c0"
    assert call["function"] == {"name": "move", "arguments": '{"direction": "left"}'}


def test_spans_hang_together() -> None:
    found = spans(trajectory())
    assert len({one["id"] for one in found}) == len(found)
    assert found[1]["parent_id"] == found[0]["id"] and found[1]["name"] == "move"
    assert found[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'turnwise\[trackio\]'"):
        trackers(["trackio"])


def test_none_and_unknown_names() -> None:
    assert trackers([]) == []
    with pytest.raises(ValueError, match="notebook_of_wood is not supported"):
        trackers(["notebook_of_wood"])
