"""What a run tells people while it goes on: small typed events, which the pipeline emits and a view takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    stage: str
    total: int
    """How much there is to do, finished parts included."""
    unit: str
    """What is counted: ``episodes``, ``updates``, ``steps``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a stage is; comes often."""

    stage: str
    done: int
    metrics: Mapping[str, float]
    """Running values worth a glance, such as the mean reward of each environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One step's metrics, as they stand in ``metrics.jsonl``."""

    stage: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """A stage is done; skipped ones say so in their summary."""

    stage: str
    summary: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that is no progress."""

    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """The run was stopped and can go on."""

    resume_command: str


Event = StageStarted | Progress | StepLine | StageFinished | Note | Interrupted
Sink = Callable[[Event], None]
"""Takes events; must be quick, as a run waits for it."""
