"""A whole run in seconds: a 60k-parameter model from nothing, two small games, every stage.

`play` runs a recipe here; `Child` runs it in a process of its own, to be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from turnwise import checkpoints, journal, store
from turnwise.config import Recipe
from turnwise.errors import RecipeError
from turnwise.journal import Journal
from turnwise.pipeline.resume import check_unchanged
from turnwise.pipeline.run import run_recipe
from turnwise.recipe_rules import problems
from turnwise.store import RunDir
from turnwise.view.events import Event

MODEL = {
    "hidden_size": 48, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 24, "ffn_size": 96,
    "vocab_size": 360, "episodes": 12,
}  # fmt: skip

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "threads": 1,
    "model": {"scratch": MODEL},
    "environments": {
        "catch": {"args": {"rows": 4, "columns": 3, "error": 0.3, "size": 60}},
        "chain_sum": {
            "env": "reasoning_gym:chain_sum",
            "args": {
                "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "size": 60,
                "prompt": "{expression}", "error": 0.3,
            },
        },
    },
    "engine": {"max_sequences": 32, "max_context": 160},
    "collect": {"episodes": {"catch": 40, "chain_sum": 60}},
    "sft": {
        "steps": 60,
        "batch": {"catch": 6, "chain_sum": 16},
        "weighting": "env",
        "optimizer": {"kind": "muon", "lr": 6e-3, "muon_lr": 0.05, "warmup_steps": 5},
        "checkpoint_every": 10,
    },
    "rl": {
        "steps": 6,
        "groups": {"catch": 2, "chain_sum": 2},
        "group_size": 4,
        "minibatches": 2,
        "sampling": {"max_tokens": 16},
        "optimizer": {"lr": 2e-3},
        "checkpoint_every": 2,
    },
    "evaluate": {
        "tasks": {"catch": 12, "chain_sum": 10}, "seeds": 2, "sampling": {"max_tokens": 16}, "bootstrap": 500,
    },
}  # fmt: skip


def recipe(changes: Mapping[str, Any] | None = None) -> Recipe:
    """`RECIPE` with some keys changed (``{"rl.steps": 2, "sft": None}``), checked as a loaded one is."""
    data = deepcopy(RECIPE)
    for key, value in deepcopy(dict(changes or {})).items():
        *path, name = key.split(".")
        section = data
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    made = Recipe.model_validate_json(orjson.dumps(data), strict=True)
    if found := problems(made):
        raise RecipeError("; ".join(found))
    return made


def play(
    recipe: Recipe, path: Path, *, stage: str | None = None, changed: bool = False
) -> tuple[dict[str, Any] | None, list[Event]]:
    """Run it here: the summary and what was told."""
    told: list[Event] = []
    directory = RunDir(path)
    with directory.lock():
        check_unchanged(directory, recipe, allowed=changed)
        return run_recipe(recipe, directory, told.append, stage=stage, changed=changed), told


_FORKED = multiprocessing.get_context("forkserver")
# Imported once in the server, so that a child begins to work at once.
_FORKED.set_forkserver_preload(
    [
        "turnwise.pipeline.rl", "turnwise.pipeline.sft", "turnwise.pipeline.init", "turnwise.view.live",
        "turnwise.engines.transformers", "turnwise.envs.library.reasoning_gym", "reasoning_gym",
        "transformers.models.qwen3.modeling_qwen3", "tests.end_to_end.tiny",
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trap:
    """Where a child sends itself a signal: a kill at an exact place, which a clock would rarely hit."""

    file: str
    """Below the run directory: a file of lines, a marker (``done/sft.json``), or ``checkpoints/rl-2``."""
    line: int = 0
    """After this line was written; markers and checkpoints are caught in the middle, before they count."""
    torn: bool = False
    """Half-way through that line instead."""
    signal: int = signal.SIGKILL

    def arm(self, root: Path) -> None:
        """Put it into this process."""
        append, sync_tree, write = Journal.append, checkpoints._sync_tree, journal.write_atomic

        def go_off() -> None:
            os.kill(os.getpid(), self.signal)

        def trapped_append(journal: Journal, line: bytes) -> None:
            if journal.path != root / self.file:
                return append(journal, line)
            number = 1 + sum(1 for _ in journal.lines())
            if self.torn and number == self.line:
                os.write(journal._open(), line[: len(line) // 2])
                go_off()
            append(journal, line)
            return go_off() if number == self.line else None

        def trapped_sync(path: Path) -> None:
            if path.name == f".{Path(self.file).name}.part" and self.file.startswith("checkpoints/"):
                go_off()
            sync_tree(path)

        def trapped_write(path: Path, data: bytes) -> None:
            if path == root / self.file:
                go_off()
            write(path, data)

        Journal.append = trapped_append
        checkpoints._sync_tree = trapped_sync
        journal.write_atomic = store.write_atomic = trapped_write


class Child:
    """``turnwise run`` in a process of its own; what it prints is in ``<path>.log``.

    Args:
        recipe: What to run.
        path: The run directory; its name must be the recipe's.
        trap: Where it signals itself.
        file_limit: Bytes that any file may grow to: a disk that is full for whoever writes beyond.
    """

    def __init__(
        self, recipe: Recipe, path: Path, *, trap: Trap | None = None, file_limit: int | None = None
    ) -> None:
        assert path.name == recipe.name
        self.log = path.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        self.process = _FORKED.Process(target=_child, args=(recipe, path, self.log, trap, file_limit))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; negative where a signal ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the run hangs; it said: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        """What it printed, on both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _child(recipe: Recipe, path: Path, log: Path, trap: Trap | None, file_limit: int | None) -> None:
    from turnwise.cli.main import main
    from turnwise.recipe import resolved

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    file = path.with_suffix(".yaml")
    file.write_text(resolved(recipe), encoding="utf-8")
    if trap is not None:
        trap.arm(path)
    if file_limit is not None:
        # Python ignores SIGXFSZ, so the write fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["turnwise", "run", str(file), "--runs", str(path.parent)]
    main()
