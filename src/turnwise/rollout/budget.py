"""`ErrorBudget`: how much may fail before a run stops, and with which words."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

from turnwise.errors import TooManyFailuresError
from turnwise.types import StopReason, Trajectory

WINDOW = 128
"""Episodes of one environment over which its exclusion rate is taken."""
LEAST = 32
"""Episodes before the rate means anything."""


class ErrorBudget:
    """Counts what breaks, whoever broke it. Limits that are run into are no faults and never counted here.

    What the policy broke is scored, and yet a run should not go on in which that is the rule: a scorer that
    raises on most of what it is given, an environment that crashes at most calls.

    Args:
        max_failures: Episodes in a row that may break with none succeeding.
        max_excluded: Largest share of broken episodes for each environment; 1 never stops the run.
    """

    def __init__(self, *, max_failures: int = 64, max_excluded: Mapping[str, float] | None = None) -> None:
        self.max_failures, self.max_excluded = max_failures, dict(max_excluded or {})
        self._in_a_row = 0
        self._last = ""
        self._windows: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._problem: str | None = None

    def record(self, trajectory: Trajectory) -> None:
        """Take note of an episode's end; cancelled ones say nothing about anything."""
        reason = trajectory.stop_reason
        if reason is StopReason.CANCELLED:
            return
        window = self._windows[trajectory.env]
        window.append(reason.faulty)
        if not reason.faulty:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        error = trajectory.error
        self._last = f"{trajectory.id}: {reason}" + (f": {error.message} ({error.where})" if error else "")
        allowed = self.max_excluded.get(trajectory.env, 1.0)
        share = sum(window) / len(window)
        if self._problem is not None:
            return
        if self._in_a_row >= self.max_failures:
            self._problem = f"{self._in_a_row} episodes failed in a row; the last was {self._last}"
        elif len(window) >= LEAST and share > allowed:
            self._problem = (
                f"environment '{trajectory.env}': {share:.0%} of its last {len(window)} episodes failed and "
                f"max_excluded is {allowed:.0%}; the last was {self._last}"
            )

    def check(self) -> None:
        """Go on, or not.

        Raises:
            TooManyFailuresError: The budget is used up.
        """
        if self._problem is not None:
            raise TooManyFailuresError(self._problem)
