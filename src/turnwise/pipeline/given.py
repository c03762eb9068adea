"""`Given`: live objects that a program hands to a run, in place of what its recipe would name.

    run = Run(recipe, directory, emit, Given(model=model, environments={"shop": make(Shop)}, watcher=watcher))

The recipe still says how everything is done, and is what a resumed run is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from turnwise.envs.session import EnvSpec
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Task, TrajectoryGroup

if TYPE_CHECKING:
    from turnwise.learn.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """One step of RL that was learned from and published."""

    step: int
    """Counted from 1."""
    groups: Sequence[TrajectoryGroup]
    """All that the step used up."""
    metrics: Mapping[str, float]
    learner: Learner
    policy: ModelPolicy
    """With the engine, which has the step's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What whoever watches a run wants after a step."""

    save: bool = False
    """A checkpoint now, whether or not one is due."""
    stop: bool = False
    """No further step; the stage ends with the model as it is."""


class Watcher(Protocol):
    """Looks on while a run learns."""

    async def step_ended(self, end: StepEnd) -> Wish:
        """A step is done and on disk; steps that are redone from disk are not shown again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a program has already made; what is not given is made as the recipe says."""

    model: Any = None
    """A model of transformers, or a ``PeftModel`` around one: it is trained itself, not a copy."""
    processing: Any = None
    """The tokenizer or processor of the model."""
    environments: Mapping[str, EnvSpec] = field(default_factory=dict)
    """By name; the recipe has each, with limits and weights."""
    functions: Mapping[str, Sequence[RewardFunction]] = field(default_factory=dict)
    """Reward functions of an environment, beside those that the recipe names."""
    tasks: Mapping[str, Mapping[str, Sequence[Task]]] = field(default_factory=dict)
    """Rows of an environment by split, in place of its own and of data sets."""
    watcher: Watcher | None = None
