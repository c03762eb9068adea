"""Steps that are refilled, killed and resumed: nothing is played twice, learned from twice, or selected anew.

Rewards decide here what is played next, so whatever a resumed run got wrong would show in every later file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest
from tests.end_to_end.kills import NAME, SMALL, Strike, differences
from tests.end_to_end.tiny import Child, Trap, recipe

from turnwise.config import Recipe
from turnwise.store import RunDir, StepRecord

pytestmark = pytest.mark.slow

MADE: Recipe = recipe(
    SMALL
    | {
        "collect": None, "sft": None, "evaluate": None,
        "environments.catch.limits": {"max_tokens": 40},
        "rl.groups": {"catch": 2},
        "rl.steps": 6,
        "rl.group_size": 2,
        "rl.flat_groups": "refill",
        "rl.refill_limit": 2,
        "rl.overlong": {"mask": True, "reasons": ["max_turns", "max_tokens"], "penalty": {"cache": 20}},
    }
    | {"environments": {"catch": SMALL["environments"]["catch"]}}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scripted:
    """A scripted engine, and a kill at an exact line of a file; for `tiny.Child`, as a trap."""

    trap: Trap

    def arm(self, root: Path) -> None:
        """Put both into this process."""
        Strike().arm(root)
        self.trap.arm(root)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken") / NAME
    child = Child(MADE, path, trap=Strike())
    assert child.wait() == 0, child.said()
    return path


def steps(path: Path) -> list[StepRecord]:
    return list(RunDir(path).steps("rl"))


def test_a_refilled_run_says_what_it_dropped(unbroken: Path) -> None:
    told = RunDir(unbroken).read_metrics("rl")
    found = steps(unbroken)
    used = [id for one in found for id in one.trajectory_ids]
    assert len(set(used)) == len(used) and set(used) == RunDir(unbroken).ids("rl"), (
        "all that was played is used up"
    )
    for record, line in zip(found, told, strict=True):
        groups = {id.rpartition("/")[0] for id in record.trajectory_ids}
        dropped = set(record.info.get("dropped", ()))
        assert dropped <= groups and len(dropped) == line["dropped_groups"]
        assert len(groups) - len(dropped) == 2 - line["missing_groups"]
        assert len(groups) <= 4 and (len(groups) == 4 or not line["missing_groups"])
    assert any(line["dropped_groups"] and not line["missing_groups"] for line in told), "none was refilled"
    assert any(line["missing_groups"] for line in told), "none met its bound"
    assert any(line["updates"] for line in told)


def places(path: Path) -> Iterator[Trap]:
    """In the middle of a step and between its last episode and its record; in the record and after it."""
    ends = list(accumulate(len(one.trajectory_ids) for one in steps(path)))
    for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
        if number % 2:
            yield Trap("trajectories/rl.jsonl", (begin + end) // 2, torn=number % 4 == 1)
            yield Trap("trajectories/rl.jsonl", end)
        else:
            yield Trap("steps.jsonl", number, torn=True)
            yield Trap("steps.jsonl", number)


def test_killed_around_every_record_the_final_files_are_the_same(tmp_path: Path, unbroken: Path) -> None:
    """One run that dies at all of these places in turn, and is whole in the end."""
    path = tmp_path / NAME
    for trap in places(unbroken):
        child = Child(MADE, path, trap=Scripted(trap))
        assert child.wait() == -trap.signal, f"{trap} was never reached: {child.said()}"
    child = Child(MADE, path, trap=Strike())
    assert child.wait() == 0, child.said()
    assert differences(path, unbroken) == []
