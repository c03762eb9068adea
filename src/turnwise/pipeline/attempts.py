"""Which episodes are still to be played: those that are not on disk, and those that something else spoilt.

An episode that failed through no fault of the policy's (a server was down, the engine had died) says nothing.
When its stage is taken up again, it is played again under an id of its own, ``…/s0~1``: what is finished is
never played twice, and an outage does not stay in an evaluation for good. So is one that was played under
another harness, from another task or seed, or sampled otherwise: the recipe has changed since. Of several
attempts the last counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace

from turnwise.rollout.record import EpisodeOrder, episode_of
from turnwise.store import RunDir
from turnwise.types import Sampling, StopReason, Trajectory


def unfinished(
    directory: RunDir,
    stage: str,
    orders: Iterable[EpisodeOrder],
    *,
    harness: Mapping[str, str],
    sampling: Sampling,
) -> list[EpisodeOrder]:
    """What of ``orders`` is to be played.

    Args:
        directory: Of the run.
        stage: The name under which the stage's episodes are stored.
        orders: All that the stage plays.
        harness: The present one of each environment.
        sampling: How tokens are drawn.
    """
    wanted = {order.id: order for order in orders}
    sampled = asdict(sampling) | {"stop_ids": list(sampling.stop_ids)}
    missing = dict(wanted)
    attempts: Counter[str] = Counter()
    for record in directory.records(stage):
        episode = episode_of(record["id"])
        if (order := wanted.get(episode)) is None:
            continue
        attempts[episode] += 1
        reason = StopReason(record["stop_reason"])
        # A prompt that was too long will not get shorter.
        settled = not reason.failed or reason is StopReason.PROMPT_TOO_LONG
        as_ordered = (
            record["harness"] == harness[order.env]
            and record["task"] == order.task
            and record["seed"] == order.seed
            and record["sampling"] in (None, sampled)  # What was demonstrated was not sampled.
        )
        if settled and as_ordered:
            missing.pop(episode, None)
        else:
            missing[episode] = order
    return [
        replace(order, id=f"{id}~{attempts[id]}") if attempts[id] else order
        for id, order in wanted.items()
        if id in missing
    ]


def last_attempts(directory: RunDir, stage: str) -> Iterator[Trajectory]:
    """The stage's trajectories, of each episode the last attempt alone."""
    last = {episode_of(record["id"]): record["id"] for record in directory.records(stage)}
    for trajectory in directory.read(stage):
        if last[episode_of(trajectory.id)] == trajectory.id:
            yield trajectory
