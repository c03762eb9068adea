"""The benchmark of a whole step at test size: both sides make the same update, and the table has its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.grpo_step import Peak, Step, main, require_same_work
from benchmarks.walk import make_model

STEP = Step(seconds=1.0, cpu=1.0, episodes={("walk 1", 0): [1, 2]}, grad_norm=0.5, peak=1)


@pytest.mark.slow
def test_four_episodes_through_both(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    make_model(tmp_path / "model", most=2, steps=80)
    small = ["--episodes", "4", "--reps", "1", "--turns", "2", "--model", str(tmp_path / "model")]
    main([*small, "--json", str(tmp_path / "rows.json")])
    torch.set_num_threads(before)
    found = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert [(name, row["unit"]) for name, row in found.items()] == [
        ("slow_env", "s"),
        ("instant_env", "s"),
        ("update_memory", "MiB"),
    ]
    for row in found.values():
        assert set(row) == {"name", "unit", "ours", "theirs", "ratio"}
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=0.05)
    assert found["update_memory"]["ratio"] > 1


def test_unequal_work_is_refused() -> None:
    require_same_work(STEP, STEP)
    with pytest.raises(RuntimeError, match=r"\('walk 1', 0\): the two sides came to different tokens"):
        require_same_work(STEP, replace(STEP, episodes={("walk 1", 0): [1, 3]}))
    with pytest.raises(RuntimeError, match="different tokens"):
        require_same_work(STEP, replace(STEP, episodes={}))
    with pytest.raises(RuntimeError, match="have not made the same update"):
        require_same_work(replace(STEP, grad_norm=0.0), STEP)


def test_the_peak_is_what_is_held_at_once() -> None:
    class Update:
        def plays(self) -> None:
            torch.zeros(1 << 20)

        def learns(self) -> None:
            self.plays()
            for _ in range(3):
                held = torch.zeros(1 << 18)
                del held
            both = torch.zeros(1 << 18), torch.zeros(1 << 18)
            del both

    peak, update = Peak(), Update()
    undo = peak.around(update, "learns", after="plays")
    update.learns()
    undo()
    assert peak.most == pytest.approx(2 * 4 * (1 << 18), rel=0.01)
