"""`player`: TRL's ``rollout_func`` plays, in place of Turnwise's own episodes.

    def rollout_func(prompts, trainer):                   # one prompt for each completion, siblings adjacent
        made = generate_rollout_completions(trainer, prompts)
        return {key: [one[key] for one in made] for key in ("prompt_ids", "completion_ids", "logprobs")}

    Given(player=player(rollout_func, trainer), …)

The function is called once for all groups that a step begins, and never twice at a time. Everything around it
is as for any episode: rewards, groups, what is on disk, resuming. A call that raises counts as so many failed
episodes and is made again, save where its code is wrong (`DEFECTS`) or the first one raises: then that error
ends the run, as does an answer of the wrong form. A network that fails is neither. There is no deadline: as
in TRL, only the function knows how long its episodes take.

A function that says nothing of its log probabilities has sampled from the present weights, as in TRL: what
they are by the learner's own reckoning stands on the trajectories.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from turnwise.compat.generation import SOURCES, Source
from turnwise.compat.rollouts import Rollout, read_rollouts
from turnwise.envs.opening import opening
from turnwise.errors import PolicyError, RecipeError, RolloutError, TaskError, TurnwiseError, boundary
from turnwise.rollout.arena import Arena
from turnwise.rollout.columns import Live
from turnwise.rollout.episode import Sink
from turnwise.rollout.faults import DEFECTS
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.player import Player
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder, Record, failure_of
from turnwise.rollout.scheduler import Scheduler
from turnwise.rollout.scoring import on_thread, score_siblings
from turnwise.types import (
    Finish,
    FloatArray,
    Message,
    Reply,
    Sample,
    Sampling,
    StopReason,
    Trajectory,
    TrajectoryGroup,
)

log = logging.getLogger(__name__)

RolloutFunc = Callable[[list[Any], Any], Any]
"""``rollout_func(prompts, trainer)``, sync or async."""
Call = Callable[..., Awaitable[Any]]
"""Calls a sync function with its arguments where that may block, and comes to what it returns."""
Score = Callable[[Sequence[Sample]], Sequence[FloatArray]]
"""Log probabilities of each sample's tokens under the present weights; it may block."""

POLICY = "rollout_func"
"""Who played, on the trajectories."""


def check_signature(rollout_func: RolloutFunc) -> None:
    """Refuse a function that cannot be called with prompts and a trainer.

    Raises:
        RecipeError: It takes other arguments, as in earlier versions of TRL.
    """
    try:
        inspect.signature(rollout_func).bind([], None)
    except ValueError:  # A builtin may have none to look at.
        return
    except TypeError as cause:
        raise RecipeError(
            f"rollout_func is called as rollout_func(prompts, trainer), and {cause}; it takes "
            f"{inspect.signature(rollout_func)} (what else it needs is in trainer.args and "
            "trainer.processing_class)"
        ) from cause


def player(
    rollout_func: RolloutFunc, trainer: Any, *, call: Call | None = None, score: Score | None = None
) -> Callable[..., Player]:
    """What makes the player of a run, with the arguments of a `Scheduler`.

    Args:
        rollout_func: The function.
        trainer: Handed to it.
        call: Where a sync one is called; on a thread of its own if None.
        score: As of `Rollouts`.
    """

    def make(*, policy: ModelPolicy, staleness: int = 0, **options: Any) -> Scheduler:
        if staleness:
            raise RecipeError(
                f"rl.staleness is {staleness}; a rollout_func says nothing of the weights that drew its "
                "tokens, so that it plays between updates only: set rl.staleness=0"
            )
        rollouts = Rollouts(rollout_func, trainer, policy, call=call, score=score)
        return _Player(rollouts, policy=policy, play=rollouts.play, staleness=0, **options)

    return make


class _Player(Scheduler):
    """A scheduler that ends a call of the function along with what is in flight."""

    def __init__(self, rollouts: Rollouts, **options: Any) -> None:
        super().__init__(**options)
        self._rollouts = rollouts

    async def aclose(self) -> None:
        """See `Scheduler.aclose`. A sync function that is still at it is left behind."""
        await super().aclose()
        await self._rollouts.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One group's part of a call."""

    order: GroupOrder
    episodes: Sequence[EpisodeOrder]
    sampling: Sampling
    rollouts: asyncio.Future[list[Rollout]]


class Rollouts:
    """Plays groups by a ``rollout_func``: see `turnwise.rollout.group.PlayGroup`.

    Args:
        rollout_func: The function.
        trainer: Handed to it.
        policy: What `generate_rollout_completions` samples with.
        call: Where a sync function is called; on a thread of its own if None.
        score: Asked where the function says nothing of its log probabilities; nobody is if None, as in an
            evaluation, which learns nothing from them.
    """

    def __init__(
        self,
        rollout_func: RolloutFunc,
        trainer: Any,
        policy: ModelPolicy,
        *,
        call: Call | None = None,
        score: Score | None = None,
    ) -> None:
        self.rollout_func, self.trainer, self.policy = rollout_func, trainer, policy
        self._call, self._score = call or _on_thread, score
        self._answered = self._told = False
        self._waiting: list[_Share] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._busy = asyncio.Lock()

    async def play(
        self,
        order: GroupOrder,
        *,
        arena: Arena,
        policy: Policy,
        sampling: Sampling,
        sink: Sink,
        slots: asyncio.Semaphore | None = None,
        version: int = 0,
    ) -> TrajectoryGroup:
        """Play what is missing of a group, in one call with all others that are begun at the same time.

        Raises:
            RolloutError: The function's answer is none.
            TaskError: The row has no prompt.
        """
        done = order.done
        records = {
            episode.id: Record(episode, sampling, POLICY, arena.harness)
            for episode in order.episodes()
            if episode.id not in done
        }
        played: list[Trajectory] = []
        try:
            try:
                rollouts = await self._rollouts(order, [one.order for one in records.values()], sampling)
            except (RolloutError, RecipeError, TaskError):
                raise
            except TurnwiseError as error:
                for record in records.values():
                    record.stop_reason, record.error = StopReason.POLICY_FAILED, failure_of(error, POLICY)
                played = [record.trajectory() for record in records.values()]
            else:
                for record, rollout in zip(records.values(), rollouts, strict=True):
                    self._write(record, rollout, version)
                live = {id: Live(columns=one.columns) for id, one in zip(records, rollouts, strict=True)}
                ended = [record.trajectory() for record in records.values()]
                played = await score_siblings(ended, arena.functions, arena.spec.forfeit, live)
        except BaseException:
            for record in records.values():
                record.stop_reason = StopReason.CANCELLED
            played = [record.trajectory() for record in records.values()]
            raise
        finally:
            for one in played:
                sink(one)
        by_id = {**done, **{one.id: one for one in played}}
        return TrajectoryGroup(
            id=order.id,
            env=order.env,
            task=order.task,
            trajectories=tuple(by_id[episode.id] for episode in order.episodes()),
            version=version,
        )

    # -- the call ------------------------------------------------------------------------------------

    async def _rollouts(
        self, order: GroupOrder, episodes: Sequence[EpisodeOrder], sampling: Sampling
    ) -> list[Rollout]:
        """What the function makes of a group's prompt, once for each episode."""
        if order.task.get("prompt") is None:
            raise TaskError(f"group {order.id}: the row has no 'prompt', and a rollout_func is given prompts")
        if not episodes:
            return []
        loop = asyncio.get_running_loop()
        share = _Share(order=order, episodes=episodes, sampling=sampling, rollouts=loop.create_future())
        self._waiting.append(share)
        # It starts when all groups that are begun now have joined, and takes those along that come meanwhile.
        task = loop.create_task(self._ask())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await share.rollouts

    async def aclose(self) -> None:
        """End a call that is under way, as far as it can be ended."""
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _ask(self) -> None:
        """One call, for every group that waits."""
        async with self._busy:
            shares = [one for one in self._waiting if not one.rollouts.done()]
            self._waiting.clear()
            if not shares:
                return
            prompts = [copy.deepcopy(one.order.task["prompt"]) for one in shares for _ in one.episodes]
            try:
                with boundary(PolicyError, POLICY):
                    rollouts = await self._answer(shares[0], prompts)
            except TurnwiseError as error:
                cause = error.__cause__
                ends_run = isinstance(cause, DEFECTS) or not (self._answered or isinstance(cause, OSError))
                for share in shares:
                    if not share.rollouts.done():
                        share.rollouts.set_exception(cause if cause is not None and ends_run else error)
                return
            parts = iter(rollouts)
            for share in shares:
                own = [next(parts) for _ in share.episodes]
                if not share.rollouts.done():
                    share.rollouts.set_result(own)

    async def _answer(self, first: _Share, prompts: list[Any]) -> list[Rollout]:
        began = time.perf_counter()
        SOURCES[self.trainer] = source = Source(
            loop=asyncio.get_running_loop(), policy=self.policy, sampling=first.sampling, call=first.order.id
        )
        try:
            if inspect.iscoroutinefunction(self.rollout_func):
                answer = await self.rollout_func(prompts, self.trainer)
            else:
                answer = await self._call(self.rollout_func, prompts, self.trainer)
                if inspect.isawaitable(answer):
                    answer = await answer
        finally:
            source.open = False
        seconds = time.perf_counter() - began
        rollouts = [replace(one, seconds=seconds) for one in read_rollouts(answer, len(prompts))]
        self._answered = True
        return rollouts if answer["logprobs"] is not None else await self._scored(rollouts, first.sampling)

    async def _scored(self, rollouts: list[Rollout], sampling: Sampling) -> list[Rollout]:
        """The rollouts with the learner's log probabilities."""
        if self._score is None:
            return rollouts
        if not self._told:
            self._told = True
            log.warning(
                "rollout_func returned no logprobs: the learner's own are taken for them, so that nothing is "
                "known of how far the sampler was off"
            )
        samples = [_sample(one, sampling.temperature) for one in rollouts]
        found = await asyncio.to_thread(self._score, samples)
        return [_with_logprobs(one, own_T) for one, own_T in zip(rollouts, found, strict=True)]

    # -- the record ----------------------------------------------------------------------------------

    def _write(self, record: Record, rollout: Rollout, version: int) -> None:
        """A rollout as turns: what the model wrote, each with what had come in between as its context."""
        renderer = self.policy.renderer
        opened = opening(record.order.task["prompt"], None)
        record.begin((), opened if isinstance(opened, list) else [Message.user(opened)])
        context, turn = list(rollout.prompt_ids), None
        for ids, logprobs in rollout.parts:
            if logprobs is None:
                context += ids
                if turn is not None:
                    record.tell(turn, Message.user(renderer.decode(ids)))
                continue
            ended = ids[-1] in self._ends
            reply = Reply(
                message=renderer.parse(ids, (), context),
                context_ids=context,
                ids=ids,
                logprobs=logprobs or None,
                versions=[version] * len(ids),
                finish=Finish.STOP if ended else Finish.LENGTH,
            )
            record.stop_reason = StopReason.ANSWERED if ended else StopReason.CUT_REPLY
            turn, context = record.add_reply(reply, None, 0.0), []
        record.policy_seconds = rollout.seconds

    @property
    def _ends(self) -> set[int]:
        """Ids after which a completion counts as finished: as for TRL, stop and padding tokens."""
        tokenizer: Any = getattr(self.policy.renderer, "tokenizer", None)
        padding: int | None = getattr(tokenizer, "pad_token_id", None)
        return {*self.policy.renderer.stop_ids, *([] if padding is None else [padding])}


def _sample(rollout: Rollout, temperature: float) -> Sample:
    """A row to score."""
    ids = list(rollout.prompt_ids)
    mask = [False] * len(ids)
    for part, logprobs in rollout.parts:
        ids += part
        mask += [logprobs is not None] * len(part)
    zeros_T = np.zeros(len(ids), dtype=np.float32)
    return Sample(
        token_ids_T=np.array(ids, dtype=np.int32),
        loss_mask_T=np.array(mask),
        logprobs_T=zeros_T,
        advantages_T=zeros_T,
        weights_T=zeros_T,
        versions_T=np.full(len(ids), -1, dtype=np.int32),
        trajectory_id=POLICY,
        group_id=POLICY,
        env=POLICY,
        temperature=temperature,
    )


def _with_logprobs(rollout: Rollout, logprobs_T: FloatArray) -> Rollout:
    parts: list[tuple[list[int], list[float] | None]] = []
    at = len(rollout.prompt_ids)
    for ids, found in rollout.parts:
        parts.append((ids, None if found is None else logprobs_T[at : at + len(ids)].tolist()))
        at += len(ids)
    return replace(rollout, parts=tuple(parts))


async def _on_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await on_thread(lambda: function(*arguments), {})
