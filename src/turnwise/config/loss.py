"""What RL's loss is made of, and each part's own settings. docs/algorithms.md has the formulas."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from turnwise.config.section import Section

LossName = Literal[
    "ppo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "rloo", "cispo", "sapo", "dppo", "vespo", "reinforce"
]
KlEstimator = Literal["k2", "k3", "k1_ratio", "k3_ratio", "k3_sequence_ratio"]
CorrectionKind = Literal["ignore", "tis", "icepop", "sequence_truncate", "sequence_mask", "geometric_mask"]

_CLIPS: dict[LossName, tuple[float, float]] = {
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "luspo": (3e-4, 4e-4),
    "cispo": (0.2, 4.0),
}
_BOUNDS: dict[CorrectionKind | Literal["none"], tuple[float, float]] = {
    "tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_truncate": (0.0, 3.0),
    "sequence_mask": (0.0, 3.0),
    "geometric_mask": (0.99, 1.01),
}


class SapoConfig(Section):
    """Of ``loss: sapo``: how soon its gates close."""

    tau_positive: float = Field(1.0, gt=0)
    tau_negative: float = Field(1.05, gt=0)


class DppoConfig(Section):
    """Of ``loss: dppo``: how far apart two policies are, of which the clips are the bounds."""

    divergence: Literal["tv", "kl"] = "tv"
    """Total variation or Kullback-Leibler, between "this token" and "another"."""
    max_ratio: float = Field(20.0, ge=1)
    """Cap on a token's ratio as a weight."""


class VespoConfig(Section):
    """Of ``loss: vespo``: how soon a sequence that has become rarer (k) or more frequent (lambda) fades."""

    k_positive: float = Field(2.0, ge=0)
    lambda_positive: float = Field(3.0, gt=0)
    k_negative: float = Field(3.0, ge=0)
    lambda_negative: float = Field(2.0, gt=0)


class CorrectionConfig(Section):
    """Weights for what the sampler's probabilities were other than the learner's (docs/algorithms.md)."""

    kind: CorrectionKind | Literal["none"] = "none"
    """With one, the loss's ratio is to the learner's own logprobs before the step; ``ignore`` leaves it at
    that, with a weight of 1 for all; with the others, top-p and its like may cut what is sampled."""
    low: float | None = Field(None, ge=0, le=1)
    """If not set: 0, for icepop 0.5, for geometric_mask 0.99."""
    high: float | None = Field(None, ge=1)
    """If not set: 2 for tis, 5 for icepop, 3 for a sequence's, 1.01 for geometric_mask."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high."""
        low, high = _BOUNDS.get(self.kind, (0.0, math.inf))
        return low if self.low is None else self.low, high if self.high is None else self.high

    @property
    def allows_cuts(self) -> bool:
        """Whether tokens are weighed by how likely the sampler was to draw them, and it may cut."""
        return self.kind not in ("none", "ignore", "geometric_mask")


def own_clips(loss: LossName, dppo: DppoConfig) -> tuple[float, float]:
    """Clips, low and high, that a loss has where a recipe sets none: its paper's."""
    if loss == "dppo":
        return (0.15, 0.15) if dppo.divergence == "tv" else (0.05, 0.05)
    return _CLIPS.get(loss, (0.2, 0.2))
