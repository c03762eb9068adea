"""Reward functions: what is added to the environment's own reward, named and weighted.

Two shapes, told apart by the signature:

    def brevity(completions, **columns) -> list[float | None]:           # TRL's contract, once per group
        return [-len(completion) for completion in completions]

    def polite(trajectory) -> float | None:                              # once per trajectory
        return float("please" in trajectory.turns[-1].message.text)

Both may be ``async``. None means that the reward does not apply. What a function makes of a reply is the
reply's doing: a sibling on which it raises, hangs or returns no finite number forfeits this reward and keeps
its others, or replies would be learned that cannot be scored. A function that raises over a whole group is
asked about each sibling alone, so that the others get theirs. It raises `EnvLostError` to say that the fault
was not the policy's (a judge that does not answer): those siblings are left out of the baseline.

A function that names ``environments`` is given the live instances that the siblings were played in, each as
its episode left it. Siblings that an earlier run played have none left, and are not shown to it.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self

from turnwise import images
from turnwise.envs import contain
from turnwise.envs.observe import finite
from turnwise.errors import EnvLostError, RecipeError, ScoringError, TurnwiseError, boundary
from turnwise.rollout.policies import TeacherPolicy
from turnwise.rollout.record import failure_of
from turnwise.types import FORFEIT, ImageBlock, Reward, StopReason, Trajectory

ScoreOrError = float | None | TurnwiseError
"""A `ScoringError` where the sibling's replies broke the function, an `EnvLostError` where they did not."""
TRL_OWN = ("prompt", "completion", "completion_ids")
"""Columns of a row that TRL does not hand to reward functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What is at hand of an episode until it is scored, and no longer."""

    environment: Any = None
    """The author's instance that it was played in, as it was left; None where it lives elsewhere."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """More columns, over those that follow from the trajectory."""


class Contract(Protocol):
    """How functions that were written for another trainer are asked, and their answers read."""

    @property
    def environments(self) -> bool:
        """A function that takes any keyword is given ``environments`` too."""
        ...

    def arguments(
        self, siblings: Sequence[Trajectory], columns: Mapping[str, Sequence[Any]]
    ) -> Mapping[str, Any]:
        """All keyword arguments, from the siblings and their columns as `trl_columns` has them."""
        ...

    def scores(self, answer: Any) -> Any:
        """What a function returned, as one that was written for Turnwise would."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A named, weighted function. Sync ones run on threads, several at once."""

    function: Callable[..., Any]
    name: str
    weight: float = 1.0
    seconds: float = 60.0
    """Deadline of one call."""
    contract: Contract | None = None
    """Of the trainer that it was written for; None is Turnwise's own."""

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters
        if not ({"trajectory", "completions"} & set(parameters) or self._takes_any):
            raise RecipeError(
                f"reward function {self.name}: takes {', '.join(parameters) or 'nothing'}; it must take "
                "(trajectory), or by keyword (prompts, completions, completion_ids, **columns)"
            )

    @classmethod
    def load(cls, path: str, weight: float = 1.0) -> Self:
        """Find ``pkg.module:function``.

        Raises:
            RecipeError: There is no such function.
        """
        module_name, _, attribute = path.partition(":")
        if not module_name or not attribute:
            raise RecipeError(f"reward function '{path}': write it as pkg.module:function")
        with boundary(RecipeError, f"reward function '{path}'"):
            function = getattr(importlib.import_module(module_name), attribute)
        if not callable(function):
            raise RecipeError(f"reward function '{path}': a {type(function).__name__} cannot be called")
        return cls(function=function, name=attribute, weight=weight)

    @property
    def identity(self) -> str:
        """Name and source, so that an edited function counts as another one."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):  # Made at a prompt, or a callable object: its name is all there is.
            source = f"{self.function.__module__}:{getattr(self.function, '__qualname__', '')}"
        return f"{self.name} {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    @property
    def per_trajectory(self) -> bool:
        """Whether it takes one trajectory, and not TRL's columns of a group."""
        return self.contract is None and "trajectory" in inspect.signature(self.function).parameters

    @property
    def needs_environments(self) -> bool:
        """Whether environments have to stay as they are until it was asked."""
        by_contract = self.contract is not None and self.contract.environments and self._takes_any
        return by_contract or "environments" in inspect.signature(self.function).parameters

    async def score(
        self, siblings: Sequence[Trajectory], live: Mapping[str, Live] | None = None
    ) -> list[ScoreOrError]:
        """A score, None, or what went wrong, for each sibling in order. Never raises.

        Args:
            siblings: Of one task.
            live: What is at hand of those that were played just now, by their ids.
        """
        live = live or {}
        if self.needs_environments and live and not all(one.id in live for one in siblings):
            found = iter(await self.score([one for one in siblings if one.id in live], live))
            return [next(found) if one.id in live else None for one in siblings]
        # The rows are the siblings' too, and stand on trajectories: a function may change its own alone.
        siblings = [replace(one, task=copy.deepcopy(dict(one.task))) for one in siblings]
        if self.per_trajectory:
            outcomes = await asyncio.gather(*(self._call({"trajectory": one}) for one in siblings))
            return [self._number(outcome) for outcome in outcomes]
        scores = await self._together(siblings, live)
        if isinstance(scores, list):
            return scores
        if isinstance(scores, EnvLostError) or len(siblings) == 1:
            return [scores] * len(siblings)
        return await self._apart(siblings, scores, live)

    async def _together(
        self, siblings: Sequence[Trajectory], live: Mapping[str, Live]
    ) -> list[ScoreOrError] | TurnwiseError:
        """Scores in order, or why there are none."""
        columns: Mapping[str, Any] = trl_columns(siblings, live)
        if self.contract is not None:
            columns = self.contract.arguments(siblings, columns)
        scores = await self._call(self._accepted(columns))
        if isinstance(scores, TurnwiseError):
            return scores
        if self.contract is not None:
            scores = self.contract.scores(scores)
        if not isinstance(scores, Sequence) and hasattr(scores, "tolist"):
            scores = scores.tolist()
        if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(siblings):
            found = f"{len(scores)} values" if isinstance(scores, Sequence) else type(scores).__name__
            return ScoringError(
                f"reward {self.name}: returned {found}; expected a list of {len(siblings)} numbers or None"
            )
        return [self._number(score) for score in scores]

    async def _apart(
        self, siblings: Sequence[Trajectory], problem: TurnwiseError, live: Mapping[str, Live]
    ) -> list[ScoreOrError]:
        """Find out whose replies broke the function, and score the others together."""
        alone = await asyncio.gather(*(self._together([one], live) for one in siblings))
        sound = [one for one, found in zip(siblings, alone, strict=True) if isinstance(found, list)]
        together = await self._together(sound, live) if 0 < len(sound) < len(siblings) else problem
        if not isinstance(together, list):
            # Each alone can be scored and all of them cannot: nobody's doing in particular.
            lost = EnvLostError(f"{together} (each sibling alone can be scored)")
            together = [lost] * len(sound)
        scores = iter(together)
        return [next(scores) if isinstance(found, list) else found for found in alone]

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns, or an error as `ScoreOrError` has them."""
        try:
            with boundary(ScoringError, f"reward {self.name}"):
                return await contain.bounded(self._result(arguments), self.seconds)
        except EnvLostError as lost:
            return EnvLostError(f"reward {self.name}: {lost}")
        except ScoringError as error:
            if isinstance(error.__cause__, contain.OverranError | contain.StuckError):
                return ScoringError(f"reward {self.name}: did not finish within {self.seconds:g} s")
            return error
        except TurnwiseError as error:
            return ScoringError(f"reward {self.name}: {error}")

    async def _result(self, arguments: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**arguments)
        result = await on_thread(self.function, arguments)
        return await result if inspect.isawaitable(result) else result

    def _number(self, score: Any) -> ScoreOrError:
        if score is None or isinstance(score, TurnwiseError):
            return score
        try:
            with boundary(ScoringError, f"reward {self.name}"):
                return finite(score, f"reward {self.name}")
        except ScoringError as error:
            return error

    def _accepted(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._takes_any:
            return columns
        parameters = inspect.signature(self.function).parameters
        return {name: value for name, value in columns.items() if name in parameters}

    @property
    def _takes_any(self) -> bool:
        parameters = inspect.signature(self.function).parameters.values()
        return any(part.kind is part.VAR_KEYWORD for part in parameters)


async def score_siblings(
    trajectories: Sequence[Trajectory],
    functions: Sequence[RewardFunction],
    forfeit: float = 0.0,
    live: Mapping[str, Live] | None = None,
) -> list[Trajectory]:
    """Add the functions' rewards to the siblings of one group; failed ones are left as they are.

    Args:
        trajectories: The siblings.
        functions: At least one, or nothing is done.
        forfeit: What an end is worth that cannot be scored, beside what can.
        live: What is at hand of those that were played just now, by their ids.
    """
    played = [one for one in trajectories if not one.stop_reason.failed]
    if not played or not functions:
        return list(trajectories)
    columns = await asyncio.gather(*(function.score(played, live) for function in functions))
    least = [_least(function, scores) for function, scores in zip(functions, columns, strict=True)]
    scored = {
        trajectory.id: _with_scores(trajectory, functions, scores, least, forfeit)
        for trajectory, scores in zip(played, zip(*columns, strict=True), strict=True)
    }
    return [scored.get(trajectory.id, trajectory) for trajectory in trajectories]


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


def _least(function: RewardFunction, scores: Sequence[ScoreOrError]) -> float:
    """What a sibling forfeits to: no more than 0, and than any sibling was worth to this function."""
    numbers = [score for score in scores if isinstance(score, float)]
    return min((0.0, *numbers), key=lambda score: function.weight * score)


def _with_scores(
    trajectory: Trajectory,
    functions: Sequence[RewardFunction],
    scores: Sequence[ScoreOrError],
    least: Sequence[float],
    forfeit: float,
) -> Trajectory:
    rewards = dict(trajectory.rewards)
    stop, failure = trajectory.stop_reason, trajectory.error
    for function, score, worst in zip(functions, scores, least, strict=True):
        where = f"reward {function.name}"
        if function.name in rewards:
            score = EnvLostError(
                f"{where}: the environment has a reward of this name too; rename the function"
            )
        if isinstance(score, TurnwiseError):
            failure = failure_of(score, where)
            if isinstance(score, EnvLostError) or trajectory.policy == TeacherPolicy.name:
                return replace(trajectory, stop_reason=StopReason.SCORING_FAILED, error=failure)
            stop, score = StopReason.FORFEITED, worst
            if forfeit:
                rewards[FORFEIT] = Reward(value=forfeit)
        rewards[function.name] = Reward(value=score, weight=function.weight)
    return replace(trajectory, rewards=rewards, stop_reason=stop, error=failure)


async def on_thread(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call on a daemon thread: one that hangs is left behind, and keeps neither a pool nor the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, Exception | None]] = loop.create_future()

    def settle(outcome: tuple[Any, Exception | None]) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        outcome: tuple[Any, Exception | None]
        try:
            outcome = contain.call(partial(function, **arguments)), None
        except Exception as error:  # noqa: BLE001 - raised again on the loop, inside its boundary
            outcome = None, error
        with suppress(RuntimeError):  # The loop is closed and nobody is left to be told.
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="foreign", daemon=True).start()
    result, problem = await future
    if problem is not None:
        raise problem
    return result
