"""`reward_functions`: TRL's reward functions as Turnwise's, under the keyword contract of ``GRPOTrainer``.

    board = Board()
    functions = reward_functions([accuracy, "org/reward-model"], weights=[1.0, 0.5], board=board, …)
    functions = in_turn(functions, loop.here)                # for one run

A function is called once for each group, as soon as its siblings have ended, and not once for each batch;
what it logs finds its way to the right rows all the same. As in TRL, sync functions are called where `train`
was, one after another in their order, and async ones together after them. TRL stops at a function that
raises; here that ends the run where the function can score nothing, and leaves the completions out that it
raises on where it can (`turnwise.rollout.faults`). NaN means, as in TRL, that the reward does not apply.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from turnwise.errors import RecipeError
from turnwise.rollout.columns import TRL_OWN, shown
from turnwise.rollout.faults import Faults
from turnwise.rollout.scoring import RewardFunction, on_thread
from turnwise.types import Message, Trajectory

log = logging.getLogger(__name__)

SECONDS = 600.0
"""Deadline of one async call: TRL has none, and a judge that is asked about a whole group takes its time."""
HANDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What each function may take, beside columns and environments."""
KEPT = 65_536
"""Episodes of which a column's values are kept until somebody takes them; groups may be dropped unseen."""

Form = Literal["chat", "text", "rollout"]
"""What a completion is: messages; the text of a plain prompt's; all that a ``rollout_func`` returned, as one
message."""
Here = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments where `train` was called, and comes to what it returns."""


class Board:
    """What reward functions log, and the trainer's state that they see. They may call from any thread."""

    def __init__(self) -> None:
        self.trainer_state: Any = None
        """A ``transformers.TrainerState``; set by the trainer."""
        self._lock = threading.Lock()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._columns: dict[str, dict[str, Any]] = defaultdict(dict)
        self._warned: set[str] = set()
        self._faults: dict[str, Faults] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Take one value of a metric; the mean of all is told."""
        with self._lock:
            self._metrics[name].append(float(value))

    def log_extra(self, episodes: Sequence[str]) -> Callable[[str, Iterable[Any]], None]:
        """The ``log_extra`` of one call of one function, about these episodes in this order."""
        filled: Counter[str] = Counter()

        def log_extra(column: str, values: Iterable[Any]) -> None:
            values = list(values)
            with self._lock:
                start = filled[column]
                filled[column] += len(values)
                kept = self._columns[column]
                kept.update(zip(episodes[start:], values, strict=False))
                while len(kept) > KEPT:
                    del kept[next(iter(kept))]
                if filled[column] > len(episodes) and column not in self._warned:
                    self._warned.add(column)
                    log.warning(
                        "log_extra('%s') was given %d values for %d completions; those past the last are "
                        "left out", column, filled[column], len(episodes),
                    )  # fmt: skip

        return log_extra

    def watch(self, function: RewardFunction) -> None:
        """Tell of what it could not score, too."""
        self._faults[function.name] = function.faults

    def take_metrics(self) -> dict[str, float]:
        """The mean of each metric since they were last taken, and how many completions were not scored."""
        with self._lock:
            taken, self._metrics = self._metrics, defaultdict(list)
        failed = {name: faults.take() for name, faults in self._faults.items()}
        return {
            **{name: sum(values) / len(values) for name, values in taken.items()},
            **{f"rewards/{name}/failed": float(count) for name, count in failed.items() if count},
        }

    def take_columns(self, episodes: Sequence[str]) -> dict[str, list[Any]]:
        """What was logged of these episodes, one value for each in their order, None where there is none.

        Values of other episodes (of groups that are still played) stay for whoever asks for those.
        """
        with self._lock:
            taken = {
                column: [values.pop(episode, None) for episode in episodes]
                for column, values in self._columns.items()
                if not values.keys().isdisjoint(episodes)
            }
            self._columns = defaultdict(dict, {name: kept for name, kept in self._columns.items() if kept})
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlContract:
    """What ``GRPOTrainer`` calls a reward function with, and what it makes of the answer."""

    board: Board
    tokenizer: Any = None
    """Decodes completions; messages are taken as they were parsed where it is None."""
    form: Form = "chat"
    environments: bool = False
    """There are live ones to show."""
    routed: bool = False
    """Rows have an ``environment`` column, which functions see though environments do not."""
    here: Here | None = None
    """Where sync functions are called; on threads if None."""
    turn: asyncio.Lock | None = None
    """Of a run, for these."""

    async def call(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """What a sync function returns."""
        if self.here is None:
            return await on_thread(function, arguments)
        return await self.here(functools.partial(function, **arguments))

    def arguments(
        self, siblings: Sequence[Trajectory], columns: Mapping[str, Sequence[Any]]
    ) -> Mapping[str, Any]:
        """All keyword arguments."""
        told: dict[str, Any] = dict(columns)
        if self.form == "text":
            told["prompts"] = [one.task["prompt"] for one in siblings]
            told["completions"] = [self._decoded(ids) for ids in columns["completion_ids"]]
        elif self.form == "rollout":
            texts = [self._decoded(ids) for ids in columns["completion_ids"]]
            if all(isinstance(one.task["prompt"], str) for one in siblings):
                told["prompts"], told["completions"] = [one.task["prompt"] for one in siblings], texts
            else:
                told["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        else:
            told["completions"] = [self._messages(one) for one in siblings]
        if self.routed:
            told["environment"] = [one.env for one in siblings]
        told["trainer_state"] = self.board.trainer_state
        told["log_extra"] = self.board.log_extra([one.id for one in siblings])
        told["log_metric"] = self.board.log_metric
        return told

    def scores(self, answer: Any) -> Any:
        """Numbers out of tensors and arrays, and None for NaN, which is what TRL makes of None."""
        if hasattr(answer, "tolist"):
            answer = answer.tolist()
        if not isinstance(answer, Iterable) or isinstance(answer, str | Mapping):
            return answer
        return [_number(one) for one in answer]

    def _messages(self, one: Trajectory) -> list[dict[str, Any]]:
        # Without tools TRL parses nothing, unless the tokenizer says how: thinking is part of the text.
        parsed = bool(one.tools) or any(
            getattr(self.tokenizer, name, None) is not None
            for name in ("response_template", "response_schema")
        )
        out = []
        for turn in one.turns:
            if parsed or self.tokenizer is None or turn.ids is None:
                out.append(_as_parsed(turn.message))
            else:
                out.append({"role": "assistant", "content": self._decoded(turn.ids)})
            out += [message.as_dict(shown) for message in turn.feedback]
        return out

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def reward_functions(
    reward_funcs: Any,
    *,
    weights: Sequence[float] | None,
    board: Board,
    processing: Any = None,
    form: Form = "chat",
    environments: bool = False,
    routed: bool = False,
    reward_processing: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> tuple[RewardFunction, ...]:
    """What ``GRPOTrainer`` takes as ``reward_funcs``, with their weights, under the names that TRL logs.

    Args:
        reward_funcs: One, a list of them, or None: functions, names of models, models.
        weights: One for each; 1 where they are None.
        board: Takes what they log.
        processing: The policy's tokenizer or processor.
        form: What completions look like.
        environments: There is an ``environment_factory``, whose instances they are shown.
        routed: That is a mapping, and rows name the environment.
        reward_processing: Tokenizers of reward models, one for each function, None for the model's own.
        model_kwargs: Load reward models with these, as TRL does with ``model_init_kwargs``.
        template_kwargs: For the reward models' chat templates.
        seconds: Deadline of one call.

    Raises:
        RecipeError: As many weights or tokenizers are needed as functions, or one is none of the three.
    """
    given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    given = [] if reward_funcs is None else list(given)
    weights = [1.0] * len(given) if weights is None else list(weights)
    readers = reward_processing if isinstance(reward_processing, list | tuple) else [reward_processing]
    readers = [None] * len(given) if reward_processing is None else list(readers)
    for what, found in (("reward_weights", weights), ("reward_processing_classes", readers)):
        if len(found) != len(given):
            raise RecipeError(f"{what} has {len(found)} entries for {len(given)} reward functions")
    contract = TrlContract(
        board=board,
        tokenizer=getattr(processing, "tokenizer", processing),
        form=form,
        environments=environments,
        routed=routed,
    )
    functions: list[RewardFunction] = []
    taken: Counter[str] = Counter()
    for one, weight, reader in zip(given, weights, readers, strict=True):
        function = _callable(one, reader, model_kwargs or {}, template_kwargs or {})
        name = name_of(one)
        taken[name] += 1
        if taken[name] > 1:
            log.warning("two reward functions are called '%s'; the later is '%s_%d'", name, name, taken[name])
            name = f"{name}_{taken[name]}"
        functions.append(
            RewardFunction(
                function=function, name=name, weight=float(weight), seconds=seconds, contract=contract
            )
        )
        board.watch(functions[-1])
    return tuple(functions)


def in_turn(functions: Iterable[RewardFunction], here: Here) -> tuple[RewardFunction, ...]:
    """The functions, to be called one after another on the thread that ``here`` stands for.

    So a function may set a signal's alarm, keep a connection to SQLite, or read what the one before it wrote.
    """
    turn = asyncio.Lock()
    return tuple(
        replace(one, contract=replace(one.contract, here=here, turn=turn))
        if isinstance(one.contract, TrlContract)
        else one
        for one in functions
    )


def need_columns(
    functions: Iterable[RewardFunction], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Refuse functions that need what they will not be given.

    Args:
        functions: Of `reward_functions`.
        rows: By environment; the first of each is looked at.

    Raises:
        RecipeError: A parameter without a default is neither a column nor what TRL hands over.
    """
    columns = {name for own in rows.values() for name in own[0]} - set(TRL_OWN)
    for one in functions:
        contract = one.contract
        if not isinstance(contract, TrlContract) or contract.form == "rollout":
            continue  # Whose columns are also what the rollouts bring along.
        given = {*columns, *HANDED, *(["environments"] if contract.environments else [])}
        given |= {"environment"} if contract.routed else set()
        for part in inspect.signature(one.function).parameters.values():
            optional = part.default is not part.empty or part.kind in (part.VAR_POSITIONAL, part.VAR_KEYWORD)
            if not optional and part.name not in given:
                raise RecipeError(
                    f"reward function '{one.name}' needs '{part.name}', and it is given by name: "
                    f"{', '.join(HANDED)} and the columns {', '.join(sorted(columns)) or '(there are none)'}"
                )


def form_of(rows: Mapping[str, Sequence[Mapping[str, Any]]], *, plays: bool) -> Form:
    """What completions look like: text where a prompt is plain text, and no environment or tool answers."""
    if plays:
        return "chat"
    return "text" if all(isinstance(own[0].get("prompt"), str) for own in rows.values()) else "chat"


def name_of(reward: Any) -> str:
    """What TRL calls a reward: a function's name, a callable's class, the last part of a model's path."""
    if isinstance(reward, str):
        return reward.rstrip("/").split("/")[-1]
    if _is_model(reward):
        return str(reward.config._name_or_path).rstrip("/").split("/")[-1] or type(reward).__name__
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def _callable(
    reward: Any, reader: Any, model_kwargs: Mapping[str, Any], template_kwargs: Mapping[str, Any]
) -> Callable[..., Any]:
    """The function itself, or one that asks a model."""
    if isinstance(reward, str) or _is_model(reward):
        from turnwise.engines.reward_model import RewardModel

        model = RewardModel(
            reward, tokenizer=reader, model_kwargs=model_kwargs, template_kwargs=template_kwargs
        )

        def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
            return model.score([prompt + told for prompt, told in zip(prompts, completions, strict=True)])

        return score
    if not callable(reward):
        raise RecipeError(
            f"a reward is a function, a model's name or a sequence classifier; found {type(reward).__name__}"
        )
    function: Callable[..., Any] = reward
    return function


def _is_model(reward: Any) -> bool:
    torch = sys.modules.get("torch")  # Whoever has a model has imported it.
    return torch is not None and isinstance(reward, torch.nn.Module)


def _number(score: Any) -> Any:
    score = score.item() if callable(getattr(score, "item", None)) else score
    return None if isinstance(score, float) and math.isnan(score) else score


def _as_parsed(message: Message) -> dict[str, Any]:
    """A reply as the tokenizer's ``parse_response`` gives it; a malformed call is text, as it is there."""
    out = message.as_dict()
    if message.reasoning is not None:
        out["reasoning_content"] = message.reasoning
    bad = [call for call in message.tool_calls if call.error is not None]
    if bad:
        calls = [
            told
            for told, call in zip(out.pop("tool_calls"), message.tool_calls, strict=True)
            if not call.error
        ]
        out |= {"tool_calls": calls} if calls else {}
        out["content"] = "\n".join(filter(None, [message.text, *(call.raw for call in bad)]))
    return out
