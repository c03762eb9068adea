"""`Faults`: what goes wrong with a reward function, told once of each kind; and where that ends the run.

    faults.note("accuracy", [1.0, ScoringError("…"), 0.0], ends_run=True)      # a warning with a traceback
    faults.note("accuracy", [ScoringError("…")] * 8, ends_run=True)            # its very error is raised

A function that raises on every sibling of a group that it is asked about says nothing of any reply. Before it
has scored anything, whatever it raises is taken for its own fault; afterwards `DEFECTS` are, which are
mistakes in code, while a judge that answers nobody for a while is not.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

from turnwise.errors import AnswerError, EnvLostError, TurnwiseError

log = logging.getLogger(__name__)

ScoreOrError = float | None | TurnwiseError
"""A `ScoringError` where the sibling's replies broke the function, an `EnvLostError` where they did not."""

DEFECTS = (TypeError, NameError, AttributeError, AnswerError)
"""Raised on all siblings of any group these end a run."""


class Faults:
    """Of one function, over a run."""

    def __init__(self) -> None:
        self._worked = False
        """It has scored something."""
        self._told: set[type] = set()
        self._count = 0

    def note(self, name: str, scores: Sequence[ScoreOrError], *, ends_run: bool) -> None:
        """Take what a function made of the siblings of a group.

        Args:
            name: The function's.
            scores: Of each sibling.
            ends_run: Raise where it can score nothing.

        Raises:
            Exception: What the function raised, as it raised it.
        """
        faults = [one for one in scores if isinstance(one, TurnwiseError)]
        causes = [cause_of(one) for one in faults]
        blamed = len(faults) == len(scores) and not any(isinstance(one, EnvLostError) for one in faults)
        broken = not self._worked or all(isinstance(one, DEFECTS) for one in causes)
        if ends_run and blamed and broken:
            causes[0].add_note(f"The reward function '{name}' could score none of {len(scores)} completions.")
            raise causes[0]
        self._worked = self._worked or len(faults) < len(scores)
        self._count += len(faults)
        for cause in causes:
            if type(cause) not in self._told:
                self._told.add(type(cause))
                log.warning(
                    "reward function '%s' could not score %d of %d completions; of %s this is told once:\n%s",
                    name, len(faults), len(scores), type(cause).__name__, _shown(cause),
                )  # fmt: skip

    def take(self) -> int:
        """How many completions could not be scored since this was asked last."""
        taken, self._count = self._count, 0
        return taken


def cause_of(error: TurnwiseError) -> BaseException:
    """What the function raised; the error itself where nothing of the function's stands behind it."""
    return error.__cause__ or error


def _shown(error: BaseException) -> str:
    """The error with what the function's own code did, and not how it came to be called."""
    frames = inner = error.__traceback__
    while frames is not None:
        ours = frames.tb_frame.f_globals.get("__name__", "").startswith("turnwise.")
        frames = frames.tb_next
        inner = frames if ours else inner
    return "".join(traceback.format_exception(type(error), error, inner)).rstrip()
