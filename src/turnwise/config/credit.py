"""`CreditConfig`: how an episode's rewards are dealt out to its turns; and the names of advantages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.section import Section

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "maxrl", "reinforce_pp", "reinforce_pp_baseline"]
Scale = Literal["group", "batch", "none"]
CreditKind = Literal["trajectory", "returns", "mt_grpo", "gigpo"]

SCALES: dict[AdvantageName, tuple[Scale, ...]] = {
    "grpo": ("group", "batch", "none"),
    "rloo": ("none", "batch"),
}
"""What may be chosen, the usual first; the other names say themselves what they divide by."""

TURN_ADVANTAGES: dict[CreditKind, tuple[AdvantageName, ...]] = {
    "returns": ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"),
    "mt_grpo": ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"),
    "gigpo": ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"),
}
"""How turns may be compared. MaxRL is of whole episodes; REINFORCE++ has no baseline that a turn could
share."""


class CreditConfig(Section):
    """Which turns an episode's rewards belong to (docs/algorithms.md)."""

    kind: CreditKind = "trajectory"
    """``trajectory``: all turns alike; ``returns``: what came after each turn; ``mt_grpo``: the turn's own
    pay and the outcome; ``gigpo``: turns that began in the same state, by ``state_key``."""
    gamma: float = Field(0.95, gt=0, le=1)
    """Of ``returns`` and ``gigpo``: what a reward is worth one turn earlier."""
    weight: float = Field(1.0, gt=0)
    """Of ``mt_grpo`` and ``gigpo``: what a turn's own part counts beside its episode's."""
