"""Progress and logs in the terminal: `RichProgressCallback`, drawn with rich, and what is there without it.

GRPOTrainer(…, callbacks=[RichProgressCallback()], args=GRPOConfig(…, disable_tqdm=True))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sized
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback


class RichProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Bars for training and evaluation, and under them the last log, metrics of one kind together.

    Args:
        console: Where to draw; the terminal if not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None
        self._bars = _bars()
        self._logs: Mapping[str, Any] = {}
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to draw."""
        if state.is_world_process_zero:
            self._bars, self._logs, self._evaluation = _bars(), {}, None
            done, total = state.global_step, state.max_steps
            self._training = self._bars.add_task("training", completed=done, total=total)
            self._live = Live(self._drawn(state), console=self._console, refresh_per_second=4)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self._training is not None:
            self._bars.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Move the evaluation's bar."""
        if self._live is not None and isinstance(eval_dataloader, Sized):
            if self._evaluation is None:
                self._evaluation = self._bars.add_task("evaluation", total=len(eval_dataloader))
            self._bars.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the evaluation's bar away."""
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Show a log."""
        if self._live is not None:
            self._logs = logs or {}
            self._live.update(self._drawn(state))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, and leave the last picture."""
        if self._live is not None:
            self._live.stop()
            self._live, self._training = None, None

    def _drawn(self, state: Any) -> Group:
        kinds: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in self._logs.items():
            kind, _, rest = name.partition("/")
            kinds[kind if rest else ""][rest or name] = value
        panels = []
        for kind, metrics in kinds.items():
            table = Table.grid(padding=(0, 1))
            table.add_column(no_wrap=True)
            table.add_column(justify="right")
            for name, value in metrics.items():
                table.add_row(name, f"{value:.4g}" if isinstance(value, float | int) else "–")
            panels.append(Panel(table, title=kind or f"step {state.global_step}"))
        return Group(self._bars, Columns(panels))


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    )


class _Brief(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Prints lines without what ``state.log_history`` and the trackers have beside TRL's metrics.

    Args:
        hidden: Names of metrics; looked at for each line.
    """

    def __init__(self, hidden: Collection[str]) -> None:
        super().__init__()
        self._hidden = hidden

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Print a line."""
        shown = {name: value for name, value in (logs or {}).items() if name not in self._hidden}
        super().on_log(args, state, control, logs=shown, **more)


class Bar(_Brief, ProgressCallback):  # type: ignore[misc]  # transformers has no types
    """transformers' bar."""


class Printer(_Brief, PrinterCallback):  # type: ignore[misc]  # transformers has no types
    """The same lines without a bar."""
