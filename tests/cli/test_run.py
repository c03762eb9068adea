"""``turnwise run`` as a person meets it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer

from turnwise.cli.run import run


def test_the_command_to_go_on_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    override = "environments.catch.args={rows: 4, columns: 3}"
    arguments = ["run", str(recipe), override, "--runs", str(tmp_path / "my runs")]
    monkeypatch.setattr("turnwise.pipeline.run.run_recipe", interrupted)
    monkeypatch.setattr("sys.argv", ["turnwise", *arguments])
    with pytest.raises(typer.Exit) as stopped:
        run(recipe, [override], stage=None, dry_run=False, runs=tmp_path / "my runs", changed=False)
    assert stopped.value.exit_code == 130
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if "turnwise run " in line)
    assert shlex.split(command[command.index("turnwise run ") :])[1:] == arguments
