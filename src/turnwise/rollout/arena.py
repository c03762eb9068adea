"""`Arena`: one environment of a run, ready to be played: limits, rewards, live sessions, harness.

A row's ``environment`` column names its arena:

    arenas = {"catch": Arena.of("catch", make("catch"), config, renderer=renderer.fingerprint)}
    env = route({"environment": "catch", "column": 3}, arenas)
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Sequence
from typing import Self

from turnwise.config import EnvConfig
from turnwise.envs.session import EnvSpec, Limits
from turnwise.errors import RecipeError, TaskError
from turnwise.rollout.harness import harness_hash, overlay_limits
from turnwise.rollout.scoring import RewardFunction
from turnwise.rollout.sessions import SessionPool
from turnwise.types import Task

log = logging.getLogger(__name__)

OWN_REWARD = "environment"
"""Stands for the environment's own rewards among the weights that are hashed."""


class Arena:
    """Everything that episodes of one environment share, in every stage of a run.

    Args:
        name: The environment's name in the recipe.
        spec: Opens sessions.
        limits: What ends an episode; the environment's own if None.
        functions: Reward functions, added to the environment's own reward.
        reward_weight: Weight of the environment's own rewards, those of steps among them.
        renderer: The renderer's fingerprint.
        max_excluded: Largest share of episodes that may fail before the run stops.
    """

    def __init__(
        self,
        name: str,
        spec: EnvSpec,
        *,
        limits: Limits | None = None,
        functions: Sequence[RewardFunction] = (),
        reward_weight: float = 1.0,
        renderer: str = "",
        max_excluded: float = 0.5,
    ) -> None:
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise RecipeError(f"environment {name}: two reward functions have the same name: {sorted(names)}")
        self.name, self.spec = name, spec
        self.limits = limits or spec.limits
        self.functions = tuple(functions)
        self.holds = any(function.needs_environments for function in functions)
        """Environments stay as their episodes left them until their group is scored."""
        self.reward_weight, self.max_excluded = reward_weight, max_excluded
        self.sessions = SessionPool(spec, self.limits)
        self._told = False
        self.harness = harness_hash(
            renderer=renderer,
            environment=spec.fingerprint,
            limits=self.limits,
            rewards={OWN_REWARD: reward_weight, **{one.identity: one.weight for one in functions}},
            forfeit=spec.forfeit,
        )

    @classmethod
    def of(
        cls,
        name: str,
        spec: EnvSpec,
        config: EnvConfig,
        *,
        functions: Sequence[RewardFunction] = (),
        renderer: str = "",
    ) -> Self:
        """As a recipe configures it, with more reward functions beside those that it names.

        Raises:
            RecipeError: A reward function cannot be found or called.
        """
        return cls(
            name,
            spec,
            limits=overlay_limits(spec.limits, config.limits),
            functions=[
                *(RewardFunction.load(path, weight) for path, weight in config.rewards.items()),
                *functions,
            ],
            reward_weight=config.reward_weight,
            renderer=renderer,
            max_excluded=config.max_excluded,
        )

    def compare_with_forfeit(self, end: float) -> None:
        """Say once that breaking the environment would have paid more than the end that an episode came to.

        Args:
            end: What its last turn and the environment's own rewards paid.
        """
        if end < self.spec.forfeit and not self._told:
            self._told = True
            log.warning(
                "environment '%s': an end was worth %g, and one that cannot be scored is worth %g: a policy "
                "that loses gains by a hang, a crash or a limit. Set the class's `forfeit` to the least that "
                "an end is worth", self.name, end, self.spec.forfeit,
            )  # fmt: skip

    async def aclose(self) -> None:
        """Close the environments that no episode uses."""
        await self.sessions.aclose()


def route(task: Task, known: Collection[str]) -> str:
    """The environment that a row names in its ``environment`` column; where it names none, the only one.

    Raises:
        TaskError: It names none of several, or an unknown one.
    """
    name = task.get("environment")
    listed = ", ".join(sorted(known))
    if name is None:
        if len(known) == 1:
            return next(iter(known))
        raise TaskError(f"a task names no environment; set its 'environment' column to one of: {listed}")
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise TaskError(
            f"a task names the environment {name!r}, which the run does not have; {hint}known: {listed}"
        )
    return name
