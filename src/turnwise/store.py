"""Run directories: everything that a run leaves behind, and all that it needs to go on after a crash.

    runs/<name>/
      recipe.yaml, sources.json   the recipe, resolved; fingerprints of what it names
      trajectories/<stage>.jsonl  one finished episode a line, failed ones included; only ever grows
      steps.jsonl                 which trajectories each update used
      metrics.jsonl               one line a step
      images/<sha256>.png         what trajectories name
      checkpoints/<stage>-<step>/ model directories; one that is there is complete
      done/<stage>.json           a stage that is finished, with what it wants to be remembered
      summary.json, report.html

Reading needs nothing and may be done while a run goes on. Writing needs `RunDir.lock`:

    run = RunDir(Path("runs/quickstart"))
    with run.lock():
        run.append("rl", trajectory)            # on disk when this returns
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from turnwise.checkpoints import Checkpoint, Checkpoints
from turnwise.codec import SCHEMA, decode, decode_id, encode, parse
from turnwise.errors import StoreError
from turnwise.images import STORE, ImageFolder, named_in
from turnwise.journal import Journal, plain_number, read_json, sync_file, write_atomic, write_json
from turnwise.types import Trajectory

_STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_held_locks: set[int] = set()


def _drop_locks_after_fork() -> None:
    # A forked worker that outlives this process would otherwise keep the run locked.
    for fd in _held_locks:
        os.close(fd)
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_locks_after_fork)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One update of the weights: what a resumed run needs to make it again from disk."""

    stage: str
    step: int
    trajectory_ids: tuple[str, ...]
    """In the order in which the update used them."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that the stage wants back, such as the version of the weights."""


class RunDir:
    """One run on disk. Use it from one thread."""

    def __init__(self, path: Path | str, checkpoints: Checkpoints | None = None) -> None:
        self.path = Path(path)
        self._checkpoints = checkpoints or Checkpoints(self.path / "checkpoints")
        self.images = self.path / "images"
        self._images = ImageFolder(self.images)
        self._lock_fd: int | None = None
        self._journals: dict[str, Journal] = {}
        self._known_ids: dict[str, set[str]] = {}
        self._known_steps: set[tuple[str, int]] | None = None
        self._told: set[tuple[str, int]] | None = None

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    # -- the lock -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[RunDir]:
        """Be the only writer, until the block ends or the process dies. Makes the directory.

        Raises:
            StoreError: Another process writes to this run; the message names it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as cause:
            raise StoreError(f"cannot write to the run directory {self.path}: {cause.strerror}") from cause
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            holder = os.pread(fd, 32, 0).decode().strip() or "unknown"
            os.close(fd)
            raise StoreError(
                f"{self.path} is being written by process {holder}: wait for it or stop it, or give this run "
                "another name"
            ) from cause
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        _held_locks.add(fd)
        self._lock_fd = fd
        try:
            self._sweep()
            yield self
        finally:
            for journal in self._journals.values():
                journal.close()
            # Whoever writes next may add to the files, so nothing that is known about them lasts.
            self._journals.clear()
            self._known_ids.clear()
            self._known_steps = self._told = None
            self._lock_fd = None
            _held_locks.discard(fd)
            os.close(fd)

    def _sweep(self) -> None:
        """Clear away what a killed process was in the middle of."""
        for part in (*self.path.glob(".*.part"), *(self.path / "done").glob(".*.part")):
            part.unlink(missing_ok=True)
        self._checkpoints.sweep()
        self._images.sweep()

    def _flush(self) -> None:
        """Wait until everything that was ever appended would survive a loss of power.

        That is files that this process has not written too: who wrote them may have been killed.
        """
        try:
            self._images.flush()
            for path in (*self.path.glob("*.jsonl"), *(self.path / "trajectories").glob("*.jsonl")):
                sync_file(path)
        except OSError as cause:
            raise StoreError(f"cannot flush {cause.filename or self.path}: {cause.strerror}") from cause

    def _writer(self, name: str) -> Journal:
        assert self._lock_fd is not None, "writing to a run needs its lock: with run.lock(): …"
        if name not in self._journals:
            self._journals[name] = Journal(self.path / name)
        return self._journals[name]

    # -- trajectories -------------------------------------------------------------------------------

    def append(self, stage: str, trajectory: Trajectory) -> None:
        """Store a finished episode. When this returns, the death of the process cannot undo it.

        Raises:
            StoreError: The stage holds this id already, the disk is full, or a number is not finite.
                Everything stored before is intact.
        """
        known = self._known_ids.get(stage)
        if known is None:
            known = self._known_ids[stage] = self.ids(stage)
        if trajectory.id in known:
            raise StoreError(
                f"{self._trajectories(stage)} already holds trajectory {trajectory.id}: "
                "every episode is stored once"
            )
        line = encode(trajectory)
        self._images.keep(named_in(trajectory))
        self._writer(f"trajectories/{_checked(stage)}.jsonl").append(line)
        known.add(trajectory.id)

    def read(self, stage: str) -> Iterator[Trajectory]:
        """The stage's trajectories in the order in which they finished, one at a time in memory."""
        return read_trajectories(self._trajectories(stage))

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        """The stage's trajectories as plain JSON objects: for statistics, ten times as fast as `read`.

        `turnwise.codec.from_record` makes a trajectory of one.
        """
        return self._records(f"trajectories/{_checked(stage)}.jsonl")

    def ids(self, stage: str) -> set[str]:
        """The ids of the stage's trajectories; nothing else of them is decoded."""
        path = self._trajectories(stage)
        return {_at(path, number, decode_id, line) for number, line in enumerate(Journal(path).lines(), 1)}

    def stages(self) -> list[str]:
        """The stages that have trajectories, by name."""
        return sorted(path.stem for path in (self.path / "trajectories").glob("*.jsonl"))

    def _trajectories(self, stage: str) -> Path:
        return self.path / "trajectories" / f"{_checked(stage)}.jsonl"

    # -- steps and metrics --------------------------------------------------------------------------

    def append_step(self, record: StepRecord) -> None:
        """Record an update before it is made; everything before it is flushed first.

        Raises:
            StoreError: The step is recorded already, or the disk is full.
        """
        if self._known_steps is None:
            self._known_steps = {(known.stage, known.step) for known in self.steps()}
        if (record.stage, record.step) in self._known_steps:
            raise StoreError(f"{self.path / 'steps.jsonl'} already holds {record.stage} step {record.step}")
        self._flush()
        journal = self._writer("steps.jsonl")
        journal.append(_record({
            "stage": record.stage, "step": record.step,
            "trajectory_ids": record.trajectory_ids, "info": dict(record.info),
        }))  # fmt: skip
        journal.sync()
        self._known_steps.add((record.stage, record.step))

    def steps(self, stage: str | None = None) -> Iterator[StepRecord]:
        """The recorded updates, oldest first; of one stage or of all."""
        for record in self._records("steps.jsonl"):
            if stage in (None, record["stage"]):
                yield StepRecord(**record | {"trajectory_ids": tuple(record["trajectory_ids"])})

    def metrics(self, stage: str, step: int, values: Mapping[str, float | None]) -> None:
        """Add a line of metrics. What is not finite is written as null.

        A step that has its line keeps it: a resumed run makes the steps after its checkpoint once more.
        """
        if self._told is None:
            self._told = {(line["stage"], line["step"]) for line in self._records("metrics.jsonl")}
        if (stage, step) not in self._told:
            self._writer("metrics.jsonl").append(
                _record({"stage": stage, "step": step, "time": round(time.time(), 3), **values})
            )
            self._told.add((stage, step))

    def cut_metrics(self, stage: str, after: int) -> None:
        """Take out what later steps of a stage were like: they will be made again, and otherwise.

        Raises:
            StoreError: The disk is full; the lines are as they were.
        """
        path = self.path / "metrics.jsonl"
        lines = list(Journal(path).lines())
        kept = [line for line in lines if not (parse(line)["stage"] == stage and parse(line)["step"] > after)]
        if len(kept) < len(lines):
            if journal := self._journals.pop("metrics.jsonl", None):
                journal.close()
            self._told = None
            write_atomic(path, b"".join(kept))

    def read_metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The metrics of every step, in order; where a step has two lines, the last.

        Each is ``{"stage": …, "step": …, "time": …, name: number or None, …}``.
        """
        last = {(record["stage"], record["step"]): record for record in self._records("metrics.jsonl")}
        return [record for (found, _), record in sorted(last.items()) if stage in (None, found)]

    def _records(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        for number, line in enumerate(Journal(path).lines(), 1):
            yield _at(path, number, parse, line)

    # -- checkpoints --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def checkpoint(self, stage: str, step: int) -> Iterator[Path]:
        """An empty directory to save a model into; it becomes the checkpoint, whole, when the block ends.

            with run.checkpoint("rl", 20) as path:
                learner.save(path)

        Raises:
            StoreError: The disk is full; no part of a checkpoint is left and older ones are intact.
        """
        assert self._lock_fd is not None, "writing to a run needs its lock: with run.lock(): …"
        with self._checkpoints.write(_checked(stage), step) as path:
            yield path
            self._flush()  # A checkpoint must not outlive what tells of the steps before it.

    def checkpoints(self, stage: str) -> list[Checkpoint]:
        """The stage's complete checkpoints, oldest first."""
        return self._checkpoints.of(_checked(stage))

    def latest(self, stage: str) -> Checkpoint | None:
        """The stage's last complete checkpoint."""
        return next(reversed(self.checkpoints(stage)), None)

    def prune(self, stage: str, keep: int) -> None:
        """Delete the stage's checkpoints save for the last ``keep``."""
        for checkpoint in self.checkpoints(stage)[: -keep or None]:
            self.drop(checkpoint)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Delete one checkpoint."""
        self._checkpoints.drop(checkpoint)

    # -- whole files --------------------------------------------------------------------------------

    def mark_done(self, stage: str, info: Mapping[str, Any]) -> None:
        """Record that a stage is finished, with JSON values to be had from `done`, once it is flushed."""
        self._flush()
        write_json(self.path / "done" / f"{_checked(stage)}.json", dict(info))

    def done(self, stage: str) -> dict[str, Any] | None:
        """What `mark_done` recorded; None for a stage that is not finished."""
        return read_json(self.path / "done" / f"{_checked(stage)}.json")

    def finished(self) -> dict[str, dict[str, Any]]:
        """What `mark_done` recorded of every finished stage, in the order in which they finished."""
        markers = sorted((self.path / "done").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: read_json(path) or {} for path in markers}

    def write_recipe(self, text: str) -> None:
        """Keep the resolved recipe."""
        write_atomic(self.path / "recipe.yaml", text.encode())

    def recipe(self) -> str | None:
        """The resolved recipe's YAML; None before the first run."""
        try:
            return (self.path / "recipe.yaml").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write_sources(self, sources: Mapping[str, str]) -> None:
        """Keep the fingerprints of what the recipe names."""
        write_json(self.path / "sources.json", dict(sources))

    def sources(self) -> dict[str, Any] | None:
        """What `write_sources` kept; None before the first run."""
        return read_json(self.path / "sources.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", dict(summary))

    def summary(self) -> dict[str, Any] | None:
        """What ``summary.json`` holds; None where there is none yet."""
        return read_json(self.path / "summary.json")


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a file of `RunDir`'s, one at a time in memory. A torn last line is left out.

    Raises:
        StoreError: A line is no trajectory, or of a newer schema; the message names the line.
    """
    STORE.look_in(path.parent.parent / "images")
    for number, line in enumerate(Journal(path).lines(), 1):
        yield _at(path, number, decode, line)


def _record(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(
            {"schema": SCHEMA, **values}, option=orjson.OPT_APPEND_NEWLINE, default=plain_number
        )
    except TypeError as cause:
        raise StoreError(f"a record holds what is not JSON: {cause}") from cause


def _at(path: Path, number: int, read: Any, line: bytes) -> Any:
    try:
        return read(line)
    except StoreError as error:
        raise StoreError(f"{path}, line {number}: {error}") from error


def _checked(stage: str) -> str:
    """Stages name files."""
    if not _STAGE.fullmatch(stage):
        raise StoreError(f"a stage's name must be letters, digits, '.', '_' and '-'; found {stage!r}")
    return stage
