"""The rollout benchmark at test size: both sides do the same work, and the table has its rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.rollouts import Episode, Played, main, require_same_work
from benchmarks.walk import SCENES, make_model, rows


@pytest.fixture(scope="module")
def one_thread():
    """The benchmark sets it for its process; the other tests keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_four_episodes_through_both(tmp_path: Path, one_thread: None) -> None:
    make_model(tmp_path / "model", most=2, steps=80)
    table = tmp_path / "rows.json"
    small = ["--episodes", "4", "--reps", "1", "--turns", "2"]
    main(["--json", str(table), "--model", str(tmp_path / "model"), *small])
    found = json.loads(table.read_text())
    assert [(row["name"], row["unit"]) for row in found] == [
        ("slow_env", "s"),
        ("instant_env", "s"),
        ("sampled_tokens", "tokens"),
        ("decode_slots", "tokens"),
        ("prefilled_tokens", "tokens"),
    ]
    by_name = {row["name"]: row for row in found}
    for row in found:
        assert set(row) == {"name", "unit", "ours", "theirs", "ratio"}
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=0.05)
    assert by_name["sampled_tokens"]["ours"] == by_name["sampled_tokens"]["theirs"]
    # TRL reads every context again at each turn; the prompt alone is some 170 tokens, twice over two turns.
    assert by_name["prefilled_tokens"]["ratio"] > 2
    # The slow scene sleeps for every step, in series on the side that waits for each.
    slept = 2 * sum(sum(row["delays"]) for row in rows(SCENES[0], 2, most=2))
    assert by_name["slow_env"]["theirs"] > slept


def test_rows_are_the_same_every_time_and_reach_the_longest_walk() -> None:
    for scene in SCENES:
        assert rows(scene, 16) == rows(scene, 16)
        assert sorted(row["turns"] for row in rows(scene, 16))[::15] == [1, 12]
    delays = [delay for row in rows(SCENES[0], 16) for delay in row["delays"]]
    assert 0.005 <= min(delays) < 0.02 and 0.18 < max(delays) <= 0.2
    assert all(row["delays"] is None for row in rows(SCENES[1], 16))


def test_unequal_work_is_refused() -> None:
    data = rows(SCENES[1], 1, most=1)
    one = Episode(prompt=[9], completion=[1, 2], sampled=[True, False], calls=1, reward=1.0)
    good = Played(seconds=1.0, cpu=1.0, episodes=[one, one], prefilled=1, slots=2)
    require_same_work(good, good, data)
    for change in ({"completion": [1, 3]}, {"sampled": [True, True]}, {"prompt": [8]}, {"calls": 2}):
        other = replace(good, episodes=[one, replace(one, **change)])
        with pytest.raises(RuntimeError, match=f"episode 1: the two sides differ in {next(iter(change))}"):
            require_same_work(good, other, data)
    lazy = replace(good, episodes=[replace(one, calls=0, reward=0.0)] * 2)
    with pytest.raises(RuntimeError, match="0 of 1 calls"):
        require_same_work(lazy, lazy, data)
    with pytest.raises(ValueError, match="shorter"):
        require_same_work(replace(good, episodes=[one]), good, data)
