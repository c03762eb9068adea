"""Every Python block of docs/environments.md runs, in order, in one namespace; so do the examples."""

import asyncio
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

from turnwise.envs.check import check
from turnwise.envs.registry import make

ROOT = Path(__file__).parents[2]


def test_every_block_of_the_authoring_guide_runs():
    page = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page, re.S | re.M))
    assert len(blocks) >= 10
    # A module of its own, so that annotations and classes are found where they are looked up.
    module = ModuleType("environments_page")
    sys.modules[module.__name__] = module
    try:
        for block in blocks:
            line = page[: block.start(1)].count("\n")
            code = compile("\n" * line + block[1], str(ROOT / "docs" / "environments.md"), "exec")
            exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]


def test_the_first_environment_passes_its_check():
    report = asyncio.run(check(make(f"{ROOT / 'examples' / 'first_environment.py'}:Lock")))
    assert report.ok and not report.warnings, report


def test_the_first_environment_runs_as_a_script(capsys):
    runpy.run_path(str(ROOT / "examples" / "first_environment.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Open the lock: three digits, each from 1 to 4."
    assert lines[-2:] == ["  342: open", f"reward 1.0, {len(lines) - 2} tries"]
