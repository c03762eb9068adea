"""A sample of the mutations in every full run of the tests; `make sabotage` tries them all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sabotage.mutation import Mutation
from tests.sabotage.mutations import MUTATIONS
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
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_is_caught() -> None:
    """Another one each time that ``TURNWISE_SABOTAGE_SEED`` is; CI sets it to the day."""
    chosen = sample(6, int(os.environ.get("TURNWISE_SABOTAGE_SEED", "0")))
    missed = [result for result in run(chosen) if result.outcome != "caught"]
    assert not missed, [(result.mutation.name, result.outcome) for result in missed]


HARMLESS = Mutation(
    name="harmless",
    why="nothing",
    file="learn/normalise.py",
    old="    weighed = []\n",
    new="    weighed = list()\n",
    tests=("tests/learn/test_normalise.py",),
)


@pytest.mark.slow
def test_what_is_caught_is_told_from_what_is_not() -> None:
    """By the tests and not by the copying; and no test notices anything where Python itself gives up."""
    misspelt = replace(HARMLESS, name="misspelt", new="    weighed = lisst()\n")
    no_module = replace(HARMLESS, name="no module", old="import numpy as np\n", new="import numppy as np\n")
    results = run([HARMLESS, misspelt, no_module])
    assert [result.outcome for result in results] == ["survived", "broken", "broken"]
    assert "NameError" in results[1].failure and "No module named 'numppy'" in results[2].output
