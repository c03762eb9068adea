"""What importing a room brings in, looked at in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "reasoning_gym", "trl")

LIGHT = (
    "turnwise",
    "turnwise.types",
    "turnwise.config",
    "turnwise.recipe",
    "turnwise.store",
    "turnwise.envs.session",
    "turnwise.envs.registry",
    "turnwise.envs.library",
    "turnwise.chat.base",
    "turnwise.chat.renderer",
    "turnwise.engines.base",
    "turnwise.engines.scripted",
    "turnwise.rollout.policy",
    "turnwise.rollout.scheduler",
    "turnwise.view.events",
    "turnwise.view.live",
    "turnwise.view.report",
    "turnwise.cli.main",
    "turnwise.cli.doctor",
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_are_light(module: str) -> None:
    found = python(f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert found == ""


LIMIT, MARGIN = 0.3, 2.0
"""Seconds, and how much slower a machine under load may be."""


def test_the_package_is_imported_in_a_blink() -> None:
    """In processor time, the interpreter's start left out."""
    code = "import time; began = time.process_time(); import turnwise; print(time.process_time() - began)"
    assert statistics.median(float(python(code)) for _ in range(3)) < LIMIT * MARGIN
