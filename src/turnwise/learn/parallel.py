"""`ParallelLearner`: one learner over several processes.

The first process calls it as it would call `Learner`; each call is sent to the others, which make it too
(`turnwise.learn.worker`). Micro-batches are dealt out, gradients are summed, since losses are sums with
weights fixed over the whole step. Samples, losses and metrics go to every process, so that all of them come
to the same conclusions, a refused update included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from turnwise.errors import TurnwiseError, said
from turnwise.learn.batch import pack
from turnwise.learn.learner import Learner, Metrics
from turnwise.learn.losses import Loss, LossOutput
from turnwise.learn.model import PolicyModel
from turnwise.learn.ranks import Ranks
from turnwise.learn.weights import HeldWeights
from turnwise.types import Batch, FloatArray, Sample, WeightSource

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the learner, for every process to call."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


def _everywhere(
    method: Callable[Concatenate[Learner, P], R],
) -> Callable[Concatenate[ParallelLearner, P], R]:
    """The first process's call of a method is everyone's."""

    @wraps(method)
    def call(self: ParallelLearner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._ranks.order(Call(method.__name__, args, kwargs))
        with self._ranks.agreed():
            return method(self, *args, **kwargs)

    return call


class ParallelLearner(Learner):
    """A `Learner` over several processes. Only the first one calls its methods; the others `follow`.

    The checkpoint is the same directory whatever the number of processes. A call that fails in one process
    fails in the first; where they could not go on together, so does each call after it.

    Args:
        ranks: The processes.
        model: The same in each; sharded if ``ranks.kind`` is fsdp.
        tokenizer: None where no files are written.
        **settings: Those of `Learner`.
    """

    def __init__(self, ranks: Ranks, model: PolicyModel, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        self._ranks = ranks
        self.writes = ranks.first
        self._few_told = False

    forward_backward = _everywhere(Learner.forward_backward)
    skip_step = _everywhere(Learner.skip_step)
    logprobs = _everywhere(Learner.logprobs)
    save = _everywhere(Learner.save)
    load = _everywhere(Learner.load)
    export = _everywhere(Learner.export)

    def optim_step(self, moving: AbstractContextManager[None] | None = None) -> Metrics:
        """As `Learner.optim_step`; ``moving`` is entered in this process alone."""
        self._ranks.order(Call("optim_step"))
        with self._ranks.agreed():
            return super().optim_step(moving)

    def publish(self) -> WeightSource:
        """As `Learner.publish`: to be read from any thread, without the other processes."""
        self._ranks.order(Call("publish"))
        with self._ranks.agreed():
            return self._publish()

    def follow(self, call: Call) -> None:
        """Take part in what the first process called."""
        method = self._publish if call.name == "publish" else getattr(super(), call.name)
        with self._ranks.agreed():
            method(*call.args, **(call.kwargs or {}))

    # -- parts -------------------------------------------------------------------------------------

    def _publish(self) -> WeightSource:
        live = super().publish()
        return HeldWeights(self.model) if self.model.sharded else live

    def _pack(self, samples: Sequence[Sample]) -> list[Batch]:
        """Into enough micro-batches for everyone, where that changes nothing: dropout is drawn for each."""
        most = self._rows.micro_tokens
        if not self.model.has_dropout:
            most = min(most, math.ceil(sum(map(len, samples)) / self._ranks.count))
        return pack(
            samples, micro_tokens=max(1, most), row_tokens=self._rows.row_tokens, together=self.model.packs
        )

    def _backward(
        self, batches: Sequence[tuple[int, Batch]], loss: Loss, entropy_gradient: bool, accuracy: bool
    ) -> list[LossOutput]:
        """All micro-batches' losses, on the CPU; of the gradients, this process's part."""
        ranks = self._ranks
        if ranks.first and len(batches) < ranks.count and not self._few_told:
            self._few_told = True
            log.warning(
                "an update of %d micro-batches leaves processes idle, of which there are %d: lower "
                "rows.micro_tokens, or have more samples in an update", len(batches), ranks.count,
            )  # fmt: skip
        shown = any(sample.images for _, batch in batches for sample in batch.samples)
        self.model.shows_images = self.model.sharded and shown
        with self._own_share():
            own = super()._backward(batches[ranks.rank :: ranks.count], loss, entropy_gradient, accuracy)
            for _ in range(self._idle_turns(len(batches), len(own))):
                nothing_N = self.model.logprobs(_nothing(), chunk=1).logprobs_N
                (0 * nothing_N.sum()).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return self._dealt(len(batches), [_on_cpu(output) for output in own])

    def _clip(self) -> float:
        if self._pending and not self.model.sharded:
            self._ranks.sum_gradients([parameter for _, parameter in self.model.trainable])
        return super()._clip()

    def _score(self, model: PolicyModel, batches: Sequence[Batch]) -> list[FloatArray]:
        """All micro-batches' logprobs; each is scored by one process."""
        mine = batches[self._ranks.rank :: self._ranks.count]
        with self._own_share():
            own = super()._score(model, mine)
            for _ in range(self._idle_turns(len(batches), sum(bool(one.loss_mask_BT.any()) for one in mine))):
                model.logprobs(_nothing(), chunk=1)
        return self._dealt(len(batches), own)

    @contextmanager
    def _own_share(self) -> Iterator[None]:
        """What this process computes; where weights are spread, others wait in the middle of it."""
        try:
            yield
        except TurnwiseError as error:
            if self.model.sharded:
                self._ranks.leave(f"process {self._ranks.rank}: {said(error)}")
            raise

    def _idle_turns(self, total: int, own: int) -> int:
        """Forwards of nothing, so that each process takes part in as many: weights are gathered in each."""
        return math.ceil(total / self._ranks.count) - own if self.model.sharded else 0

    def _dealt(self, total: int, own: Sequence[T]) -> list[T]:
        """What each process made of the micro-batches that it was dealt, in the order of these."""
        made = self._ranks.gather(list(own))
        return [made[number % self._ranks.count][number // self._ranks.count] for number in range(total)]


def _on_cpu(output: LossOutput) -> LossOutput:
    """To be sent."""
    return replace(
        output,
        loss=output.loss.cpu(),
        means={name: (total.cpu(), count.cpu()) for name, (total, count) in output.means.items()},
        maxima={name: value.cpu() for name, value in output.maxima.items()},
    )


def _nothing() -> Batch:
    """A micro-batch of two tokens, for its forward alone."""
    zeros_T = np.zeros(2, dtype=np.float32)
    sample = Sample(
        token_ids_T=np.zeros(2, dtype=np.int32),
        loss_mask_T=np.array([False, True]),
        logprobs_T=zeros_T,
        advantages_T=zeros_T,
        weights_T=zeros_T,
        versions_T=np.full(2, -1, dtype=np.int32),
        trajectory_id="",
        group_id="",
        env="",
    )
    return pack([sample], micro_tokens=2)[0]
