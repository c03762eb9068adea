"""Groups played in what `turnwise.compat` makes of a script's arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.compat.environments import environments
from turnwise.compat.rewards import Board, reward_functions
from turnwise.envs.session import Limits
from turnwise.rollout.arena import Arena
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policy import Policy
from turnwise.types import Sampling, Trajectory, TrajectoryGroup

ROW: Mapping[str, Any] = {"prompt": [{"role": "user", "content": "Count."}], "target": 3}


def arena_of(
    factory: Any = None,
    reward_funcs: Any = None,
    *,
    tools: Sequence[Any] | None = None,
    board: Board | None = None,
    name: str | None = None,
    limits: Mapping[str, Any] | None = None,
    **options: Any,
) -> Arena:
    """The arena of one of the environments, with the reward functions."""
    specs = environments(factory, tools)
    spec = specs[name] if name else next(iter(specs.values()))
    functions = reward_functions(
        reward_funcs,
        weights=None,
        board=board or Board(),
        environments=factory is not None,
        routed=isinstance(factory, Mapping),
        **options,
    )
    return Arena(
        name or spec.name, spec, limits=Limits(**{"call_seconds": 5.0, **(limits or {})}), functions=functions
    )


def play(
    where: Arena,
    policy: Policy,
    rows: Sequence[Mapping[str, Any]] = (ROW,),
    *,
    size: int = 2,
    sampling: Sampling | None = None,
    finished: Sequence[Trajectory] = (),
) -> list[TrajectoryGroup]:
    """One group of each row, all at the same time; asserts that the sink got each episode once."""
    seen: list[Trajectory] = []

    async def main() -> list[TrajectoryGroup]:
        try:
            return await asyncio.gather(
                *(
                    play_group(
                        GroupOrder(
                            id=f"t/{n}", env=where.name, task=row, seed=n, size=size, finished=tuple(finished)
                        ),
                        arena=where,
                        policy=policy,
                        sampling=sampling or Sampling(),
                        sink=seen.append,
                    )
                    for n, row in enumerate(rows)
                )
            )
        finally:
            await where.aclose()

    groups = asyncio.run(main())
    kept = {one.id for one in finished}
    ids = [one.id for group in groups for one in group.trajectories if one.id not in kept]
    assert sorted(one.id for one in seen) == sorted(ids)
    return groups
