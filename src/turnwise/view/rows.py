"""The summary as people read it: one row for each environment and player, the same in terminal and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {
    "untrained": "untrained",
    "sft": "after SFT",
    "rl": "after RL",
    "random": "random",
    "constant": "constant",
}
"""What players are called, in the order of the rows."""
NONE = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One player on one environment, every value as text."""

    env: str
    stage: str
    name: str
    mean: str
    interval: str
    greedy: str
    best_of: str
    """pass@k at the largest k; a dash where each task was played once."""
    n: str
    failed: str
    gain: str
    """Over the stage before, task by task, with its interval, in points."""
    sure: bool
    """The gain's interval lies above zero."""
    model: bool
    """A stage of the model, not a baseline."""


def summary_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The rows of ``summary.json``, environment by environment.

    Args:
        summary: environment → stage → ``mean, low, high, n, greedy, pass_at, failed, gain``.
    """
    rows = []
    for env, stages in summary.items():
        for stage in sorted(stages, key=lambda stage: _place(stage)):
            found = stages[stage]
            gain = found.get("gain")
            tries = {int(k): chance for k, chance in (found.get("pass_at") or {}).items() if int(k) > 1}
            rows.append(
                Row(
                    env=env,
                    stage=stage,
                    name=NAMES.get(stage, stage),
                    mean=share(found.get("mean")),
                    interval=_interval(found),
                    greedy=share(found.get("greedy")),
                    best_of=f"{share(tries[max(tries)])} @{max(tries)}" if tries else NONE,
                    n=f"{found.get('n', 0):,}",
                    failed=str(found.get("failed", 0)),
                    gain=_gain(gain),
                    sure=bool(gain) and gain["low"] > 0,
                    model=stage not in ("random", "constant"),
                )
            )
    return rows


def share(value: float | None) -> str:
    """A mean reward with three digits; a dash where there is none."""
    return NONE if value is None else f"{value:.3f}"


def short(value: float | None) -> str:
    """A metric in about five characters: ``0.613``, ``12.4``, ``3e-06``, ``15.5k``."""
    if value is None or value != value:
        return NONE
    size = abs(value)
    if size != 0 and size < 0.0005:
        return f"{value:.0e}"
    if size < 10:
        return f"{value:.3f}"
    if size < 1000:
        return f"{value:.1f}"
    for limit, unit in ((1e6, "k"), (1e9, "M"), (1e12, "G")):
        if size < limit:
            return f"{value / limit * 1000:.1f}{unit}"
    return f"{value:.1e}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _place(stage: str) -> int:
    order = list(NAMES)
    return order.index(stage) if stage in order else len(order)


def _interval(found: Mapping[str, Any]) -> str:
    if found.get("low") is None or found.get("high") is None:
        return NONE
    return f"{share(found['low'])}–{share(found['high'])}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if not gain:
        return NONE
    return f"{gain['mean'] * 100:+.1f} [{gain['low'] * 100:+.1f}, {gain['high'] * 100:+.1f}]"
