"""What a report needs of a run's trajectories, gathered in two passes that hold none of them in memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turnwise.codec import from_record
from turnwise.store import RunDir
from turnwise.types import StopReason, Trajectory

EVALUATION = "evaluate-"
"""What the stages of held-out play begin with: ``evaluate-sft``."""
MODEL_STAGES = ("untrained", "sft", "rl")

Play = tuple[float, str]
"""(reward, trajectory id)."""


@dataclass(slots=True)
class Digest:
    """The first pass: counts of everything, rewards of held-out play."""

    ends: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """(stage, environment) → how its episodes ended."""
    played: dict[tuple[str, str], dict[str, Play]] = field(default_factory=lambda: defaultdict(dict))
    """(model stage, environment) → task → its first sampled episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Episodes of one held-out task that are worth reading, oldest model first."""

    title: str
    ids: tuple[tuple[str, str], ...]
    """(model stage, trajectory id)."""


def digest(run: RunDir) -> Digest:
    """Look at every trajectory once."""
    found = Digest()
    for stage in run.stages():
        for record in run.records(stage):
            found.ends[stage, record["env"]][record["stop_reason"]] += 1
            model = stage.removeprefix(EVALUATION)
            if model == stage or (record.get("sampling") or {}).get("temperature") == 0:
                continue
            reward = reward_of(record)
            if reward is not None:
                task = str(record["group_id"]).rsplit("/", 1)[-1]
                plays = found.played[model, record["env"]]
                # Not the one that happened to end first: a resumed run shows what an unbroken one does.
                if task not in plays or record["id"] < plays[task][1]:
                    plays[task] = (reward, record["id"])
    return found


def reward_of(record: Mapping[str, Any]) -> float | None:
    """`Trajectory.reward` of a trajectory that is still a plain record."""
    if StopReason(record["stop_reason"]).failed:
        return None
    values = [one["weight"] * one["value"] for one in record["rewards"].values() if one["value"] is not None]
    return sum(values) if values else None


def choices(found: Digest) -> list[Choice]:
    """What to read of each environment: tasks that the last stage changed, and its best and worst."""
    out = []
    for env in sorted({env for _, env in found.played}):
        stages = [stage for stage in MODEL_STAGES if found.played.get((stage, env))][-2:]
        if not stages:
            continue
        plays = [found.played[stage, env] for stage in stages]
        before, after = plays[0], plays[-1]
        gains = {task: after[task][0] - before[task][0] for task in sorted(after) if task in before}
        rising, falling = sorted(gains, key=lambda task: -gains[task]), sorted(gains, key=gains.__getitem__)
        by_reward = sorted(sorted(after), key=lambda task: after[task][0])
        titles = {task: "learned" for task in rising[:2] if gains[task] > 0}
        titles |= {task: "unlearned" for task in falling[:1] if gains[task] < 0}
        for title, order in (("worst", by_reward), ("best", by_reward[::-1])):
            titles |= dict.fromkeys([task for task in order if task not in titles][:1], title)
        for task, title in titles.items():
            ids = [(stage, play[task][1]) for stage, play in zip(stages, plays, strict=True) if task in play]
            out.append(Choice(title=f"{title} · held-out task {task}", ids=tuple(ids)))
    return out


def fetch(run: RunDir, wanted: Sequence[Choice]) -> dict[str, Trajectory]:
    """The second pass: the chosen trajectories by id."""
    found = {}
    by_stage: dict[str, set[str]] = defaultdict(set)
    for choice in wanted:
        for stage, id in choice.ids:
            by_stage[stage].add(id)
    for stage, ids in by_stage.items():
        for record in run.records(EVALUATION + stage):
            if record["id"] in ids:
                found[record["id"]] = from_record(record)
    return found
