"""`Given`: live objects that a program hands to a run, in place of what its recipe would name.

    run = Run(recipe, directory, emit, Given(model=model, environments={"shop": make(Shop)}, watcher=watcher))

The recipe still says how everything is done, and is what a resumed run is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnwise.envs.session import EnvSpec
from turnwise.rollout.player import Player
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.scoring import RewardFunction
from turnwise.types import Sample, Task, TrajectoryGroup

if TYPE_CHECKING:
    from turnwise.learn.learner import Learner
    from turnwise.learn.ranks import Ranks


Order = Callable[[str, int], Callable[[int], int]]
"""From an environment and how many rows it has: which row is the i-th that is played, i = 0, 1, 2, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """One step of RL that was learned from and published."""

    step: int
    """Counted from 1."""
    metrics: Mapping[str, float]
    redone: bool = False
    """Made again from disk by a resumed run: nothing was played, and no engine is there yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What whoever watches a run wants after a step."""

    save: bool = False
    """A checkpoint now, whether or not one is due."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """To stand in that checkpoint beside the model."""
    stop: bool = False
    """No further step; the stage ends with the model as it is."""


class Watcher:
    """Looks on while a run learns. Whoever wants to see something overrides that; by itself it wants nothing.

        opened ─> [redone steps] ─> playing
        step_began ─> played ─> (moving ─> updated)… ─> step_ended ─> saved          for each step

    Steps that a resumed run makes again from disk are shown as they were, before ``playing``.
    """

    async def opened(self, learner: Learner, done: int) -> None:
        """The learner is as the last checkpoint left it, after ``done`` steps."""

    async def playing(self, policy: ModelPolicy) -> None:
        """The engine has the present weights; from here on each step is played."""

    async def step_began(self, step: int) -> None:
        """A step, counted from 1, is about to be played."""

    async def played(self, groups: Sequence[TrajectoryGroup]) -> None:
        """All that the step uses up is there; its updates come next."""

    def moving(self) -> AbstractContextManager[None]:
        """Entered when an update's gradients are there and clipped, left when the weights have moved.

        On the learner's thread, as is `updated`.
        """
        return nullcontext()

    def updated(self, metrics: Mapping[str, float] | None) -> bool:
        """One update is made; only its rates are told where there was nothing to learn from, and None if it
        was refused.

        Returns:
            Whether the step's other updates shall be made too.
        """
        return True

    async def step_ended(self, end: StepEnd) -> Wish:
        """A step is done and on disk, and the engine has its weights."""
        return Wish()

    async def saved(self, step: int, path: Path) -> bool:
        """A checkpoint is complete.

        Returns:
            Whether the run goes on.
        """
        return True


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
    order: Order | None = None
    """In place of a shuffle by the recipe's seed."""
    player: Callable[..., Player] | None = None
    """Plays for RL in place of a `Scheduler`, and is made with its arguments."""
    lessons: Callable[[int], Sequence[Sample]] | None = None
    """What SFT learns from in an update, counted from 0, in place of recorded trajectories."""
    watcher: Watcher = field(default_factory=Watcher)
    updates: int | None = None
    """That RL's schedule of learning rates spans: fewer than the recipe's steps have, where the watcher
    stops in the middle of the last one."""
    kept_checkpoints: int | None = 1
    """Learner states that are kept while a stage lasts, each three times its model; None keeps all."""
    export: bool = True
    """Whether the finished stage writes its model, adapters merged: who holds the live one may do without."""
    ranks: Ranks | None = None
    """The processes that learn together (`turnwise.pipeline.ranks.joined`); None where there is one."""
