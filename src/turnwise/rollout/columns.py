"""`trl_columns`: siblings as the keyword arguments of a TRL reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turnwise import images
from turnwise.types import ImageBlock, Trajectory

TRL_OWN = ("prompt", "completion", "completion_ids")
"""Columns of a row that TRL does not hand to reward functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What is at hand of an episode until it is scored, and no longer."""

    environment: Any = None
    """The author's instance that it was played in, as it was left; None where it lives elsewhere."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """More columns, over those that follow from the trajectory."""


def trl_columns(
    siblings: Sequence[Trajectory], live: Mapping[str, Live] | None = None
) -> dict[str, list[Any]]:
    """Siblings of one task as the keyword arguments of a TRL reward function.

    ``prompts`` and ``completions`` are lists of message dicts: the messages before the first reply, and all
    that follow, images as PIL images. ``completion_ids`` has every token after the prompt, tool results
    included; it is empty for demonstrations. ``environments`` are there where the siblings' instances are.
    """
    columns: dict[str, list[Any]] = {
        name: [images.revived(one.task.get(name)) for one in siblings]
        for name in siblings[0].task
        if name not in TRL_OWN
    }
    columns["prompts"] = [
        [message.as_dict(shown) for message in one.segments[0].prompt] if one.segments else []
        for one in siblings
    ]
    columns["completions"] = [
        [message.as_dict(shown) for turn in one.turns for message in (turn.message, *turn.feedback)]
        for one in siblings
    ]
    columns["completion_ids"] = [_completion_ids(one) for one in siblings]
    at_hand = [(live or {}).get(one.id, Live()) for one in siblings]
    if any(one.environment is not None for one in at_hand):
        columns["environments"] = [one.environment for one in at_hand]
    for name in dict.fromkeys(name for one in at_hand for name in one.columns):
        rest = columns.get(name, [None] * len(siblings))
        columns[name] = [one.columns.get(name, found) for one, found in zip(at_hand, rest, strict=True)]
    return columns


def shown(block: ImageBlock) -> Any:
    """An image as TRL hands it on."""
    return images.load(block.sha256)


def _completion_ids(trajectory: Trajectory) -> list[int]:
    ids: list[int] = []
    for segment in trajectory.segments:
        for number, turn in enumerate(segment.turns):
            ids += ((turn.context_ids or []) if number else []) + (turn.ids or [])
    return ids
