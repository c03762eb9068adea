"""The doctor: what is fine here, and that what is not fine is said and fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from turnwise.cli import doctor

app = typer.Typer()
app.command()(doctor.doctor)


def test_a_machine_that_can_run_tests_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = CliRunner().invoke(app, ["--runs", str(tmp_path / "not/there/yet")])
    assert done.exit_code == 0, done.output
    assert "a tiny model learns on" in done.output
    assert "HF_TOKEN=set" in done.output and "secret" not in done.output
    assert "OMP_NUM_THREADS=1" in done.output
    assert not (tmp_path / "not").exists()


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_GB", 1e9)
    done = CliRunner().invoke(app, ["--runs", str(tmp_path)])
    assert done.exit_code == 1
    assert "✗ disk" in done.output and "make room" in done.output and "Ready" not in done.output


def test_a_missing_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name == "peft" else find(name))
    findings = list(doctor.examine(Path()))
    assert [(one.what, one.found) for one in findings if one.state == "bad"] == [("peft", "not installed")]
    assert not any(one.what == "smoke" for one in findings)  # nothing to try it with


def test_a_missing_extra_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    extras = list(doctor._extras())
    assert [one.state for one in extras] == ["info", "info", "info"]
    assert extras[1].remedy == "pip install 'turnwise[reasoning-gym]'"
