"""`EpisodeSink`: where every dispatched episode ends up, on disk before anyone uses it."""

from __future__ import annotations

from turnwise.store import RunDir
from turnwise.types import StopReason, Trajectory


class EpisodeSink:
    """Stores what finished, failures included, and counts what was cancelled.

    A cancelled episode did not finish: it is not stored, so that a resumed run plays it under the same id.
    """

    def __init__(self, directory: RunDir, stage: str) -> None:
        self.directory, self.stage = directory, stage
        self.stored = 0
        self.cancelled = 0

    def __call__(self, trajectory: Trajectory) -> None:
        """Take one episode.

        Raises:
            StoreError: It could not be written; what was stored before is intact.
        """
        if trajectory.stop_reason is StopReason.CANCELLED:
            self.cancelled += 1
            return
        self.directory.append(self.stage, trajectory)
        self.stored += 1
