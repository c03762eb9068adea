"""Run directories: nothing finished is lost, whatever ends the process, and nothing is stored twice."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from tests.support.trajectories import trajectory
from turnwise.codec import encode
from turnwise.errors import StoreError
from turnwise.journal import Journal, write_atomic, write_json
from turnwise.store import RunDir, StepRecord, read_trajectories

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir(tmp_path / "runs/small").lock() as run:
        yield run


def script(body: str, *args: object) -> subprocess.Popen[str]:
    code = "from tests.support.trajectories import trajectory\nfrom turnwise.store import *\nimport os, sys\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body), *map(str, args)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# -- trajectories -----------------------------------------------------------------------------------


def test_append_and_read(run: RunDir) -> None:
    stored = [trajectory(id=f"rl/0/catch/{i}/s0", reward=i / 3) for i in range(3)]
    for one in stored:
        run.append("rl", one)
    assert list(run.read("rl")) == stored
    assert run.ids("rl") == {one.id for one in stored}
    assert list(run.read("sft")) == [] and run.ids("sft") == set()
    assert run.stages() == ["rl"]


def test_what_is_appended_is_there_before_anything_is_closed(run: RunDir) -> None:
    run.append("rl", trajectory())
    assert list(RunDir(run.path).read("rl")) == [trajectory()]


def test_an_id_is_stored_once(run: RunDir) -> None:
    run.append("rl", trajectory())
    with pytest.raises(StoreError, match=r"rl.jsonl already holds trajectory rl/0/catch/0/s0: every episode"):
        run.append("rl", trajectory(reward=0.5))
    run.append("evaluate", trajectory())
    assert [one.reward for one in run.read("rl")] == [1.0]


def test_an_id_is_stored_once_over_restarts(tmp_path: Path) -> None:
    for number in range(2):
        with RunDir(tmp_path).lock() as run:
            run.append("rl", trajectory(id=f"t{number}"))
    with RunDir(tmp_path).lock() as run, pytest.raises(StoreError, match="already holds trajectory t0"):
        run.append("rl", trajectory(id="t0"))


def test_reading_streams(run: RunDir) -> None:
    for number in range(3):
        run.append("rl", trajectory(id=f"t{number}"))
    reader = run.read("rl")
    assert next(reader).id == "t0"
    run.append("rl", trajectory(id="t3"))
    assert [one.id for one in reader] == ["t1", "t2", "t3"]


def test_a_bad_line_is_named(run: RunDir) -> None:
    path = run.path / "trajectories/rl.jsonl"
    path.parent.mkdir()
    path.write_bytes(encode(trajectory()) + b'{"schema":1,"id":\n')
    with pytest.raises(StoreError, match=r"rl.jsonl, line 2: not JSON"):
        list(read_trajectories(path))
    with pytest.raises(StoreError, match=r"rl.jsonl, line 2: not JSON"):
        run.ids("rl")


@pytest.mark.parametrize("stage", ["", "../rl", "a/b", ".lock"])
def test_a_stage_is_a_file_name(run: RunDir, stage: str) -> None:
    with pytest.raises(StoreError, match="a stage's name must be letters"):
        run.append(stage, trajectory())


def test_nothing_that_is_not_finite_is_stored(run: RunDir) -> None:
    with pytest.raises(StoreError, match="only finite numbers are stored"):
        run.append("rl", trajectory(reward=math.nan))
    run.append("rl", trajectory())
    assert run.ids("rl") == {trajectory().id}


# -- crashes ----------------------------------------------------------------------------------------


def test_cut_at_every_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = encode(trajectory(id="a")), encode(trajectory(id="b"))
    path = tmp_path / "trajectories/rl.jsonl"
    path.parent.mkdir()
    for cut in [*range(0, len(second), 97), 1, len(second) - 1]:
        path.write_bytes(first + second[:cut])
        assert RunDir(tmp_path).ids("rl") == {"a"}  # a reader leaves the torn line out, and alone
        assert path.stat().st_size == len(first) + cut
        caplog.clear()
        with RunDir(tmp_path).lock() as run, caplog.at_level(logging.WARNING):
            run.append("rl", trajectory(id="b"))
            assert [one.id for one in run.read("rl")] == ["a", "b"]
        assert path.read_bytes() == first + second
        assert [record.getMessage() for record in caplog.records] == (
            [f"{path}: cut away a torn last line of {cut} bytes"] if cut else []
        )


def test_a_file_of_one_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"x" * 200_000)
    journal = Journal(path)
    journal.append(b"{}\n")
    journal.close()
    assert path.read_bytes() == b"{}\n"


def test_killed_while_it_writes(tmp_path: Path) -> None:
    writer = script(
        """
        with RunDir(sys.argv[1]).lock() as run:
            for number in range(10**6):
                run.append("rl", trajectory(id=f"t{number}"))
                print(number, flush=True)
        """,
        tmp_path,
    )
    assert writer.stdout is not None
    confirmed = -1
    for line in writer.stdout:
        confirmed = int(line)
        if confirmed == 60:
            os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    with RunDir(tmp_path).lock() as run:  # the lock died with its holder
        found = [one.id for one in run.read("rl")]
        assert found == [f"t{number}" for number in range(len(found))]
        assert len(found) >= confirmed + 1 > 60
        run.append("rl", trajectory(id=f"t{len(found)}"))


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails a write in its middle, as a full disk does: the first part of a line is written."""
    size = len(encode(trajectory(id="t0")))
    writer = script(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(sys.argv[2])
        with RunDir(sys.argv[1]).lock() as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for number in range(9):
                try:
                    run.append("rl", trajectory(id=f"t{number}"))
                except StoreError as error:
                    print(number, error)
                    break
            print([one.id for one in run.read("rl")])
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            run.append("rl", trajectory(id=f"t{number}"))
            print([one.id for one in run.read("rl")])
        """,
        tmp_path,
        3 * size + size // 2,
    )
    out, err = writer.communicate()
    assert writer.returncode == 0, err
    failed, intact, after = out.splitlines()
    assert failed == (
        f"3 cannot write to {tmp_path}/trajectories/rl.jsonl: File too large. Its first {3 * size:,} bytes "
        "are whole records and intact; make room and run the same command again"
    )
    assert intact == "['t0', 't1', 't2']"
    assert after == "['t0', 't1', 't2', 't3']"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(where)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not allowed here; the limit on file size stands in for it")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_real_full_disk(tiny_disk: Path) -> None:
    with RunDir(tiny_disk).lock() as run:
        stored = 0
        with pytest.raises(StoreError, match="No space left on device"):
            for stored in range(100):
                run.append("rl", trajectory(id=f"t{stored}"))
        assert stored > 2
        assert [one.id for one in run.read("rl")] == [f"t{number}" for number in range(stored)]
        with pytest.raises(StoreError, match="what was there before is intact"):
            run.write_summary({"x": "y" * 40_000})
        with pytest.raises(StoreError, match="cannot write the checkpoint"), run.checkpoint("rl", 1) as path:
            (path / "model").write_bytes(b"x" * 40_000)
        assert run.latest("rl") is None and list((run.path / "checkpoints").iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/summary.json"
    write_json(path, {"mean": np.float64(0.5), "n": 3, "low": math.nan})
    assert orjson.loads(path.read_bytes()) == {"mean": 0.5, "n": 3, "low": None}
    with pytest.raises(StoreError, match="is not JSON"):
        write_json(path, {"x": object()})
    assert orjson.loads(path.read_bytes())["n"] == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"]


def test_the_old_file_outlives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_atomic(path, b"old")
    path.with_name(f".report.html.{os.getpid()}.part").mkdir()  # cannot be opened as a file
    with pytest.raises(StoreError, match="what was there before is intact"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


# -- one writer -------------------------------------------------------------------------------------


def test_one_writer(tmp_path: Path) -> None:
    holder = script(
        """
        with RunDir(sys.argv[1]).lock():
            print("held", flush=True)
            os.read(0, 1)
        """,
        tmp_path,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        expected = rf"{tmp_path} is being written by process {holder.pid}: wait for it or stop it"
        with pytest.raises(StoreError, match=expected), RunDir(tmp_path).lock():
            pass
        assert list(RunDir(tmp_path).read("rl")) == []  # reading needs no lock
    finally:
        holder.kill()
        holder.communicate()
    with RunDir(tmp_path).lock():
        pass


def test_one_writer_within_a_process(run: RunDir) -> None:
    with pytest.raises(StoreError, match=f"process {os.getpid()}"), RunDir(run.path).lock():
        pass
    run.append("rl", trajectory())


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    holder = script(
        """
        import time
        with RunDir(sys.argv[1]).lock():
            child = os.fork()
            if child == 0:
                os.write(1, b"up\\n")
                time.sleep(60)
                os._exit(0)
            os.write(1, b"%d\\n" % child)
            os.read(0, 1)
        """,
        tmp_path,
    )
    assert holder.stdout is not None
    lines = sorted(holder.stdout.readline().strip() for _ in range(2))
    assert lines[1] == "up"
    child = int(lines[0])
    holder.kill()
    holder.wait()
    try:
        with RunDir(tmp_path).lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def test_writing_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="needs its lock"):
        RunDir(tmp_path).append("rl", trajectory())


# -- steps, metrics, markers ------------------------------------------------------------------------


def test_steps(run: RunDir) -> None:
    records = [
        StepRecord(stage="rl", step=step, trajectory_ids=("a", "b"), info={"version": step})
        for step in (1, 2)
    ]
    for record in records:
        run.append_step(record)
    run.append_step(StepRecord(stage="sft", step=1, trajectory_ids=()))
    assert list(run.steps("rl")) == records
    assert [record.stage for record in run.steps()] == ["rl", "rl", "sft"]
    with pytest.raises(StoreError, match="already holds rl step 2"):
        run.append_step(records[1])


def test_metrics(run: RunDir) -> None:
    run.metrics("rl", 2, {"loss": 0.5, "kl": math.nan})
    run.metrics("rl", 1, {"loss": np.float32(0.25)})
    run.metrics("rl", 3, {"loss": 0.75, "kl": math.inf})
    run.metrics("sft", 1, {"loss": 3})
    found = run.read_metrics("rl")
    assert [(line["step"], line["loss"], line.get("kl")) for line in found] == [
        (1, 0.25, None),
        (2, 0.5, None),
        (3, 0.75, None),
    ]
    assert all(line["time"] > 1.6e9 for line in found)
    assert len(run.read_metrics()) == 4
    assert b"NaN" not in (run.path / "metrics.jsonl").read_bytes()


def test_a_step_has_one_line_of_metrics_over_restarts_too(tmp_path: Path) -> None:
    for loss in (0.5, 0.75):  # A resumed run makes step 1 once more.
        with RunDir(tmp_path).lock() as run:
            run.metrics("rl", 1, {"loss": loss})
            run.metrics("rl", 1, {"loss": 9.0})
    (line,) = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert orjson.loads(line)["loss"] == 0.5


def test_metrics_of_steps_that_will_be_made_otherwise_are_cut(run: RunDir) -> None:
    for stage, step in (("sft", 1), ("sft", 2), ("sft", 3), ("rl", 3)):
        run.metrics(stage, step, {"loss": 0.5})
    run.cut_metrics("sft", after=1)
    assert [(line["stage"], line["step"]) for line in run.read_metrics()] == [("rl", 3), ("sft", 1)]
    run.metrics("sft", 2, {"loss": 0.25})
    assert [line["loss"] for line in run.read_metrics("sft")] == [0.5, 0.25]


def test_whole_files(run: RunDir) -> None:
    assert run.done("sft") is None and run.recipe() is None and run.summary() is None
    run.mark_done("sft", {"steps": 3})
    run.write_recipe("name: é\n")
    run.write_summary({"catch": {"rl": {"mean": 1.0}}})
    again = RunDir(run.path)
    assert again.done("sft") == {"steps": 3} and again.done("rl") is None
    assert again.recipe() == "name: é\n" and again.summary() == {"catch": {"rl": {"mean": 1.0}}}
    (run.path / "done/sft.json").write_text("{")
    with pytest.raises(StoreError, match=r"done/sft.json is not JSON"):
        again.done("sft")


# -- checkpoints ------------------------------------------------------------------------------------


def save(run: RunDir, stage: str, step: int, text: str = "x") -> None:
    with run.checkpoint(stage, step) as path:
        (path / "model.safetensors").write_text(text)


def test_checkpoints(run: RunDir) -> None:
    assert run.latest("rl") is None
    for step in (9, 10, 100):
        save(run, "rl", step)
    save(run, "rl-control", 500)
    assert [found.step for found in run.checkpoints("rl")] == [9, 10, 100]
    latest = run.latest("rl")
    assert latest is not None and latest.path == run.path / "checkpoints/rl-100"
    run.prune("rl", keep=2)
    assert [found.step for found in run.checkpoints("rl")] == [10, 100]
    run.prune("rl", keep=0)
    assert run.checkpoints("rl") == [] and len(run.checkpoints("rl-control")) == 1


def test_a_checkpoint_is_whole_or_not_there(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), run.checkpoint("rl", 1) as path:
        (path / "half").write_text("x")
        raise ZeroDivisionError
    assert run.latest("rl") is None and list((run.path / "checkpoints").iterdir()) == []


def test_a_checkpoint_may_be_made_again(run: RunDir) -> None:
    save(run, "rl", 1, "old")
    save(run, "rl", 1, "new")
    latest = run.latest("rl")
    assert latest is not None and (latest.path / "model.safetensors").read_text() == "new"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["rl-1"]


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """Between the two renames there is none in its place."""
    with RunDir(tmp_path).lock() as run:
        save(run, "rl", 1, "old")
    at = tmp_path / "checkpoints"
    (at / "rl-1").rename(at / ".rl-1.old")
    (at / ".rl-1.part").mkdir()
    with RunDir(tmp_path).lock() as run:
        assert [path.name for path in at.iterdir()] == ["rl-1"]
        assert (at / "rl-1/model.safetensors").read_text() == "old"
        # And where both are there, the new one stands.
        (at / ".rl-1.old").mkdir()
        save(run, "rl", 1, "new")
    assert [path.name for path in at.iterdir()] == ["rl-1"]
    assert (at / "rl-1/model.safetensors").read_text() == "new"


def test_a_checkpoint_outlives_a_failed_replacement(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, "rl", 1, "old")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="No space left on device; older ones are intact"):
        save(run, "rl", 1, "new")
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["rl-1"]
    assert (run.path / "checkpoints/rl-1/model.safetensors").read_text() == "old"


# -- a loss of power --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["step", "checkpoint", "marker"])
def test_what_is_spoken_of_was_flushed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also what a process wrote that was killed since: to the next one it is only there to be read."""
    with RunDir(tmp_path).lock() as killed:
        killed.append("rl", trajectory(id="rl/catch/0/s0"))
        killed.metrics("rl", 1, {"loss": 0.5})
        (tmp_path / "done").mkdir()
    flushed: dict[str, int] = {}
    on_disk: list[dict[str, int]] = []
    fsync, write, replace = os.fsync, os.write, Path.replace

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        flushed[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size

    def noted_write(fd: int, data: bytes) -> int:
        on_disk.append(dict(flushed))
        return write(fd, data)

    def noted_replace(self: Path, target: Path) -> Path:
        on_disk.append(dict(flushed))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with RunDir(tmp_path).lock() as run:
        on_disk.clear()
        if what == "step":
            run.append_step(StepRecord(stage="rl", step=1, trajectory_ids=("rl/catch/0/s0",)))
        elif what == "checkpoint":
            save(run, "rl", 1)
        else:
            run.mark_done("rl", {})
    first = on_disk[0]
    for name in ("trajectories/rl.jsonl", "metrics.jsonl"):
        assert first.get(str(tmp_path / name)) == (tmp_path / name).stat().st_size, name


def test_killed_while_it_saves(tmp_path: Path) -> None:
    writer = script(
        """
        with RunDir(sys.argv[1]).lock() as run, run.checkpoint("rl", 7) as path:
            (path / "model").write_text("half")
            print("saving", flush=True)
            os.read(0, 1)
        """,
        tmp_path,
    )
    assert writer.stdout is not None and writer.stdout.readline() == "saving\n"
    writer.kill()
    writer.communicate()
    assert RunDir(tmp_path).latest("rl") is None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    with RunDir(tmp_path).lock():
        assert list((tmp_path / "checkpoints").iterdir()) == []
