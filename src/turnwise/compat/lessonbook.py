"""`LessonBook`: what an `SFTTrainer` notes between two logs, and the line that it makes of that."""

from __future__ import annotations

from collections.abc import Mapping

from turnwise.compat.metrics import Ledger, Metrics, mean


class LessonBook:
    """Updates go in, lines under TRL's names come out."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._losses: list[float] = []
        self._latest: Metrics = {}
        self._total, self._updates, self._tokens = 0.0, 0, 0.0

    @property
    def train_loss(self) -> float | None:
        """As of `Book`."""
        return self._total / self._updates if self._updates else None

    def note(self, metrics: Mapping[str, float | None]) -> None:
        """Take any metrics, of which the line has the means."""
        self._ledger.add(metrics)

    def note_update(self, learned: Mapping[str, float] | None, *, seconds: float) -> None:
        """Take an update."""
        assert learned is not None
        self._losses.append(learned["loss"])
        self._total, self._updates = self._total + learned["loss"], self._updates + 1
        self._tokens += learned["tokens"]
        self._latest = {
            "grad_norm": learned["grad_norm"], "learning_rate": learned["lr"], "num_tokens": self._tokens,
        }  # fmt: skip
        self.note(
            {
                "entropy": learned["entropy"],
                "mean_token_accuracy": learned["accuracy"],
                "step_time": seconds,
            }
        )

    def line(self) -> Metrics:
        """As of `Book`."""
        losses, self._losses = self._losses, []
        return {"loss": mean(losses), **self._latest, **self._ledger.take()}
