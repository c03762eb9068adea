"""`Logbook`: what a trainer notes between two logs, and the line that it makes of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from turnwise.compat.metrics import Ledger, Metrics, episode_metrics, mean, update_metrics
from turnwise.config import RlConfig
from turnwise.types import TrajectoryGroup


class Logbook:
    """Updates and episodes go in, lines under TRL's names come out.

    Args:
        config: What the learner is asked for.
    """

    def __init__(self, config: RlConfig) -> None:
        self._config = config
        self._ledger = Ledger()
        self._losses: list[float] = []
        """Of the updates since the last line."""
        self._latest: Metrics = {"grad_norm": None, "learning_rate": None}
        self._total, self._updates = 0.0, 0
        self.played: tuple[TrajectoryGroup, ...] = ()
        """The last generation batch, until it is shown."""

    @property
    def train_loss(self) -> float | None:
        """The mean over all updates that were made."""
        return self._total / self._updates if self._updates else None

    def note(self, metrics: Mapping[str, float | None]) -> None:
        """Take any metrics, of which the line has the means."""
        self._ledger.add(metrics)

    def note_episodes(self, groups: Sequence[TrajectoryGroup], *, seen: int) -> None:
        """Take what was played; ``seen`` is all tokens of the run so far."""
        self.played = tuple(groups)
        self.note(self.of_episodes(groups))
        self._ledger.put("num_tokens", float(seen))

    def of_episodes(self, groups: Sequence[TrajectoryGroup]) -> Metrics:
        """Metrics of episodes, of training or of an evaluation."""
        tools = any(one.tools for group in groups for one in group.trajectories)
        return episode_metrics(groups, tools=tools, by_batch=self._config.scale == "batch")

    def note_update(self, learned: Mapping[str, float] | None, *, seconds: float) -> None:
        """Take an update: its rates where nothing set siblings apart, None where it was refused."""
        self.note({"step_time": seconds})
        if learned is None:
            return
        # Where there is nothing to tell siblings apart by, the loss and its gradient are 0.
        loss = learned.get("loss", 0.0)
        self._losses.append(loss)
        self._total, self._updates = self._total + loss, self._updates + 1
        self._latest["grad_norm"] = learned.get("grad_norm", 0.0)
        self._latest["learning_rate"] = learned.get("lr", self._latest["learning_rate"])
        corrected = self._config.correction.kind not in ("none", "ignore")
        self.note(update_metrics(learned, loss=self._config.loss, correction=corrected))
        if self._config.entropy:
            # The bonus is the mean entropy of tokens only where the loss is one of tokens.
            bonus = self._config.entropy * learned.get("entropy", 0.0)
            by_token = self._config.normalise == "token"
            self.note(
                {"entropy_coef": self._config.entropy, "policy_loss": loss + bonus if by_token else None}
            )

    def rest(self) -> Metrics:
        """What no line has had, for the last one."""
        return self._ledger.take()

    def line(self) -> Metrics:
        """Everything since the last line."""
        losses, self._losses = self._losses, []
        return {"loss": mean(losses), **self._latest, **self._ledger.take()}
