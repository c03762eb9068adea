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

A function that was written for another trainer comes with that trainer's `Contract`: where it is called, and
in which order. No trainer that knows such functions goes on where one raises, so theirs is the other rule: a
sibling that one cannot score is left out, and one that can score nothing ends the run by its own error
(`turnwise.rollout.faults`).

A function that names ``environments`` is given the live instances that the siblings were played in, each as
its episode left it. Siblings that an earlier run played have none left, and are not shown to it.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self

from turnwise.envs import contain
from turnwise.envs.observe import finite
from turnwise.errors import AnswerError, EnvLostError, RecipeError, ScoringError, TurnwiseError, boundary
from turnwise.rollout.columns import Live, trl_columns
from turnwise.rollout.faults import Faults, ScoreOrError
from turnwise.rollout.policies import TeacherPolicy
from turnwise.rollout.record import failure_of
from turnwise.types import FORFEIT, Reward, StopReason, Trajectory


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

    @property
    def turn(self) -> asyncio.Lock | None:
        """Held while a group's sync functions are called one after another; None calls them all at once."""
        ...

    async def call(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """What a sync function returns, called where such functions are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A named, weighted function. Sync ones run on threads, several at once, or as the contract says."""

    function: Callable[..., Any]
    name: str
    weight: float = 1.0
    seconds: float = 60.0
    """Deadline of one call; there is none for what is called in turn, which nothing could stop."""
    contract: Contract | None = None
    """Of the trainer that it was written for; None is Turnwise's own."""
    faults: Faults = field(default_factory=Faults, repr=False, compare=False)
    """What went wrong with it so far."""

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
    def is_async(self) -> bool:
        """Whether a call of it is a coroutine."""
        own = getattr(self.function, "__call__", None)  # noqa: B004 - of an object it is what may be async
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(own)

    @property
    def turn(self) -> asyncio.Lock | None:
        """Held while it is asked about a group; None asks it beside all others."""
        return None if self.contract is None or self.is_async else self.contract.turn

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
        # What is no list is nobody's reply's doing, save where a function chooses which replies it scores.
        sure = isinstance(scores, EnvLostError) or (self.contract and isinstance(scores, AnswerError))
        if sure or len(siblings) == 1:
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
        if not isinstance(scores, Sequence) and hasattr(scores, "tolist"):
            scores = scores.tolist()
        if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(siblings):
            found = f"{len(scores)} values" if isinstance(scores, Sequence) else type(scores).__name__
            return AnswerError(
                f"reward {self.name}: returned {found}; expected a list of {len(siblings)} numbers or None"
            )
        return [self._number(score) for score in scores]

    async def _apart(
        self, siblings: Sequence[Trajectory], problem: TurnwiseError, live: Mapping[str, Live]
    ) -> list[ScoreOrError]:
        """Find out whose replies broke the function, and score the others together."""
        alone = await asyncio.gather(*(self._together([one], live) for one in siblings))
        if self.contract is not None:  # Its trainer asks once, and a call may cost something: no third one.
            return [one for found in alone for one in (found if isinstance(found, list) else [found])]
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
                seconds = math.inf if self.turn is not None else self.seconds
                return await contain.bounded(self._result(arguments), seconds)
        except EnvLostError as lost:
            return EnvLostError(f"reward {self.name}: {lost}")
        except ScoringError as error:
            if isinstance(error.__cause__, contain.OverranError | contain.StuckError):
                return ScoringError(f"reward {self.name}: did not finish within {self.seconds:g} s")
            return error
        except TurnwiseError as error:
            return ScoringError(f"reward {self.name}: {error}")

    async def _result(self, arguments: Mapping[str, Any]) -> Any:
        if self.is_async:
            answer = await self.function(**arguments)
        else:
            call = on_thread if self.contract is None else self.contract.call
            answer = await call(self.function, arguments)
            if inspect.isawaitable(answer):
                answer = await answer
        return answer if self.contract is None else self.contract.scores(answer)

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

    All functions are asked at the same time, save those that take turns: these before all others, in their
    order, while no other group's are asked.

    Args:
        trajectories: The siblings.
        functions: At least one, or nothing is done.
        forfeit: What an end is worth that cannot be scored, beside what can.
        live: What is at hand of those that were played just now, by their ids.

    Raises:
        Exception: What a function with a contract raised, where it can score nothing: see `Faults.note`.
    """
    played = [one for one in trajectories if not one.stop_reason.failed]
    if not played or not functions:
        return list(trajectories)
    columns = await _asked(functions, played, live)
    for function, scores in zip(functions, columns, strict=True):
        function.faults.note(function.name, scores, ends_run=function.contract is not None)
    least = [_least(function, scores) for function, scores in zip(functions, columns, strict=True)]
    scored = {
        trajectory.id: _with_scores(trajectory, functions, scores, least, forfeit)
        for trajectory, scores in zip(played, zip(*columns, strict=True), strict=True)
    }
    return [scored.get(trajectory.id, trajectory) for trajectory in trajectories]


async def _asked(
    functions: Sequence[RewardFunction], played: Sequence[Trajectory], live: Mapping[str, Live] | None
) -> list[list[ScoreOrError]]:
    """What each function says, in their order."""
    found: dict[str, list[ScoreOrError]] = {}
    in_turn = [function for function in functions if function.turn is not None]
    if in_turn and (turn := in_turn[0].turn) is not None:
        async with turn:
            for function in in_turn:
                found[function.name] = await function.score(played, live)
    rest = [function for function in functions if function.name not in found]
    scores = await asyncio.gather(*(function.score(played, live) for function in rest))
    found |= zip((function.name for function in rest), scores, strict=True)
    return [found[function.name] for function in functions]


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
            left_out = isinstance(score, EnvLostError) or function.contract is not None
            if left_out or trajectory.policy == TeacherPolicy.name:
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
