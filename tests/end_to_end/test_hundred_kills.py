"""Promise 10, exactly: killed a hundred times at chosen and at random places, the final files are the same.

Each point is a run of its own that is killed once or several times in a row and then finished. Every file of
it must be the unbroken run's: trajectories, steps, metrics, models, markers, summary and report, save for
times; and every state in which a learner was ever saved, to the last bit.

    TURNWISE_KILLS=1000 TURNWISE_KILLS_SEED=7 pytest tests/end_to_end/test_hundred_kills.py -s
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from tests.end_to_end.kills import FAULTS, NAME, VARIANTS, Strike, differences, lose_power, variant
from tests.end_to_end.tiny import Child, Trap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

POINTS = int(os.environ.get("TURNWISE_KILLS", "100"))
SEED = os.environ.get("TURNWISE_KILLS_SEED") or "0"
AT_ONCE = min(2, os.cpu_count() or 1)
IN_A_ROW = 60
"""Later kills of a row fall within so many effects of the new process: where it resumes."""

Playing = Generator[Child, None, list[str]]
"""Yields what it waits for, and ends with what it found to be wrong."""


@dataclass(frozen=True, slots=True)
class Unbroken:
    """A variant's run that nobody killed."""

    path: Path
    effects: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run is killed."""

    number: int
    variant: str
    strikes: tuple[Strike, ...]
    power: tuple[bool, ...]
    """Whether the machine went down with the process, for each strike."""


def points(count: int, seed: str, unbroken: dict[str, Unbroken]) -> Iterable[Point]:
    """The first strikes are spread evenly over each variant's effects; every fifth is by the clock."""
    names = list(VARIANTS)
    slots = -(-count // len(names))
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        name = names[number % len(names)]
        whole = unbroken[name]
        at = 1 + int((number // len(names) + chance.random()) * whole.effects / slots)
        first = Strike(at=at, torn=chance.random() < 0.5)
        if number % 5 == 4:
            first = Strike(seconds=chance.uniform(0.02, 1.1 * whole.seconds))
        more = [
            Strike(at=chance.randint(1, IN_A_ROW), torn=chance.random() < 0.5)
            for _ in range(chance.choice((0, 0, 1, 2)))
        ]
        strikes = (first, *more)
        yield Point(number, name, strikes, tuple(chance.random() < 0.5 for _ in strikes))


def play(point: Point, root: Path, unbroken: Unbroken, kills: Counter[str]) -> Playing:
    """Be killed, finish, compare."""
    path = root / f"{point.number}" / NAME
    path.parent.mkdir()
    made, chance = variant(point.variant), random.Random(f"power {point.number}")
    for strike, power in zip(point.strikes, point.power, strict=True):
        child = Child(made, path, trap=strike)
        yield child
        code = child.wait(0)
        if code > 0:
            return [f"ended with {code}: {child.said()[-2000:]}"]
        kills["by the clock" if strike.seconds else "at an effect"] += code < 0
        if code < 0 and power and path.exists():
            kills["power lost"] += 1
            lose_power(path, chance)
    child = Child(made, path, trap=Strike())
    yield child
    if child.wait(0) != 0:
        return [f"did not finish: {child.said()[-2000:]}"]
    return differences(path, unbroken.path, ahead=point.variant == "ahead")


def side_by_side(waiting: Iterable[tuple[Point, Playing]]) -> Iterable[tuple[Point, list[str]]]:
    """Play a few points at a time; each with what was wrong, as they end."""
    left = iter(waiting)
    running: dict[int, tuple[Point, Playing]] = {}

    def step(point: Point, playing: Playing) -> list[str] | None:
        try:
            running[next(playing).process.sentinel] = point, playing
        except StopIteration as end:
            found: list[str] = end.value
            return found
        return None

    while True:
        while len(running) < AT_ONCE and (more := next(left, None)) is not None:
            step(*more)
        if not running:
            return
        ready = wait(list(running), timeout=120)
        assert ready, "a run hangs"
        for sentinel in ready:
            assert isinstance(sentinel, int)
            point, playing = running.pop(sentinel)
            if (found := step(point, playing)) is not None:
                yield point, found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    found = {}
    for name in VARIANTS:
        path = tmp_path_factory.mktemp(name) / NAME
        child = Child(variant(name), path, trap=Strike())
        assert child.wait() == 0, child.said()
        counted = path.with_suffix(".effects")
        began, ended = (file.stat().st_mtime for file in (path.with_suffix(".yaml"), counted))
        found[name] = Unbroken(path, int(counted.read_text()), ended - began)
    return found


def test_two_unbroken_runs_are_the_same(tmp_path: Path, unbroken: dict[str, Unbroken]) -> None:
    """What the hundred are measured against says something only where a run is fixed by its recipe."""
    for name, whole in unbroken.items():
        path = tmp_path / name / NAME
        path.parent.mkdir()
        child = Child(variant(name), path, trap=Strike())
        assert child.wait() == 0, child.said()
        assert differences(path, whole.path, ahead=name == "ahead") == []


@pytest.mark.parametrize("thing", FAULTS)
def test_what_is_not_restored_shows(thing: str, tmp_path: Path, unbroken: dict[str, Unbroken]) -> None:
    """Resumed by a process that forgets one thing, a run differs: the hundred below would tell."""
    name = "lora" if "dropout" in thing else "whole"
    in_sft = thing in ("the order of lessons", "which metrics were told")
    path = tmp_path / NAME
    # SFT's third update, or RL's third step, whose checkpoint is that of the second.
    where = Trap("metrics.jsonl", 3) if in_sft else Trap("steps.jsonl", 3 if name == "whole" else 4)
    assert Child(variant(name), path, trap=Strike(trap=where)).wait() == -9
    child = Child(variant(name), path, trap=Strike(fault=thing))
    assert child.wait() != 0 or differences(path, unbroken[name].path) != []


def test_a_hundred_kills(tmp_path: Path, unbroken: dict[str, Unbroken]) -> None:
    kills: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    began = time.monotonic()
    planned = list(points(POINTS, SEED, unbroken))
    playing = ((point, play(point, tmp_path, unbroken[point.variant], kills)) for point in planned)
    for point, found in side_by_side(playing):
        if found:
            wrong[point.number] = f"{point}\n    " + "\n    ".join(found[:8])
    seconds = time.monotonic() - began
    print(f"\nseed {SEED}: {len(planned)} points in {seconds:.0f} s, killed {dict(kills)}")
    assert not wrong, f"{len(wrong)} of {POINTS} points, seed {SEED}:\n" + "\n".join(
        wrong[number] for number in sorted(wrong)
    )
    assert kills["by the clock"] + kills["at an effect"] >= POINTS
