"""The live terminal: a header, one bar, one line a step, and the table at the end.

Without a terminal the same is plain lines: no bar, no colours, progress at most every few seconds.

    with Live(recipe, directory) as live:
        summary = run_recipe(recipe, directory, live)
        live.conclude(summary)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from turnwise.config import Recipe
from turnwise.recipe import lines
from turnwise.store import RunDir
from turnwise.view import events
from turnwise.view.rows import NONE, duration, short, summary_rows

PLAIN_SECONDS = 10.0
"""Between two progress lines without a terminal."""
MANY_STEPS = 100
"""A stage of more steps does not show each of them …"""
STEP_SECONDS = 2.0
"""… but one in this time, and the last."""

STEP_METRICS = (
    ("nll", "nll"),
    ("entropy", "entropy"),
    ("approx_kl", "kl"),
    ("kl_reference", "kl-ref"),
    ("clip_high", "clip↑"),
    ("clip_low", "clip↓"),
    ("mismatch", "mismatch"),
    ("grad_norm", "grad"),
    ("flat_groups", "flat"),
    ("staleness_mean", "stale"),
    ("tokens_per_second", "tok/s"),
)
"""What a step's line shows after the rewards, the most telling first; all else is in metrics.jsonl."""


class Live:
    """Takes a run's events and shows them; a context manager, as the bar must be cleared away."""

    def __init__(self, recipe: Recipe, directory: RunDir, console: Console | None = None) -> None:
        self.recipe, self.directory = recipe, directory
        self.console = console or Console(highlight=False)
        self._stage: events.StageStarted | None = None
        self._last_line = self._last_step = 0.0
        self._began = 0.0
        self._first_done: int | None = None
        self._log = _LogNotes(self)
        self._bar: Progress | None = None

    def __enter__(self) -> Live:
        logging.getLogger("turnwise").addHandler(self._log)
        self._header()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()
        logging.getLogger("turnwise").removeHandler(self._log)

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.StageStarted():
                self._started(event)
            case events.Progress():
                self._progress(event)
            case events.StepLine():
                self._step(event)
            case events.StageFinished():
                self._finished(event)
            case events.Note():
                style = {"info": "", "warning": "yellow", "error": "bold red"}[event.level]
                mark = "" if event.level == "info" else f"{event.level}: "
                self._print(Text(mark + event.text, style=style))
            case events.Interrupted():
                self._interrupted(event)

    def conclude(self, summary: Mapping[str, Any] | None) -> None:
        """Print the table of the summary, and where the rest is."""
        self._stop_bar()
        if summary:
            self.console.print()
            self.console.print(summary_table(summary, self.console.width))
            self._print(
                Text("Gains are over the stage before, task by task, in points, with 95% intervals.", "dim")
            )
        self.console.print()
        self._print(Text.assemble(("report  ", "dim"), f"{self.directory.path}/report.html"))

    # -- parts --------------------------------------------------------------------------------------

    def _print(self, text: Text) -> None:
        # Soft: a terminal folds a long line by itself, so that commands and paths can be copied whole.
        self.console.print(text, soft_wrap=True)

    def _header(self) -> None:
        self._print(
            Text.assemble(("turnwise ", "bold"), (self.recipe.name, "bold cyan"), f"  {self.directory.path}")
        )
        settings = list(changed_settings(self.recipe))
        width = max((len(section) for section, _ in settings), default=0)
        for section, values in settings:
            label = Text(f"{section:<{width}}  ", "dim")
            if self.console.is_terminal:
                table = Table.grid()
                table.add_row(label, Text("  ".join(values)))
                self.console.print(table)
            else:
                self._print(label.append("  ".join(values)))
        self.console.print()

    def _started(self, event: events.StageStarted) -> None:
        self._stop_bar()
        self._stage, self._began, self._first_done = event, time.monotonic(), None
        self._last_line, self._last_step = self._began, 0.0
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold cyan]{task.description}"),
                BarColumn(bar_width=None if self.console.width < 120 else 40),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                _Rate(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
                expand=self.console.width < 120,
            )
            self._bar.start()
            self._bar.add_task(event.stage, total=event.total, unit=event.unit, values="", rate="")
        else:
            self._print(Text(f"{event.stage}: {event.total:,} {event.unit}"))

    def _progress(self, event: events.Progress) -> None:
        stage = self._stage
        if stage is None or stage.stage != event.stage:
            return
        now = time.monotonic()
        if self._first_done is None:
            # What an earlier process had finished was not done at this one's speed.
            self._first_done = event.done - 1
        elapsed = now - self._began
        rate = (event.done - self._first_done) / elapsed if elapsed > 0 else 0.0
        values = "  ".join(f"{name} {short(value)}" for name, value in event.metrics.items())
        if self._bar is not None:
            task = self._bar.tasks[0].id
            self._bar.update(task, completed=event.done, values=values, rate=f"{short(rate)}/s")
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            text = f"{event.stage} {event.done}/{stage.total} {stage.unit}  {short(rate)}/s"
            self._print(Text(f"{text}  {values}".rstrip()))

    def _step(self, event: events.StepLine) -> None:
        now, total = time.monotonic(), self._stage.total if self._stage else 0
        if total > MANY_STEPS and event.step != total and now - self._last_step < STEP_SECONDS:
            return
        self._last_step = self._last_line = now
        self._print(step_text(event, total, self.console.width if self.console.is_terminal else 10_000))

    def _finished(self, event: events.StageFinished) -> None:
        self._stop_bar()
        facts = "  ".join(f"{name} {_fact(value)}" for name, value in event.summary.items())
        self._print(
            Text.assemble(
                (f"{event.stage}", "bold"),
                (" done", "green"),
                f" in {duration(event.seconds)}  ",
                (facts, "dim"),
            )
        )

    def _interrupted(self, event: events.Interrupted) -> None:
        self._stop_bar()
        self.console.print()
        self._print(Text(f"Stopped. Everything finished is in {self.directory.path}. To go on:", "yellow"))
        self._print(Text(f"  {event.resume_command}", "bold"))

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Rate(ProgressColumn):
    """Done per second, since this process began."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["rate"], "dim")


class _LogNotes(logging.Handler):
    """Warnings of Turnwise's own loggers, shown above the bar and not through it."""

    def __init__(self, live: Live) -> None:
        super().__init__(logging.WARNING)
        self._live = live

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._live(events.Note(level="error" if record.levelno >= logging.ERROR else "warning", text=text))


def changed_settings(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    """(section, its ``key=value`` that differ from the defaults), written as overrides are."""
    section, place, values = "", [""], list[str]()
    for line in lines(recipe):
        place = [*place[: line.depth], line.key]
        if line.depth == 0:
            if section and values:
                yield section, values
            section, values = line.key, []
        if line.changed and line.value and place != ["name"]:
            values.append(f"{'.'.join(place[1:]) or line.key}={line.value}")
    if values:
        yield section, values


def step_text(event: events.StepLine, total: int, width: int) -> Text:
    """One step on one line: as many metrics as fit, aligned from step to step."""
    digits = len(str(total))
    text = Text.assemble((event.stage, "bold cyan"), f" {event.step:>{digits}}/{total}")
    rewards = [
        (name.partition("/")[2], value) for name, value in event.metrics.items() if name.startswith("reward/")
    ]
    seconds = [event.metrics.get(name) for name in ("rollout_seconds", "learn_seconds", "publish_seconds")]
    parts = [Text.assemble((f"  {name} ", "dim"), (f"{short(value):>5}", "green")) for name, value in rewards]
    parts += [
        Text.assemble((f"  {label} ", "dim"), f"{short(event.metrics[name]):>5}")
        for name, label in STEP_METRICS
        if name in event.metrics
    ]
    end = Text(f"  {sum(found for found in seconds if found is not None):.1f}s", "dim")
    for part in parts:
        if text.cell_len + part.cell_len + end.cell_len > width:
            break
        text.append_text(part)
    return text.append_text(end)


def summary_table(summary: Mapping[str, Any], width: int) -> Table:
    """The summary as a table; a narrow terminal does without what is in summary.json anyway."""
    rows = summary_rows(summary)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    show_tries = width >= 100 and any(row.best_of != NONE for row in rows)
    show_failed = width >= 100 and any(row.failed != "0" for row in rows)
    table.add_column("environment", no_wrap=True, min_width=11)
    table.add_column("", no_wrap=True)
    for name in (
        "mean",
        "95%",
        "greedy",
        *(["pass"] if show_tries else []),
        "n",
        *(["failed"] if show_failed else []),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gain", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.env != before:
            table.add_section()
            table.add_row()
        cells = [row.mean, row.interval, row.greedy]
        cells += [row.best_of] if show_tries else []
        cells += [row.n]
        cells += [row.failed] if show_failed else []
        table.add_row(
            Text(row.env if row.env != before else "", "bold"),
            row.name,
            *cells,
            Text(row.gain, "bold green" if row.sure else ""),
            style="" if row.model else "dim",
        )
        before = row.env
    return table


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items())
    return short(value) if isinstance(value, float) else str(value)
