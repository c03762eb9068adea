"""Promise 10 with the real engine: a killed run resumes. Real processes, real signals, every stage.

A run is killed at chosen places and at random ones and started again, as a person would. What must hold
afterwards is in `assert_whole`. What must be equal to the last bit, with a scripted engine in place of one
whose sums depend on who shares its batches: `test_hundred_kills`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.end_to_end.tiny import Child, Trap, recipe

from turnwise.config import Recipe
from turnwise.store import RunDir
from turnwise.types import StopReason

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STAGES = (
    "init", "evaluate-untrained", "collect", "sft", "evaluate-sft", "rl", "evaluate-rl", "evaluate-random",
    "evaluate-constant",
)  # fmt: skip
TINY = recipe()


def lines(path: Path) -> list[bytes]:
    """The whole lines of a file that only grows."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]


def episodes(directory: Path) -> dict[str, list[bytes]]:
    return {path.stem: lines(path) for path in sorted((directory / "trajectories").glob("*.jsonl"))}


class Runs:
    """One run directory, started as often as it is killed; each start must keep what was there."""

    def __init__(self, path: Path, recipe: Recipe = TINY) -> None:
        self.path, self.recipe = path, recipe

    def die(self, trap: Trap) -> None:
        """Start, and be killed there."""
        assert self._start(trap=trap) == -trap.signal, f"{trap} was never reached"

    def die_after(self, seconds: float) -> bool:
        """Start, and be killed then; False where the run was quicker."""
        return self._start(kill_after=seconds) != 0

    def interrupt(self, trap: Trap) -> str:
        """Start, and be interrupted there: what was said."""
        assert self._start(trap=replace(trap, signal=signal.SIGINT)) == 130, self.child.said()
        return self.child.said()

    def finish(self) -> dict[str, Any]:
        """Start and let it finish: the summary."""
        assert self._start() == 0, self.child.said()
        return assert_whole(self.path, self.recipe)

    def _start(self, *, trap: Trap | None = None, kill_after: float | None = None) -> int:
        before = episodes(self.path)
        self.child = child = Child(self.recipe, self.path, trap=trap)
        if kill_after is not None:
            child.process.join(kill_after)
            child.process.kill()
        code = child.wait()
        # What was finished stands as it was, byte for byte, and what came after follows it.
        after = episodes(self.path)
        for stage, known in before.items():
            assert after[stage][: len(known)] == known, f"{stage}: finished episodes were rewritten"
        return code


def assert_whole(path: Path, recipe: Recipe) -> dict[str, Any]:
    """A finished run: everything there, nothing twice, nothing left over."""
    directory = RunDir(path)
    assert [stage for stage in STAGES if directory.done(stage) is None] == []

    for stage, found in episodes(path).items():
        ids = [orjson.loads(line)["id"] for line in found]
        assert len(set(ids)) == len(ids), f"{stage}: an episode was played twice"
    assert directory.ids("collect") == {
        f"collect/{env}/{i}/s0" for env, count in recipe.collect.episodes.items() for i in range(count)
    }
    for stage in ("untrained", "sft", "rl"):
        expected = {
            f"evaluate/{stage}/{env}/{i}/{name}"
            for env, count in recipe.evaluate.tasks.items()
            for i in range(count)
            for name in ("s0", "s1", "greedy")
        }
        assert directory.ids(f"evaluate-{stage}") == expected

    steps = list(directory.steps("rl"))
    assert [one.step for one in steps] == list(range(1, recipe.rl.steps + 1))
    used = [id for one in steps for id in one.trajectory_ids]
    assert len(set(used)) == len(used), "an episode was learned from in two steps"
    assert set(used) <= directory.ids("rl")
    if recipe.rl.staleness == 0:
        assert set(used) == directory.ids("rl"), "an episode was played in vain"
    for stage, last in (("sft", recipe.sft.steps), ("rl", recipe.rl.steps)):
        told = [orjson.loads(line) for line in lines(path / "metrics.jsonl")]
        assert [line["step"] for line in told if line["stage"] == stage] == list(range(1, last + 1))
        for line in directory.read_metrics(stage):
            assert line["grad_norm"] is not None and line["loss"] is not None

    for stage in ("init-model", "sft-model", "rl-model"):
        assert loads(directory.latest(stage).path)
    assert len(list((path / "checkpoints").iterdir())) == 3, "states of finished stages are left"
    left = [one.name for one in [*path.iterdir(), *(path / "checkpoints").iterdir()] if "part" in one.name]
    assert left == [], "half-written files are left"
    assert (path / "report.html").exists()
    summary = directory.summary()
    assert summary is not None
    return summary


def loads(path: Path) -> bool:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path)
    return len(AutoTokenizer.from_pretrained(path)) == model.config.vocab_size


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    runs = Runs(tmp_path_factory.mktemp("unbroken") / "tiny")
    runs.finish()
    yield runs.path


def overlap(one: dict[str, Any], other: dict[str, Any]) -> None:
    for env, stages in one.items():
        for stage, found in stages.items():
            theirs = other[env][stage]
            assert found["low"] <= theirs["high"] and theirs["low"] <= found["high"], (env, stage)
            assert found["n"] == theirs["n"]


def test_killed_at_every_kind_of_place(tmp_path: Path, unbroken: Path) -> None:
    runs = Runs(tmp_path / "tiny")
    for trap in (
        Trap("checkpoints/init-model-0"),
        Trap("done/init.json"),
        Trap("trajectories/evaluate-untrained.jsonl", 7),
        Trap("trajectories/evaluate-untrained.jsonl", 50, torn=True),  # The sampled half is done: 44.
        Trap("trajectories/collect.jsonl", 30, torn=True),
        Trap("done/collect.json"),
        Trap("metrics.jsonl", 5),
        Trap("checkpoints/sft-10"),
        Trap("checkpoints/sft-20"),
        Trap("checkpoints/sft-model-60"),
        Trap("done/sft.json"),
        Trap("trajectories/evaluate-sft.jsonl", 20),
        Trap("trajectories/rl.jsonl", 3),  # In the first group.
        Trap("trajectories/rl.jsonl", 16, torn=True),  # The step's last episode.
        Trap("steps.jsonl", 1),  # Recorded, not learned from.
        Trap("steps.jsonl", 2, torn=True),
        Trap("checkpoints/rl-2"),
        Trap("steps.jsonl", 3),
        Trap(
            "trajectories/rl.jsonl", 53
        ),  # Steps 1 to 3 are redone from no checkpoint, step 4 is half played.
        Trap("checkpoints/rl-4"),
        Trap("steps.jsonl", 5),
        Trap("steps.jsonl", 6),
        Trap("checkpoints/rl-model-6"),
        Trap("done/rl.json"),
        Trap("trajectories/evaluate-rl.jsonl", 60),
        Trap("trajectories/evaluate-constant.jsonl", 3),
        Trap("summary.json"),
    ):
        runs.die(trap)
    overlap(runs.finish(), whole := RunDir(unbroken).summary())
    assert whole is not None

    # What no decoding batch has a part in is the same to the last bit, and so are the steps' episodes.
    ours, theirs = RunDir(runs.path), RunDir(unbroken)
    last = {(line["stage"], line["step"]): line for line in ours.read_metrics()}
    for line in theirs.read_metrics("sft"):
        assert last["sft", line["step"]]["loss"] == line["loss"]
    assert [one.trajectory_ids for one in ours.steps()] == [one.trajectory_ids for one in theirs.steps()]
    assert [len(one.trajectory_ids) for one in ours.steps()] == [16] * TINY.rl.steps


def test_killed_at_random(tmp_path: Path, unbroken: Path) -> None:
    runs, chance = Runs(tmp_path / "tiny"), random.Random(0)
    kills = 0
    while kills < 8 and runs.die_after(chance.uniform(0.1, 0.8)):
        kills += 1
    assert kills >= 3, "too few kills hit to say anything"
    overlap(runs.finish(), RunDir(unbroken).summary())


def test_interrupted_in_every_stage(tmp_path: Path, unbroken: Path) -> None:
    """Ctrl-C: what is finished is kept, what is in flight is not, and the run says how to go on."""
    runs = Runs(tmp_path / "tiny")
    for trap in (
        Trap("checkpoints/init-model-0"),
        Trap("trajectories/evaluate-untrained.jsonl", 7),
        Trap("trajectories/collect.jsonl", 30),
        Trap("metrics.jsonl", 15),
        Trap("checkpoints/sft-20"),
        Trap("trajectories/rl.jsonl", 5),
        Trap("steps.jsonl", 2),
        Trap("trajectories/rl.jsonl", 40),
        Trap("trajectories/evaluate-rl.jsonl", 60),
    ):
        said = runs.interrupt(trap)
        assert "turnwise run" in said, said
        assert "Traceback" not in said and "never awaited" not in said, said
        for stage in RunDir(runs.path).stages():
            reasons = {one.stop_reason for one in RunDir(runs.path).read(stage)}
            assert StopReason.CANCELLED not in reasons
    overlap(runs.finish(), RunDir(unbroken).summary())


def test_two_at_once(tmp_path: Path, unbroken: Path) -> None:
    """Whoever comes second is told who is there, and changes nothing."""
    runs = Runs(tmp_path / "tiny")
    first = Child(TINY, runs.path)
    deadline = time.monotonic() + 60
    while not (runs.path / "trajectories" / "collect.jsonl").exists():
        assert time.monotonic() < deadline, first.said()
        time.sleep(0.02)
    os.kill(first.process.pid, signal.SIGSTOP)
    time.sleep(0.2)  # Until all of its threads have stopped.
    before = {file: file.read_bytes() for file in runs.path.rglob("*") if file.is_file()}
    second = Child(TINY, runs.path)
    assert second.wait() == 1
    said = second.said().replace("\n", " ")
    assert f"is being written by process {first.process.pid}" in said and "Traceback" not in said, said
    assert {file: file.read_bytes() for file in runs.path.rglob("*") if file.is_file()} == before
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait() == 0, first.said()
    overlap(assert_whole(runs.path, TINY), RunDir(unbroken).summary())


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file where the run directory should be")
    child = Child(TINY, tmp_path / "tiny")
    assert child.wait() == 1
    said = child.said().replace("\n", " ")
    assert "cannot write to the run directory" in said and "Traceback" not in said, said


def test_killed_while_playing_ahead(tmp_path: Path) -> None:
    """With staleness, episodes of later steps are on disk too; their versions say what they are good for."""
    ahead = recipe({"rl.staleness": 1, "rl.steps": 5, "rl.checkpoint_every": 3})
    runs = Runs(tmp_path / "tiny", ahead)
    for trap in (
        Trap("trajectories/rl.jsonl", 20),
        Trap("steps.jsonl", 1),
        Trap("trajectories/rl.jsonl", 50, torn=True),
        Trap("steps.jsonl", 4),
        Trap("done/rl.json"),
    ):
        runs.die(trap)
    runs.finish()
    for line in RunDir(runs.path).read_metrics("rl"):
        assert line["staleness_max"] <= 1
