"""Sabotage: break a copy of the tree in one line, and see that a named test fails.

    python -m tests.sabotage.run                       # all mutations, some seconds each
    python -m tests.sabotage.run --jobs 2              # two at a time, each in a copy of its own
    python -m tests.sabotage.run --sample 6 --seed 3   # six of them
    python -m tests.sabotage.run mask_shifted_by_one   # by name
    python -m tests.sabotage.run --list                # what there is, and which tests guard it

A test that passes on broken code proves nothing. For each mutation of `tests.sabotage.mutations` the tree is
copied, the tests that guard the line are run as they are (they must pass), the line is broken, and they are
run again: at least one must fail over what the code does. One that fails because the mutation is no longer
Python that runs (a name that is gone, say) proves nothing either. A mutation whose line is no longer there,
or is there twice, is an error: it has to follow the code.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from tests.sabotage.mutation import Mutation
from tests.sabotage.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PARTS = ("src", "tests", "recipes", "examples", "docs", "pyproject.toml", "README.md", "LICENSE")
"""What a copy holds: everything that a test may read."""

Outcome = Literal["caught", "survived", "broken"]

_FAILED = re.compile(r"^FAILED (?P<test>\S.*?)(?: - (?P<reason>.*))?$", re.MULTILINE)
_MISFIRES = (
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "UnboundLocalError",
    "AttributeError",
    "SyntaxError",
)
"""What a test fails with where the mutation broke Python's rules and not the code's behaviour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one mutation."""

    mutation: Mutation
    outcome: Outcome
    """``broken``: pytest could not run the tests, or one failed for a reason that says nothing."""
    failure: str
    """The test that failed first, and why."""
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
    outcome, failure = _judge(code, output)
    return Result(
        mutation=mutation,
        outcome=outcome,
        failure=failure,
        seconds=time.monotonic() - began,
        output="" if outcome == "caught" else output,
    )


def _judge(code: int, output: str) -> tuple[Outcome, str]:
    if code == 0:
        return "survived", ""
    failed = _FAILED.search(output)
    # 1 is pytest's "tests ran and some failed"; 2 to 5 say that it could not run them. A fixture that fails
    # is told as an error, not as a failure.
    if code != 1 or failed is None:
        return "broken", ""
    reason = failed["reason"] or ""
    return ("broken" if reason.startswith(_MISFIRES) else "caught"), f"{failed['test']}: {reason}"


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit code and output on some tests of a copy, in a process of their own."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as said:
        process = _FORKED.Process(target=_pytest, args=(tree, tests, said.name))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode, said.read()


_FORKED = multiprocessing.get_context("forkserver")
# Imported once, in the server: torch and transformers take longer than most guards. Nothing of ours.
_FORKED.set_forkserver_preload(
    ["hypothesis", "peft", "pydantic", "pytest", "torch", "transformers.models.qwen3.modeling_qwen3"]
)


def _pytest(tree: Path, tests: Sequence[str], said: str) -> None:
    """Be pytest on a copy."""
    import pytest
    import torch

    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    # Before the editable install, so that the copy's package is the one that is imported; here, and in what
    # the tests start.
    sys.path[:0] = paths = [str(tree / "src"), str(tree)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    for module in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[module]  # This one's.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["COLUMNS"] = "200"  # The reason stands at the end of a line that is cut to the terminal.
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    import turnwise

    assert Path(turnwise.__file__).is_relative_to(tree), f"{turnwise.__file__} would be tested"
    sys.exit(int(pytest.main(["-q", "-x", "-n0", "-rf", *tests])))


def copy_tree(to: Path) -> Path:
    """A copy of the tree."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, to / part)
    return to


def run(mutations: Sequence[Mutation], *, jobs: int = 1) -> list[Result]:
    """Try mutations on copies of the tree; what is not caught is printed with pytest's output.

    The guarding tests are run on unbroken copies first: one that fails anyway would catch everything.
    """
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies = [copy_tree(Path(folder) / str(job)) for job in range(jobs)]
        _check_unbroken(mutations, copies, pool)
        trees: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            trees.put(copy)

        def one(mutation: Mutation) -> Result:
            tree = trees.get()
            try:
                result = sabotage(mutation, tree)
            finally:
                trees.put(tree)
            print(f"{result.outcome:9} {result.seconds:5.1f} s  {mutation.name}: {mutation.why}", flush=True)
            if result.failure:
                print(f"{'':18} {result.failure}", flush=True)
            if result.output:
                print(result.output, flush=True)
            return result

        return list(pool.map(one, mutations))


def _check_unbroken(mutations: Sequence[Mutation], copies: Sequence[Path], pool: ThreadPoolExecutor) -> None:
    """Run all guards on the copies, each file's on one of them.

    Raises:
        SystemExit: One fails.
    """
    began = time.monotonic()
    by_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for mutation in mutations for test in mutation.tests):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    files = list(by_file.values())
    parts = [[test for file in files[job :: len(copies)] for test in file] for job in range(len(copies))]
    parts = [part for part in parts if part]
    for code, output in pool.map(run_tests, copies, parts):
        if code != 0:
            raise SystemExit(f"the guarding tests fail on the unbroken tree:\n{output}")
    print(
        f"{sum(map(len, parts))} guards pass on the unbroken tree, {time.monotonic() - began:.1f} s",
        flush=True,
    )


def sample(count: int, seed: int) -> list[Mutation]:
    """Some of the mutations."""
    return random.Random(seed).sample(list(MUTATIONS), min(count, len(MUTATIONS)))


def show(mutations: Sequence[Mutation]) -> None:
    """Print what each mutation breaks and who notices."""
    for mutation in mutations:
        print(f"{mutation.name}  ({mutation.file})\n    {mutation.why}")
        for test in mutation.tests:
            print(f"    {test}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutations to try; all if none is given")
    parser.add_argument("--sample", type=int, help="try so many, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree to work on at once")
    parser.add_argument("--list", action="store_true", help="only show them")
    args = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    chosen = [known[name] for name in args.names] or list(MUTATIONS)
    if args.sample is not None:
        chosen = sample(args.sample, args.seed)
    if args.list:
        show(chosen)
        return
    results = run(chosen, jobs=args.jobs)
    caught = sum(result.outcome == "caught" for result in results)
    print(f"{caught} of {len(results)} mutations were caught")
    sys.exit(caught != len(results))


if __name__ == "__main__":
    main()
