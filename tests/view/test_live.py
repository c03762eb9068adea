"""What people see while a run goes on, with a terminal and without."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from turnwise.config import ModelConfig, Recipe
from turnwise.recipe import load_recipe
from turnwise.store import RunDir
from turnwise.view import live as live_module
from turnwise.view.events import Interrupted, Note, Progress, StageFinished, StageStarted, StepLine
from turnwise.view.live import Live, changed_settings
from turnwise.view.rows import duration, short, summary_rows

SUMMARY = {
    "catch": {
        "random": {
            "mean": 0.2, "low": 0.15, "high": 0.25, "n": 256, "greedy": None, "failed": 0,
            "pass_at": {"1": 0.2},
        },
        "rl": {
            "mean": 0.94, "low": 0.91, "high": 0.97, "n": 1256, "greedy": 1.0, "failed": 2,
            "pass_at": {"1": 0.94, "4": 1.0},
            "gain": {"over": "sft", "mean": 0.38, "low": 0.31, "high": 0.44},
        },
        "sft": {
            "mean": 0.56, "low": 0.5, "high": 0.62, "n": 256, "greedy": 0.24, "failed": 0,
            "pass_at": {"1": 0.56}, "gain": {"over": "untrained", "mean": -0.01, "low": -0.05, "high": 0.02},
        },
        "untrained": {
            "mean": None, "low": None, "high": None, "n": 0, "greedy": None, "pass_at": {}, "failed": 256,
        },
    }
}  # fmt: skip
METRICS = {
    "reward/catch": 0.5, "reward/sum": 0.25, "entropy": 0.61, "approx_kl": 0.00012, "clip_high": 0.02,
    "mismatch": 2e-6, "grad_norm": 12.5, "unlisted": 9.9, "rollout_seconds": 0.75, "learn_seconds": 0.2,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: small\nmodel: {scratch: {layers: 2}}\nenvironments: {catch: {}}\n"
        "rl: {steps: 30, groups: {catch: 2}, optimizer: {lr: 6e-4}}\n"
    )
    return load_recipe(path)


def show(
    recipe: Recipe, *events: object, terminal: bool = False, width: int = 80, summary: object = None
) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=terminal, color_system="standard" if terminal else None,
        highlight=False, _environ={},
    )  # fmt: skip
    with Live(recipe, RunDir("runs/small"), console) as live:
        for event in events:
            live(event)
        if summary is not None:
            live.conclude(summary)
    return out.getvalue()


def test_the_header_shows_what_differs_from_the_defaults(recipe: Recipe) -> None:
    assert show(recipe).splitlines()[:4] == [
        "turnwise small  runs/small",
        "model  scratch.layers=2",
        "rl     steps=30  groups={catch: 2}  optimizer.lr=0.0006",
        "",
    ]


def test_plain_lines_without_a_terminal(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(live_module.time, "monotonic", lambda: next(clock))
    events = [
        StageStarted(stage="collect", total=9, unit="episodes"),
        *(Progress(stage="collect", done=done, metrics={"catch": 0.5}) for done in range(1, 10)),
        StageFinished(stage="collect", summary={"kept": {"catch": 4}, "share": 0.5}, seconds=185.2),
    ]
    text = show(recipe, *events)
    assert "\x1b" not in text
    assert text.splitlines()[4:] == [
        "collect: 9 episodes",
        "collect 3/9 episodes  0.250/s  catch 0.500",  # not one line an episode
        "collect 6/9 episodes  0.250/s  catch 0.500",
        "collect 9/9 episodes  0.250/s  catch 0.500",
        "collect done in 3 min 05 s  kept catch 4  share 0.500",
    ]


def test_progress_of_an_earlier_process_is_not_this_ones_speed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(live_module.time, "monotonic", lambda: next(clock))
    text = show(
        recipe,
        StageStarted(stage="collect", total=900, unit="episodes"),
        Progress(stage="collect", done=801, metrics={}),
    )
    assert text.splitlines()[-1] == "collect 801/900 episodes  0.100/s"


def test_one_line_a_step(recipe: Recipe) -> None:
    text = show(
        recipe,
        StageStarted(stage="rl", total=30, unit="steps"),
        StepLine(stage="rl", step=7, metrics=METRICS),
    )
    assert text.splitlines()[-1] == (
        "rl  7/30  catch 0.500  sum 0.250  entropy 0.610  kl 1e-04  clip↑ 0.020  mismatch 2e-06  "
        "grad  12.5  0.9s"
    )


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_step_fits_the_terminal(recipe: Recipe, width: int) -> None:
    text = show(
        recipe,
        StageStarted(stage="rl", total=30, unit="steps"),
        *(StepLine(stage="rl", step=step, metrics=METRICS) for step in (7, 12)),
        terminal=True,
        width=width,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    lines = [line for line in re.split(r"[\r\n]+", plain) if "entropy" in line or "0.9s" in line]
    assert len(lines) == 2 and all(line.endswith("0.9s") and len(line) <= width for line in lines)
    assert lines[0].index("catch") == lines[1].index("catch")
    assert ("mismatch" in lines[0]) == (width == 140)


def test_many_steps_are_thinned_and_the_last_is_shown(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(live_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Live(recipe, RunDir("runs/small"), Console(file=out, width=80)) as live:
        live(StageStarted(stage="sft", total=200, unit="updates"))
        for step in range(1, 201):
            now[0] += 0.25
            live(StepLine(stage="sft", step=step, metrics={"nll": 1.0}))
    steps = [int(found) for found in re.findall(r"sft +(\d+)/200", out.getvalue())]
    assert steps[:3] == [8, 16, 24] and steps[-1] == 200 and len(steps) == 25


def test_the_end(recipe: Recipe) -> None:
    lines = show(recipe, summary=SUMMARY, width=100).splitlines()[4:]
    rows = [line.split() for line in lines]
    assert rows[1] == ["environment", "mean", "95%", "greedy", "pass", "n", "failed", "gain"]
    assert rows[2] == ["catch", "untrained", "–", "–", "–", "–", "0", "256", "–"]
    assert rows[3][:3] == ["after", "SFT", "0.560"] and lines[3].rstrip().endswith("-1.0 [-5.0, +2.0]")
    assert rows[4][:7] == ["after", "RL", "0.940", "0.910–0.970", "1.000", "1.000", "@4"]
    assert lines[4].rstrip().endswith("1,256       2  +38.0 [+31.0, +44.0]")
    assert rows[5][:3] == ["random", "0.200", "0.150–0.250"]
    assert lines[-1] == "report  runs/small/report.html"
    assert all(len(line.rstrip()) <= 80 for line in show(recipe, summary=SUMMARY, width=80).splitlines())


def test_a_sure_gain() -> None:
    rows = {row.stage: row for row in summary_rows(SUMMARY)}
    assert list(rows) == ["untrained", "sft", "rl", "random"]
    assert rows["rl"].sure and not rows["sft"].sure and not rows["random"].model


def test_an_interruption_says_how_to_go_on(recipe: Recipe) -> None:
    command = "turnwise run recipes/small.yaml model.name=" + "x" * 90
    lines = show(
        recipe, StageStarted(stage="rl", total=30, unit="steps"), Interrupted(resume_command=command)
    ).splitlines()
    assert lines[-2:] == ["Stopped. Everything finished is in runs/small. To go on:", f"  {command}"]


def test_notes_and_warnings(recipe: Recipe) -> None:
    out = io.StringIO()
    logger = logging.getLogger("turnwise.journal")
    with Live(recipe, RunDir("runs/small"), Console(file=out, width=80)) as live:
        live(Note(level="info", text="hello [bold]not markup[/bold]"))
        logger.warning("cut away %d bytes", 3)
    handlers = list(logging.getLogger("turnwise").handlers)
    assert out.getvalue().splitlines()[-2:] == ["hello [bold]not markup[/bold]", "warning: cut away 3 bytes"]
    assert not any(type(handler).__name__ == "_LogNotes" for handler in handlers)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"), (0.6134, "0.613"), (12.44, "12.4"), (3.1e-6, "3e-06"), (15_500.0, "15.5k"),
        (-0.5, "-0.500"), (2.5e6, "2.5M"), (None, "–"), (float("nan"), "–"),
    ],
)  # fmt: skip
def test_short_numbers(value: float | None, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_header_names_the_model(recipe: Recipe) -> None:
    named = recipe.model_copy(update={"model": ModelConfig(name="Qwen/Qwen3-1.7B")})
    assert dict(changed_settings(named))["model"] == ["name=Qwen/Qwen3-1.7B"]
