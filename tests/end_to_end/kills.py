"""Kills at exact places, and what must be the same afterwards: promise 10 without tolerances.

A run is played by a scripted engine, so nothing but its recipe decides what it makes. `Strike` goes into the
process of a run, counts what it does to the disk (files opened, written, flushed, renamed, removed, below
the run directory) and kills the process at the n-th of these effects, or half-way through a write.
`lose_power` then cuts what was written and never flushed. `differences` compares what is left at the end
with a run that nobody killed, file by file.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from tests.end_to_end.tiny import Trap, recipe

from turnwise.config import Recipe
from turnwise.store import RunDir
from turnwise.view.report import page

if TYPE_CHECKING:
    from turnwise.learn.learner import Learner
    from turnwise.pipeline.context import ModelSource, Run
    from turnwise.types import Trajectory

NAME = "killed"

SMALL: dict[str, Any] = {
    "name": NAME,
    "model.scratch": {
        "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_size": 64,
        "vocab_size": 360, "episodes": 8,
    },
    "environments": {
        "catch": {"args": {"rows": 3, "columns": 3, "error": 0.3, "size": 10}},
        "echo": {
            "args": {"words": 1, "error": 0.3},
            "rewards": {"tests.end_to_end.kills:brevity": 0.2},
            "reward_weight": 0.9,
        },
    },
    "collect": {"episodes": {"catch": 6, "echo": 5}},
    "sft": {
        "steps": 5, "batch": {"catch": 2, "echo": 3}, "checkpoint_every": 2,
        "optimizer": {"kind": "muon", "lr": 6e-3, "muon_lr": 0.05, "warmup_steps": 2, "schedule": "cosine"},
    },
    "rl": {
        "steps": 5, "groups": {"catch": 2, "echo": 1}, "group_size": 3, "minibatches": 2, "epochs": 2,
        "sampling": {"max_tokens": 48}, "checkpoint_every": 2,
        "optimizer": {"lr": 2e-3, "warmup_steps": 3, "schedule": "linear"},
    },
    "evaluate": {
        "tasks": {"catch": 2, "echo": 3}, "seeds": 2, "sampling": {"max_tokens": 48}, "bootstrap": 100,
    },
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "ahead": {
        "rl.staleness": 1,
        "environments.echo.rewards": {"tests.end_to_end.kills:async_brevity": 0.2},
        "rl.optimizer": {"kind": "muon", "lr": 2e-3, "muon_lr": 1e-2, "warmup_steps": 2},
        "rl.minibatches": 1,
    },
    "refill": {
        "environments.catch.args": {"rows": 3, "columns": 3, "error": 0.3, "size": 10, "miss_reward": 1.0},
        "rl.flat_groups": "refill",
        "rl.refill_limit": 3,
        "rl.loss": "dapo",
        "rl.clip_high": 0.28,
        "rl.steps": 3,
    },
    "lora": {
        "model.lora": {"r": 2, "alpha": 4, "dropout": 0.2},
        "collect.policy": "engine",
        "collect.sampling": {"max_tokens": 48},
        "rl.kl": 0.05,
        "rl.checkpoint_every": 3,
    },
}
"""Changes to `SMALL`. All weights and two optimizers; playing one step ahead; steps that are refilled, where
most groups teach nothing; adapters with dropout."""


def variant(name: str) -> Recipe:
    """The recipe of a variant."""
    return recipe(SMALL | VARIANTS[name])


def brevity(completions: Sequence[Sequence[Mapping[str, Any]]], **_: Any) -> list[float]:
    """A reward function of TRL's kind, over a group."""
    return [1.0 / (1 + len(str(one[0]["content"]))) for one in completions]


async def async_brevity(trajectory: Trajectory) -> float:
    """The same for each episode by itself, without a thread whose turn comes when it comes."""
    return 1.0 / (1 + len(trajectory.turns[0].message.text))


# ---------------------------------------------------------------------------------------------------------
# Into the process of a run


@dataclass(frozen=True, slots=True)
class Strike:
    """A scripted engine in place of the real one, and a kill; for `tiny.Child`, as a trap."""

    at: int | None = None
    """Before this effect, counted from 1 in each process; None lets it live."""
    torn: bool = False
    """Where that effect is a write: after half of it."""
    seconds: float | None = None
    """After so long by the clock, wherever it is."""
    trap: Trap | None = None
    """At a place that is named."""
    fault: str | None = None
    """One of `FAULTS`: what this process does not restore."""

    def arm(self, root: Path) -> None:
        """Put it into this process."""
        from turnwise.pipeline import context, rl, sft

        if self.fault is not None:
            FAULTS[self.fault]()
        if self.trap is not None:
            self.trap.arm(root)
        effects = Effects(root, self)
        context.Run.engine = scripted_engine
        for stage in (sft, rl):
            for name in ("save_state", "save_model"):
                setattr(stage, name, telling(getattr(stage, name), root))
        effects.watch()
        if self.seconds is not None:
            # Nobody handles SIGALRM: the process is gone in the middle of an instruction, as by SIGKILL.
            signal.setitimer(signal.ITIMER_REAL, self.seconds)


class Effects:
    """Counts what this process does to the files below ``root``; kills it at one of them.

    ``<root>.effects`` has the last count, ``<root>.synced`` how much of which file was flushed.
    """

    def __init__(self, root: Path, strike: Strike) -> None:
        self.root, self.strike = f"{root}/", strike
        self.count = 0
        self._counted = os.open(root.with_suffix(".effects"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._synced = os.open(root.with_suffix(".synced"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write = os.write

    def watch(self) -> None:
        """Begin to count."""
        write, fsync, truncate = os.write, os.fsync, os.ftruncate

        def counted_write(fd: int, data: Any) -> int:
            half = bytes(data)[: len(data) // 2]
            self._effect(_path_of(fd), lambda: write(fd, half))
            return write(fd, data)

        def counted_fsync(fd: int) -> None:
            path = _path_of(fd)
            self._effect(path)
            fsync(fd)
            if path.startswith(self.root) and path.endswith(".jsonl"):
                name, size = path.removeprefix(self.root), os.fstat(fd).st_size
                write(self._synced, orjson.dumps([name, size]) + b"\n")

        def counted_truncate(fd: int, length: int) -> None:
            self._effect(_path_of(fd))
            truncate(fd, length)

        os.write, os.fsync, os.ftruncate = counted_write, counted_fsync, counted_truncate
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            self._effect(str(args[0]))

    def _effect(self, path: str, half: Any = None) -> None:
        if not path.startswith(self.root):
            return
        self.count += 1
        if self.count == self.strike.at:
            if self.strike.torn and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(self._counted, b"%d" % self.count, 0)


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@asynccontextmanager
async def scripted_engine(run: Run, model: ModelSource) -> AsyncIterator[Any]:
    """In place of `Run.engine`: replies follow from the weights' bits, the episode, the turn and the seed.

    Playing ahead, which of two versions an episode meets is a matter of time; there the weights are left out.
    """
    from safetensors.torch import load_file

    from turnwise.engines.scripted import ScriptedCall, ScriptedEngine
    from turnwise.types import Message, ToolCall, WeightSource

    renderer = run.renderer(model)
    timeless = run.recipe.rl is not None and run.recipe.rl.staleness > 0

    class Engine(ScriptedEngine):
        # The same from the file as from a learner that has not learned: a resumed run loads the one, where an
        # unbroken one whose steps taught nothing was given the other.
        weights = digest(dict(sorted(load_file(Path(model.name) / "model.safetensors").items())))

        async def load_weights(self, source: WeightSource, version: int) -> None:
            if not (_forgotten and self.version == 0):
                self.weights = digest(dict(sorted(source.tensors())))
            await super().load_weights(source, version)

    def script(call: ScriptedCall) -> Sequence[int]:
        assert call.session is not None
        weights = "" if timeless else engine.weights
        chance = random.Random(f"{weights} {call.session} {call.turn} {call.sampling.seed}")
        if "/catch/" in call.session:
            move = ToolCall(name="move", arguments={"direction": chance.choice(["left", "stay", "right"])})
            return renderer.reply(Message.assistant("", move))
        asked = re.findall(r"exactly: (\w+)", renderer.tokenizer.decode(call.prompt_ids))[-1]
        return renderer.reply(Message.assistant(asked if chance.random() < 0.5 else asked[:2]))

    # Episodes end in another order every time; nothing may depend on it.
    engine = Engine(script, delay=0.0 if timeless else lambda _: random.SystemRandom().uniform(0, 0.004))
    try:
        yield engine
    finally:
        await engine.aclose()


_forgotten: list[str] = []
"""What the engine forgets."""


def telling(save: Any, root: Path) -> Any:
    """``save_state`` or ``save_model``, which then add what the learner holds to ``<root>.states``."""

    def told(run: Run, stage: str, step: int, learner: Learner, *more: Any) -> Any:
        saved = save(run, stage, step, learner, *more)
        line = f"{stage} {step} {save.__name__} {digest(learner_state(learner))}\n"
        with root.with_suffix(".states").open("a", encoding="utf-8") as file:
            file.write(line)
        return saved

    return told


def learner_state(learner: Learner) -> dict[str, Any]:
    """All that a learner goes on from."""
    return {
        "step": learner.step,
        "version": learner.version,
        "weights": {name: value.detach() for name, value in learner.model.trainable},
        "optimizer": learner._optimizer.state(),
    }


def digest(value: Any) -> str:
    """Of nested mappings and lists of tensors and plain values, to the last bit."""
    import torch

    found = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, Mapping):
            for key, inner in one.items():
                found.update(f"{key}:".encode())
                add(inner)
        elif isinstance(one, list | tuple):
            for inner in one:
                add(inner)
        elif isinstance(one, torch.Tensor):
            found.update(f"{one.dtype} {tuple(one.shape)}".encode())
            found.update(one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(one).encode())

    add(value)
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# What a process might not restore


def _after_load(change: Callable[[Learner], None]) -> None:
    from turnwise.learn.learner import Learner

    load = Learner.load

    def loaded(self: Learner, path: Any) -> None:
        load(self, path)
        change(self)

    Learner.load = loaded


def _weights() -> None:
    from turnwise.learn.learner import Learner

    load = Learner.load

    def loaded(self: Learner, path: Any) -> None:
        before = {name: value.detach().clone() for name, value in self.model.trainable}
        load(self, path)
        for name, value in self.model.trainable:
            value.data.copy_(before[name])

    Learner.load = loaded


def _moments() -> None:
    from turnwise.learn.optim import Optimizer

    Optimizer.load_state = lambda self, state: None


def _dropout() -> None:
    from contextlib import nullcontext

    from turnwise.learn import learner

    learner._seeded = lambda *_: nullcontext()


def _lessons() -> None:
    from turnwise.pipeline.sft import LessonOrder

    update = LessonOrder.update
    LessonOrder.update = lambda self, number: update(self, number - 2)


def _tasks() -> None:
    from turnwise.pipeline.tasks import TaskStream

    TaskStream.__getitem__ = lambda self, index: self.tasks[index]


def _seeds() -> None:
    from turnwise.pipeline import rl

    sampling = rl.sampling_of
    rl.sampling_of = lambda config, seed: sampling(config, seed=seed + 1)


def _groups() -> None:
    from turnwise.pipeline.source import GroupSource

    GroupSource.spend = lambda self, *_: None


def _minibatches() -> None:
    from turnwise.pipeline import rl

    updates_of = rl.updates_of
    rl.updates_of = lambda groups, config, *, seed, step: updates_of(groups, config, seed=seed, step=step - 2)


def _counts() -> None:
    from turnwise.rollout.scheduler import Scheduler

    Scheduler.metrics = property(lambda self: {})


def _told() -> None:
    tell = RunDir.metrics

    def again(self: RunDir, *args: Any) -> None:
        self._told = set()
        tell(self, *args)

    RunDir.metrics = again


def _report() -> None:
    from turnwise.view import report

    report.write_report = lambda run: run.path


FAULTS: dict[str, Callable[[], None]] = {
    "weights": _weights,
    "the optimizer's moments": _moments,
    "the schedule's position": lambda: _after_load(lambda learner: setattr(learner, "step", 0)),
    "the version": lambda: _after_load(lambda learner: setattr(learner, "version", 0)),
    "the engine's weights": lambda: _forgotten.append("weights"),
    "the order of lessons": _lessons,
    "the order of tasks": _tasks,
    "the groups that are used up": _groups,
    "the order of minibatches": _minibatches,
    "the seeds of sampling": _seeds,
    "the seeds of dropout": _dropout,
    "which metrics were told": _told,
    "what the scheduler counts": _counts,
    "the report": _report,
}
"""What would go wrong where one thing were not restored: `differences` must see each."""


# ---------------------------------------------------------------------------------------------------------
# Between two processes


def lose_power(path: Path, chance: random.Random) -> None:
    """Cut the files that only grow somewhere behind what was flushed last: the rest was only in memory."""
    synced: dict[str, int] = {}
    for line in path.with_suffix(".synced").read_bytes().splitlines():
        name, size = orjson.loads(line)
        synced[name] = size
    for file in path.rglob("*.jsonl"):
        safe, size = synced.get(str(file.relative_to(path)), 0), file.stat().st_size
        if size > safe:
            os.truncate(file, chance.randint(safe, size))


# ---------------------------------------------------------------------------------------------------------
# At the end

TIMES = re.compile(r"(^|_)(seconds|time|started|per_second)$")
"""Keys whose values are times."""
MATTER_OF_TIME = {
    "versions", "cached_tokens", "prefilled_tokens", "staleness_mean", "staleness_max", "mismatch",
    "mismatch_kl", "mismatch_max", "scheduler/groups_in_flight", "scheduler/groups_ready",
}  # fmt: skip
"""What also differs between two unbroken runs that play ahead: which of two versions drew a token."""


class Timeless(RunDir):
    """A run directory that took a second for everything, for comparing reports."""

    def finished(self) -> dict[str, dict[str, Any]]:
        return {stage: info | {"seconds": 1.0} for stage, info in super().finished().items()}

    def read_metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        return [without_times(line) for line in super().read_metrics(stage)]

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        return (record | {"seconds": 1.0} for record in super().records(stage))


def without_times(value: Any, also: frozenset[str] = frozenset()) -> Any:
    """Plain data without the keys that hold times, and ``also``."""
    if isinstance(value, dict):
        return {
            key: without_times(inner, also)
            for key, inner in value.items()
            if not TIMES.search(key) and key not in also
        }
    return [without_times(inner, also) for inner in value] if isinstance(value, list) else value


def differences(ours: Path, theirs: Path, *, ahead: bool = False) -> list[str]:
    """What differs between two finished runs, beyond times: a line for each file, with the first difference.

    Args:
        ours: The run that was killed.
        theirs: The unbroken one.
        ahead: Whether they played ahead.
    """
    also = frozenset(MATTER_OF_TIME) if ahead else frozenset()
    found: list[str] = []
    files = {
        str(file.relative_to(root)) for root in (ours, theirs) for file in root.rglob("*") if file.is_file()
    }
    for name in sorted(files - {".lock", "report.html"}):
        mine, other = ours / name, theirs / name
        if not mine.exists() or not other.exists():
            found.append(f"{name}: {'left over' if mine.exists() else 'missing'}")
        elif name.endswith(".jsonl"):
            found += _lines_differ(name, _records(mine, also), _records(other, also))
        elif name.startswith("done/"):
            read = [without_times(orjson.loads(file.read_bytes())) for file in (mine, other)]
            found += _first_difference(name, *read)
        elif mine.read_bytes() != other.read_bytes():
            found.append(f"{name}: other bytes")
    for path in (ours, theirs):
        if not (path / "report.html").exists():
            return [*found, f"{path}: there is no report"]
        if (path / "report.html").read_text(encoding="utf-8") != page(RunDir(path)):
            found.append(f"{path}: report.html is not of this run")
    if not ahead:
        found += _first_difference(
            "report.html", *(page(Timeless(path)).split("<") for path in (ours, theirs))
        )
    return [*found, *_states_differ(_states(ours), _states(theirs))]


def _records(file: Path, also: frozenset[str]) -> dict[str, Any]:
    """The lines of a file by what names them; a name that comes twice is counted up."""
    records: dict[str, Any] = {}
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            records["a torn line"] = line
            continue
        record = without_times(orjson.loads(line), also)
        name = base = record.get("id") or f"{record['stage']} {record['step']}"
        again = 1
        while name in records:
            again += 1
            name = f"{base} (line {again} of it)"
        records[name] = record
    return records


def _lines_differ(file: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*mine, *other}):
        if name not in mine or name not in other:
            yield f"{file}: {name}: {'one too many' if name in mine else 'missing'}"
        else:
            yield from _first_difference(f"{file}: {name}", mine[name], other[name])


def _first_difference(where: str, mine: Any, other: Any) -> list[str]:
    if type(mine) is type(other) is dict:
        for key in [*other, *(key for key in mine if key not in other)]:
            if key not in mine or key not in other:
                return [f"{where}.{key}: {'only ours' if key in mine else 'missing'}"]
            if found := _first_difference(f"{where}.{key}", mine[key], other[key]):
                return found
        return []
    if type(mine) is type(other) is list:
        for number, (one, two) in enumerate(zip_longest(mine, other)):
            if found := _first_difference(f"{where}[{number}]", one, two):
                return found
        return []
    # By their text: what is no number is equal to itself here.
    return [] if repr(mine) == repr(other) else [f"{where}: {mine!r:.80}, unbroken {other!r:.80}"]


def _states(path: Path) -> list[tuple[str, str]]:
    """(which state, its digest) of every time that a learner was saved."""
    lines = path.with_suffix(".states").read_text(encoding="utf-8").splitlines()
    return [(which, found) for which, _, found in (line.rpartition(" ") for line in lines)]


def _states_differ(mine: Sequence[tuple[str, str]], other: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Every state that was ever saved is that of the unbroken run at the same step."""
    wanted = dict(other)
    for which, found in mine:
        if found != wanted.get(which):
            yield f"the learner at {which}: {found}, unbroken {wanted.get(which)}"
