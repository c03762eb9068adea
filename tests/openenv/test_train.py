"""Training on environments that are given as the addresses of `openenv.core` servers, and as nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from tests.openenv import foreign
from tests.openenv.disturb import disturbed
from tests.openenv.serving import running
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.store import RunDir
from turnwise.types import StopReason

SECONDS = 280
"""A run takes some twenty on two idle cores."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty thousand random parameters on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe(path: Path, model: Path, env: Any, *, call_seconds: float = 20.0, **rl: Any) -> Path:
    """Text without tools: a random model says something in each turn, and some of it pays."""
    letters = {
        "env": env,
        "args": {"reply": "message", "show": "text"},
        "limits": {"cut_reply": "continue", "max_turns": 4, "call_seconds": call_seconds},
        "max_excluded": 1.0,
    }
    settings = {
        "name": "remote",
        "threads": 1,
        "model": {"name": str(model)},
        "environments": {"letters": letters},
        "engine": {"max_sequences": 32, "max_context": 256},
        "rl": {
            "steps": 20,
            "groups": {"letters": 2},
            "group_size": 8,
            "sampling": {"max_tokens": 8},
            "optimizer": {"lr": 1e-2},
            "checkpoint_every": 100,
            **rl,
        },
    }
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@contextmanager
def training(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``turnwise run`` in a process of its own; what it prints is in ``said.txt``."""
    command = [sys.executable, "-m", "turnwise", "run", str(file), "--runs", str(file.with_name("runs"))]
    with open(file.with_name("said.txt"), "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finished(process: subprocess.Popen[bytes], file: Path) -> list[dict[str, Any]]:
    """The metrics of each update, once the run is over and well."""
    assert process.wait(SECONDS) == 0, file.with_name("said.txt").read_text()[-3000:]
    return updates(file)


def updates(file: Path) -> list[dict[str, Any]]:
    """The metrics of each update so far."""
    path = file.with_name("runs") / "remote/metrics.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_turnwise_run_trains_on_a_server(tmp_path: Path, model: Path) -> None:
    """The command, a recipe, an address: the policy comes to say what the server pays for."""
    with running(foreign.letters_app()) as server:
        file = recipe(tmp_path, model, server.url)
        with training(file) as process:
            played = finished(process, file)
    rewards = [one["reward/letters"] for one in played]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    # Three steps each; what reads as a call is told that there are no tools, which takes another turn.
    assert all(3 <= one["turns/letters"] <= 4 and one["failed/letters"] == 0 for one in played)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_a_server_killed_in_the_middle(tmp_path: Path, model: Path) -> None:
    """Its episodes fail, are counted, and are played again on the server that is left: no group is short."""
    # Some 24 steps of each update are one server's: it ends in the middle of the second.
    servers = [foreign.Process("letters", last=36), foreign.Process("letters")]
    try:
        file = recipe(tmp_path, model, [server.ready().url for server in servers], steps=6)
        with training(file) as process:
            played = finished(process, file)
        assert servers[0].ended and not servers[1].ended
    finally:
        for server in servers:
            server.close()
    assert len(played) == 6
    failed = [one["failed/letters"] for one in played]
    assert sum(failed) > 0 and failed[-1] == 0, (played, file.with_name("said.txt").read_text())
    assert played[-1]["scheduler/replayed_siblings"] == sum(
        one["failed/letters"] * one["episodes"] for one in played
    )
    assert all(one["scheduler/short_groups"] == one["forfeited/letters"] == 0 for one in played)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_a_server_started_anew_leaves_no_group_short(tmp_path: Path, model: Path) -> None:
    """The only server ends in the middle of the second update, and is back some seconds later."""
    server = foreign.Process("letters", last=72)
    try:
        file = recipe(tmp_path, model, server.ready().url, steps=3)
        with training(file) as process:
            while not server.ended:
                assert process.poll() is None, file.with_name("said.txt").read_text()[-3000:]
                time.sleep(0.1)
            time.sleep(3)
            server.start()
            played = finished(process, file)
    finally:
        server.close()
    assert len(played) == 3
    lost = sum(one["failed/letters"] * one["episodes"] for one in played)
    assert played[-1]["scheduler/replayed_siblings"] == lost > 0
    assert played[-1]["scheduler/short_groups"] == played[-1]["scheduler/retried_groups"] == 0


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_updates_go_on_where_a_tenth_of_all_replies_comes_too_late(tmp_path: Path, model: Path) -> None:
    """What the policy could have made hang is scored, what it could not is left out; both are counted."""
    with running(foreign.letters_app()) as server, disturbed(server.url) as proxy:
        # Of ten connections one's reset, which is its second reply, and one's first, second and third step.
        # So late that a pause hardly hides it, and still before the ping is given up.
        proxy.late, proxy.seconds = lambda connection, reply: (connection + 3 * reply) % 10 == 0, 2.0
        file = recipe(tmp_path, model, proxy.url, steps=3, call_seconds=0.5)
        with training(file) as process:
            played = finished(process, file)
    assert len(played) == 3 and all(one["samples"] > 0 for one in played)
    episodes = list(RunDir(file.with_name("runs") / "remote").read("rl"))
    ends = Counter(one.stop_reason for one in episodes)
    assert min(ends[StopReason.TERMINATED], ends[StopReason.TIME_LIMIT], ends[StopReason.ENV_FAILED]) > 0, (
        ends
    )
    assert sum(one["failed/letters"] * one["episodes"] for one in played) == ends[StopReason.ENV_FAILED]
    for turn in (turn for one in episodes for turn in one.turns if turn.reward is not None):
        assert turn.reward == foreign.vowels(turn.message.text), "a reply reached the wrong request"
