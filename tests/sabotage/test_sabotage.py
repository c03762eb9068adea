"""A sample of the mutations in every full run of the tests; `make sabotage` tries them all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.sabotage.mutations import MUTATIONS, Mutation
from tests.sabotage.run import ROOT, run, sample


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_still_finds_its_line(mutation: Mutation) -> None:
    source = (ROOT / "src/turnwise" / mutation.file).read_text(encoding="utf-8")
    assert mutation.apply(source) != source
    compile(mutation.apply(source), mutation.file, "exec")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_names_tests_that_there_are(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        source = Path(ROOT / path).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in source, test


def test_there_are_enough_of_them() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sample_is_caught() -> None:
    """Another one each time that ``TURNWISE_SABOTAGE_SEED`` is; CI sets it to the day."""
    chosen = sample(6, int(os.environ.get("TURNWISE_SABOTAGE_SEED", "0")))
    missed = [result for result in run(chosen) if result.outcome != "caught"]
    assert not missed, [(result.mutation.name, result.outcome) for result in missed]


@pytest.mark.slow
def test_a_mutation_that_harms_nothing_survives() -> None:
    """The script can tell: what it calls caught was caught by the tests, not by the copying."""
    harmless = Mutation(
        name="harmless",
        why="nothing",
        file="learn/normalise.py",
        old="    weighed = []\n",
        new="    weighed = list()\n",
        tests=("tests/learn/test_normalise.py",),
    )
    assert [result.outcome for result in run([harmless])] == ["survived"]
