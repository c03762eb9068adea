"""A whole run by torchrun is that of one process; where a process dies all end, and one goes on with it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.end_to_end.tiny import play, recipe

from turnwise.config import Recipe
from turnwise.recipe import resolved
from turnwise.store import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLOCKS = {"time", "learn_seconds", "rollout_seconds", "publish_seconds", "tokens_per_second"}
PACKING = {"padding"}


def tiny(kind: str) -> Recipe:
    """Muon rounds to bfloat16, so that another order of sums may show: here all weights are AdamW's."""
    return recipe(
        {
            "parallel.kind": kind,
            "sft.optimizer": {"lr": 4e-3, "schedule": "linear", "warmup_steps": 5},
            "rl.kl": 0.02,
            "rl.optimizer": {"lr": 3e-4},
            "evaluate": None,
        }
    )


def launch(recipe: Recipe, path: Path) -> subprocess.Popen[str]:
    """``torchrun`` with two processes; the run directory is ``path``."""
    file = path.parent / f"{path.name}.yaml"
    file.write_text(resolved(recipe.model_copy(update={"name": path.name})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "turnwise", "run", str(file), "--runs", str(path.parent)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def drawn_otherwise(found: Path, wanted: Path) -> float:
    """The first step of RL in which a token was drawn otherwise; infinite where none was.

    Sums in another order differ by some 1e-7, and in one of some thousand runs a draw falls in between. One
    episode is another then; whatever is wrong shows in many.
    """
    ours, theirs = (
        {one.id: [turn.ids for turn in one.turns] for one in RunDir(path).read("rl")}
        for path in (found, wanted)
    )
    for step in RunDir(wanted).steps("rl"):
        others = [id for id in step.trajectory_ids if ours[id] != theirs[id]]
        assert len(others) <= 1, f"step {step.step}: other tokens in {others}"
        if others:
            return step.step
    return math.inf


def assert_same_metrics(found: Path, wanted: Path) -> None:
    ours, theirs = RunDir(found).read_metrics(), RunDir(wanted).read_metrics()
    assert [(line["stage"], line["step"]) for line in ours] == [
        (line["stage"], line["step"]) for line in theirs
    ]
    assert any(line.get("grad_norm", 0) > 1e-3 for line in theirs if line["stage"] == "rl")
    last = drawn_otherwise(found, wanted)
    for our, their in zip(ours, theirs, strict=True):
        if their["stage"] == "rl" and their["step"] >= last:
            break
        assert our.keys() == their.keys()
        for name in their.keys() - CLOCKS - PACKING - {"stage"}:
            where = f"{their['stage']} {their['step']}: {name}"
            assert our[name] == pytest.approx(their[name], rel=2e-3, abs=1e-4), where


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "tiny"
    play(tiny("ddp"), path)
    return path


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_tell_what_one_does(kind: str, alone: Path, tmp_path: Path) -> None:
    process = launch(tiny(kind), tmp_path / "two")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert said.count("rl: 6 steps") == 1, "only one of them speaks"
    assert_same_metrics(tmp_path / "two", alone)


def test_a_process_that_is_killed_ends_the_run_and_one_alone_goes_on(alone: Path, tmp_path: Path) -> None:
    process = launch(tiny("fsdp"), tmp_path / "two")
    metrics = tmp_path / "two" / "metrics.jsonl"
    try:
        until = time.monotonic() + 600
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 25:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        os.kill(process_of(process.pid, rank=1), signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode != 0
    # The first process says so, unless torchrun ends it before: it looks ten times a second.
    assert "a process of this run has ended" in said or "SIGKILL" in said
    assert RunDir(tmp_path / "two").done("sft") is None
    play(tiny("ddp").model_copy(update={"name": "two"}), tmp_path / "two")
    assert_same_metrics(tmp_path / "two", alone)


def process_of(parent: int, rank: int) -> int:
    """The process below ``parent`` that torchrun gave this rank."""
    for pid in children(parent):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def children(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, task.read_text().split()):
            yield pid
            yield from children(pid)
