"""Which episodes are still to be played: those that are not on disk, and those that something else spoilt.

An episode that failed through no fault of the policy's (a server was down, the engine had died) says nothing.
When its stage is taken up again, it is played again under an id of its own, ``…/s0~1``: what is finished is
never played twice, and an outage does not stay in an evaluation for good.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from turnwise.rollout.record import EpisodeOrder
from turnwise.store import RunDir
from turnwise.types import StopReason

_ATTEMPT = re.compile(r"~\d+$")


def episode_of(trajectory_id: str) -> str:
    """The id of the first attempt, of an episode or a group: ``rl/catch/3/s0`` of ``rl/catch/3/s0~2``."""
    return _ATTEMPT.sub("", trajectory_id)


def unfinished(directory: RunDir, stage: str, orders: Iterable[EpisodeOrder]) -> list[EpisodeOrder]:
    """What of ``orders`` is to be played.

    Args:
        directory: Of the run.
        stage: The name under which the stage's episodes are stored.
        orders: All that the stage plays.
    """
    settled: set[str] = set()
    attempts: Counter[str] = Counter()
    for record in directory.records(stage):
        reason, episode = StopReason(record["stop_reason"]), episode_of(record["id"])
        attempts[episode] += 1
        # A prompt that was too long will not get shorter.
        if not reason.failed or reason is StopReason.PROMPT_TOO_LONG:
            settled.add(episode)
    return [
        replace(order, id=f"{order.id}~{attempts[order.id]}") if attempts[order.id] else order
        for order in orders
        if order.id not in settled
    ]
