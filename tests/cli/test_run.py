"""``turnwise run`` as a person meets it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from tests.end_to_end.tiny import play, recipe

from turnwise.cli.report import report
from turnwise.cli.run import run
from turnwise.errors import RecipeError, StoreError


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


def test_a_model_directory_that_is_not_there(tmp_path: Path) -> None:
    made = recipe({"model": {"name": "./no/such-model"}})
    with pytest.raises(RecipeError, match=r"model.name: there is no directory \./no/such-model"):
        play(made, tmp_path / "tiny")


def test_a_report_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no run directory"):
        report(tmp_path / "nope")
    assert not (tmp_path / "nope").exists()
