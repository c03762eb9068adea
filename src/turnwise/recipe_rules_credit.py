"""What may not stand together in the settings of RL's advantages and credit: `turnwise.recipe_rules` asks."""

from __future__ import annotations

from collections.abc import Iterator

from turnwise.config import RlConfig
from turnwise.config.credit import SCALES, TURN_ADVANTAGES, CreditKind

_READS: dict[CreditKind, set[str]] = {
    "trajectory": set(),
    "returns": {"gamma"},
    "mt_grpo": {"weight"},
    "gigpo": {"gamma", "weight"},
}


def idle_credit_keys(rl: RlConfig) -> dict[str, str]:
    """The keys that do nothing with the chosen advantage, rewards and credit, each with the reason."""
    idle: dict[str, str] = {}
    if rl.rewards == "separately":
        idle["rl.scale"] = (
            "with rl.rewards=separately, which divides by the group's deviation and the batch's"
        )
    elif rl.advantage not in SCALES:
        idle["rl.scale"] = f"with rl.advantage={rl.advantage}, which says itself what it divides by"
    for key in {"gamma", "weight"} - _READS[rl.credit.kind]:
        idle[f"rl.credit.{key}"] = f"with rl.credit.kind={rl.credit.kind}"
    return idle


def credit_problems(rl: RlConfig) -> Iterator[str]:
    """What contradicts itself."""
    allowed = SCALES.get(rl.advantage, ())
    if rl.scale is not None and allowed and rl.scale not in allowed:
        yield (
            f"rl.scale: rl.advantage={rl.advantage} divides by {' or '.join(allowed)}, found {rl.scale}; "
            "choose one of them, or rl.advantage=grpo"
        )
    kind = rl.credit.kind
    by_turn = TURN_ADVANTAGES.get(kind)
    if by_turn is not None and rl.advantage not in by_turn:
        yield (
            f"rl.advantage: rl.credit.kind={kind} compares turns by {', '.join(by_turn)}, found "
            f"{rl.advantage}; choose one of them, or rl.credit.kind=trajectory"
        )
    if rl.rewards == "separately":
        if rl.advantage != "grpo":
            yield (
                f"rl.advantage: rl.rewards=separately compares each reward by grpo, found {rl.advantage}; "
                "remove the one or the other"
            )
        if by_turn is not None:
            yield (
                f"rl.credit.kind: rl.rewards=separately compares whole episodes, found {kind}; remove the "
                "one or the other"
            )
