"""A whole run in seconds: a 60k-parameter model from nothing, two small games, every stage.

`play` runs a recipe here; `Child` runs it in a process of its own, to be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import orjson

from turnwise.config import Recipe
from turnwise.errors import RecipeError
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
    "evaluate": {"tasks": {"catch": 12, "chain_sum": 10}, "seeds": 2, "sampling": {"max_tokens": 16}, "bootstrap": 500},
}  # fmt: skip


def recipe(changes: Mapping[str, Any] | None = None) -> Recipe:
    """`RECIPE` with some keys changed (``{"rl.steps": 2, "sft": None}``), checked as a loaded one is."""
    data = deepcopy(RECIPE)
    for key, value in (changes or {}).items():
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
        return run_recipe(recipe, directory, told.append, stage=stage), told


_FORKED = multiprocessing.get_context("forkserver")
# Imported once in the server, so that a child begins to work at once.
_FORKED.set_forkserver_preload(
    [
        "turnwise.pipeline.rl", "turnwise.pipeline.sft", "turnwise.pipeline.init", "turnwise.view.live",
        "turnwise.engines.transformers", "turnwise.envs.library.reasoning_gym", "reasoning_gym",
        "transformers.models.qwen3.modeling_qwen3", "tests.end_to_end.tiny",
    ]
)  # fmt: skip


class Child:
    """``turnwise run`` in a process of its own; what it prints is in ``<path>.log``.

    Args:
        recipe: What to run.
        path: The run directory; its name must be the recipe's.
        file_limit: Bytes that any file may grow to: a disk that is full for whoever writes beyond.
    """

    def __init__(self, recipe: Recipe, path: Path, *, file_limit: int | None = None) -> None:
        assert path.name == recipe.name
        self.path, self.log = path, path.with_suffix(".log")
        self.process = _FORKED.Process(target=_child, args=(recipe, path, self.log, file_limit))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; negative where a signal ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the run hangs; it said: {self.said()}")
        return self.process.exitcode

    def wait_for(self, condition: Callable[[RunDir], bool], seconds: float = 120) -> bool:
        """Whether the condition came true before the process ended."""
        directory, until = RunDir(self.path), time.monotonic() + seconds
        while time.monotonic() < until:
            if condition(directory):
                return True
            if self.process.exitcode is not None:
                return False
            time.sleep(0.002)
        self.process.kill()
        raise AssertionError(f"waited {seconds} s; it said: {self.said()}")

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def said(self) -> str:
        """What it printed, on both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _child(recipe: Recipe, path: Path, log: Path, file_limit: int | None) -> None:
    from turnwise.cli.main import main

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from turnwise.recipe import resolved

    file = path.with_suffix(".yaml")
    file.write_text(resolved(recipe), encoding="utf-8")
    if file_limit is not None:
        # Python ignores SIGXFSZ, so the write fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["turnwise", "run", str(file), "--runs", str(path.parent)]
    main()
