"""Sabotage: break a copy of the tree in one line, and see that a named test fails.

    python -m tests.sabotage.run                       # all mutations, some seconds each
    python -m tests.sabotage.run --sample 6 --seed 3   # six of them
    python -m tests.sabotage.run mask_shifted_by_one   # by name

A test that passes on broken code proves nothing. For each mutation of `tests.sabotage.mutations` the tree is
copied, the tests that guard the line are run as they are (they must pass), the line is broken, and they are
run again: at least one must fail, by an assertion or an error of its own. A mutation whose line is no longer
there, or is there twice, is an error: it has to follow the code.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from tests.sabotage.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
PARTS = ("src", "tests", "recipes", "examples", "docs", "pyproject.toml", "README.md")
"""What a copy holds: everything that a test may read."""

Outcome = Literal["caught", "survived", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one mutation."""

    mutation: Mutation
    outcome: Outcome
    """``broken``: the tests fail without it too, or pytest could not run them."""
    seconds: float
    output: str
    """Of pytest, where it was not caught."""


def sabotage(mutation: Mutation, tree: Path) -> Result:
    """Apply a mutation to the copy ``tree``, run its tests, and put the line back.

    Raises:
        ValueError: The mutation's line is not in its file exactly once.
    """
    began = time.monotonic()
    path = tree / "src/turnwise" / mutation.file
    original = path.read_text(encoding="utf-8")
    mutated = mutation.apply(original)
    try:
        path.write_text(mutated, encoding="utf-8")
        code, output = run_tests(tree, mutation.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    # 1 is pytest's "tests ran and some failed"; 2 to 5 say that it could not run them.
    outcome: Outcome = {0: "survived", 1: "caught"}.get(code, "broken")  # type: ignore[assignment]
    return Result(
        mutation=mutation,
        outcome=outcome,
        seconds=time.monotonic() - began,
        output="" if outcome == "caught" else output,
    )


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit code and output on some tests of a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        # Before the editable install, so that the copy's package is the one that is imported.
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def copy_tree(to: Path) -> Path:
    """A copy of the tree, checked to be the one that its tests import."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, to / part)
    found = subprocess.run(
        [sys.executable, "-c", "import turnwise; print(turnwise.__file__)"],
        cwd=to, env={**os.environ, "PYTHONPATH": str(to / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()).is_relative_to(to), f"the copy is not what is imported: {found.stdout}"
    return to


def run(mutations: Sequence[Mutation], *, jobs: int = 1) -> list[Result]:
    """Try mutations on copies of the tree; what is not caught is printed with pytest's output.

    The guarding tests are run on an unbroken copy first: one that fails anyway would catch everything.
    """
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            trees.put(copy_tree(Path(folder) / str(job)))
        guards = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        tree = trees.get()
        code, output = run_tests(tree, guards)
        trees.put(tree)
        if code != 0:
            raise SystemExit(f"the guarding tests fail on the unbroken tree:\n{output}")

        def one(mutation: Mutation) -> Result:
            tree = trees.get()
            try:
                result = sabotage(mutation, tree)
            finally:
                trees.put(tree)
            print(f"{result.outcome:9} {result.seconds:5.1f} s  {mutation.name}: {mutation.why}", flush=True)
            if result.output:
                print(result.output, flush=True)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutations))


def sample(count: int, seed: int) -> list[Mutation]:
    """Some of the mutations."""
    return random.Random(seed).sample(list(MUTATIONS), min(count, len(MUTATIONS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutations to try; all if none is given")
    parser.add_argument("--sample", type=int, help="try so many, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree to work on at once")
    args = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    chosen = [known[name] for name in args.names] or list(MUTATIONS)
    if args.sample is not None:
        chosen = sample(args.sample, args.seed)
    results = run(chosen, jobs=args.jobs)
    caught = sum(result.outcome == "caught" for result in results)
    print(f"{caught} of {len(results)} mutations were caught")
    sys.exit(caught != len(results))


if __name__ == "__main__":
    main()
