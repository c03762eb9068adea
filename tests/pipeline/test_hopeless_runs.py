"""Runs that cannot go as asked say so: nothing to learn anywhere, limits that the engine cannot keep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.tiny import play, recipe

from turnwise.errors import RecipeError
from turnwise.store import RunDir

EQUAL: dict[str, Any] = {
    "environments": {"equal": {"env": "tests.pipeline.envs:Flaky"}},
    "collect": None, "sft": None, "evaluate": None,
    "rl": {"steps": 2, "groups": {"equal": 2}, "group_size": 2, "sampling": {"max_tokens": 4}},
}  # fmt: skip
"""Siblings are worth the same by chance, so that there is nothing to learn."""


@pytest.mark.parametrize(("flat_groups", "played"), [("keep", 2), ("drop", 2), ("refill", 6)])
def test_a_run_of_nothing_ends_and_says_so(
    flat_groups: str, played: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refilled = {"rl.refill_limit": 3} if flat_groups == "refill" else {}
    path = tmp_path / "tiny"
    with caplog.at_level(logging.WARNING, "turnwise"):
        play(recipe(EQUAL | {"rl.flat_groups": flat_groups} | refilled), path)
    directory = RunDir(path)
    assert directory.done("rl")["version"] == 0
    told = zip(directory.steps("rl"), directory.read_metrics("rl"), strict=True)
    for number, (record, line) in enumerate(told, 1):
        assert len(record.trajectory_ids) == 2 * played
        assert (line["updates"], line["samples"], line["flat_groups"]) == (0, 0, 1)
        assert f"step {number}: there was nothing to learn" in caplog.text
        bound = f"step {number}: 2 of its 2 groups are missing: it has played rl.refill_limit=3 times as many"
        assert (bound in caplog.text) == (flat_groups == "refill")
    assert len(directory.ids("rl")) == 2 * 2 * played


def test_a_context_beyond_the_engines_is_refused_with_both_numbers(tmp_path: Path) -> None:
    asked = {"environments.equal.limits": {"max_context": 1_000_000}, "engine": {"max_sequences": 4}}
    with pytest.raises(
        RecipeError, match=r"equal.limits.max_context is 1000000, and the engine's context is \d+"
    ):
        play(recipe(EQUAL | asked), tmp_path / "tiny")
    assert RunDir(tmp_path / "tiny").stages() == [], "nothing was played"
