"""`Rubric`: a reward as a function of action and observation, as environments written for OpenEnv have it.

    class Legal(Rubric):
        def forward(self, action, observation): return float(observation.legal)

    class Chess(Rubric):
        def __init__(self):
            super().__init__()
            self.legal, self.won = Legal(), Won()               # its children, by name

        def forward(self, action, observation):
            return 0.1 * self.legal(action, observation) + 0.9 * self.won(action, observation)

Contracts are those of ``openenv.core.rubrics`` (read from 0.3.0), whose containers and judge are not here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from turnwise.errors import EnvSpecError


class Rubric(ABC):
    """A reward; rubrics among its attributes are its children.

    A `forward` that is a coroutine makes the call one too.
    """

    last_score: float | None = None
    """What the last call came to."""

    def __init__(self) -> None:
        self._before: list[Callable[..., Any]] = []
        self._after: list[Callable[..., Any]] = []

    def __call__(self, action: Any, observation: Any) -> Any:
        """The reward, and the hooks around it; awaitable where `forward` is."""
        if inspect.iscoroutinefunction(self.forward):
            return self._awaited(action, observation)
        for hook in self._before:
            hook(self, action, observation)
        self.last_score = score = self.forward(action, observation)
        for hook in self._after:
            hook(self, action, observation, score)
        return score

    async def _awaited(self, action: Any, observation: Any) -> Any:
        for hook in self._before:
            await _maybe(hook(self, action, observation))
        self.last_score = score = await _maybe(self.forward(action, observation))
        for hook in self._after:
            await _maybe(hook(self, action, observation, score))
        return score

    @abstractmethod
    def forward(self, action: Any, observation: Any) -> Any:
        """The reward for an action that ``observation`` answers, 0 to 1 as a rule."""

    def register_forward_pre_hook(self, hook: Callable[[Rubric, Any, Any], Any]) -> None:
        """Call ``hook(rubric, action, observation)`` before each `forward`."""
        self._before.append(hook)

    def register_forward_hook(self, hook: Callable[[Rubric, Any, Any, Any], Any]) -> None:
        """Call ``hook(rubric, action, observation, score)`` after each `forward`."""
        self._after.append(hook)

    def named_children(self) -> Iterator[tuple[str, Rubric]]:
        """Rubrics among the attributes."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Rubric))

    def children(self) -> Iterator[Rubric]:
        """The same without names."""
        return (child for _, child in self.named_children())

    def named_rubrics(self, prefix: str = "") -> Iterator[tuple[str, Rubric]]:
        """Children and theirs, each before its own: ``won``, ``won.by_mate``."""
        for name, child in self.named_children():
            path = f"{prefix}.{name}" if prefix else name
            yield path, child
            yield from child.named_rubrics(path)

    def rubrics(self) -> Iterator[Rubric]:
        """The same without names."""
        return (rubric for _, rubric in self.named_rubrics())

    def get_rubric(self, path: str) -> Rubric:
        """The one at ``won.by_mate``.

        Raises:
            KeyError: There is none.
        """
        found = self
        for name in path.split("."):
            children = dict(found.named_children())
            if name not in children:
                raise KeyError(
                    f"no rubric at {path}: {name} is none of {', '.join(children) or 'no children'}"
                )
            found = children[name]
        return found

    def reset(self) -> None:  # noqa: B027 - most remember nothing
        """An episode begins."""

    def state_dict(self) -> dict[str, Any]:
        """Settings to keep beside a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no settings
        """Take them up again."""


class TrajectoryRubric(Rubric):
    """A reward that is known at the end of an episode.

    Args:
        intermediate_reward: What every other step is paid.
    """

    def __init__(self, intermediate_reward: float = 0.0) -> None:
        super().__init__()
        self.intermediate_reward = intermediate_reward
        self._trajectory: list[tuple[Any, Any]] = []

    def forward(self, action: Any, observation: Any) -> Any:
        """Keep the step; where the observation is ``done``, the score of them all."""
        self._trajectory.append((action, observation))
        if getattr(observation, "done", False):
            return self.score_trajectory(self._trajectory)
        return self.intermediate_reward

    @abstractmethod
    def score_trajectory(self, trajectory: list[tuple[Any, Any]]) -> float:
        """Of all pairs of action and observation, 0 to 1 as a rule."""

    @abstractmethod
    def compute_step_rewards(self) -> list[float]:
        """The score, shared out: one number for each step so far."""

    @property
    def trajectory(self) -> list[tuple[Any, Any]]:
        """Pairs of action and observation since the reset."""
        return list(self._trajectory)

    def reset(self) -> None:
        """An episode begins: forget the last one's steps."""
        self._trajectory = []

    def state_dict(self) -> dict[str, Any]:
        """Settings, without steps."""
        return {"intermediate_reward": self.intermediate_reward}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        self.intermediate_reward = state.get("intermediate_reward", self.intermediate_reward)


class ExponentialDiscountingTrajectoryRubric(TrajectoryRubric):
    """Step t of T is credited with ``gamma ** (T - 1 - t)`` of the score.

    Args:
        gamma: 1 credits all steps alike, 0 the last one alone.
        intermediate_reward: As for `TrajectoryRubric`.

    Raises:
        ValueError: ``gamma`` is not between 0 and 1.
    """

    def __init__(self, gamma: float = 0.99, intermediate_reward: float = 0.0) -> None:
        super().__init__(intermediate_reward)
        if not 0.0 <= gamma <= 1.0:
            raise EnvSpecError(f"gamma must be in [0, 1]; found {gamma}")
        self.gamma = gamma

    def compute_step_rewards(self) -> list[float]:
        """One number for each step so far."""
        if not self._trajectory:
            return []
        score = self.score_trajectory(self._trajectory)
        return [score * self.gamma**left for left in reversed(range(len(self._trajectory)))]

    def state_dict(self) -> dict[str, Any]:
        """Settings, without steps."""
        return {**super().state_dict(), "gamma": self.gamma}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        super().load_state_dict(state)
        self.gamma = state.get("gamma", self.gamma)


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
