"""`Ranks`: the processes that torchrun or ``accelerate launch`` started together, and how they talk.

Messages are plain objects, pickled, over connections of their own on the CPU; tensors take whatever torch has
for their device.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turnwise.config import ParallelConfig
from turnwise.errors import LearnError, TurnwiseError, boundary, said
from turnwise.learn.model import PolicyModel

T = TypeVar("T")

_FOREVER = timedelta(days=365)
"""How long processes wait for the first one, which may be playing episodes."""


class Ranks:
    """The processes that were started together, and how they talk.

    What cannot be undone (a process that died, an error in the middle of an update) is the end of all of
    them: whoever finds it out closes the connections, on which the others wait.

    Args:
        config: The recipe's.
        device: ``model.device`` of the recipe: ``cpu``, ``cuda``; GPUs where there are any, if not given.

    Raises:
        LearnError: There are more processes on this machine than GPUs, or they do not find each other; all of
            them are to use one GPU.
    """

    def __init__(self, config: ParallelConfig, device: str | None = None) -> None:
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.kind = config.kind
        kind, one, _ = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
        if one:
            raise LearnError(
                f"model.device is {device}, for {self.count} processes: write {kind}; each takes its "
                "own of them"
            )
        self.device = torch.device("cpu")
        if kind == "cuda":
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            if local >= torch.cuda.device_count():
                raise LearnError(
                    f"process {local + 1} on this machine has no GPU: there are {torch.cuda.device_count()}; "
                    "start one process for each (--nproc-per-node)"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=config.timeout)
        with boundary(LearnError, f"process {self.rank} of {self.count} cannot join the others"):
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=timeout
                )
                atexit.register(_part)
            self._words = dist.new_group(backend="gloo", timeout=timeout)
            self._orders = dist.new_group(backend="gloo", timeout=_FOREVER)
        self.lost = False
        """Whether the processes can no longer work together."""
        self._busy = False

    @property
    def first(self) -> bool:
        """Whether this process has the environments, the engine and the run directory."""
        return self.rank == 0

    # -- words -------------------------------------------------------------------------------------

    def order(self, message: object) -> None:
        """Send what every process has to do; the first one's."""
        if self.lost:
            raise LearnError("the processes of this run have ended: start it again, and it goes on")
        with boundary(LearnError, "what all processes are to do cannot be sent to them"):
            sent = pickle.dumps(message)
        with self._connection():
            dist.broadcast_object_list([sent], 0, group=self._orders)

    def wait(self) -> Any:
        """What the first process sends next, whenever that is."""
        messages: list[Any] = [None]
        with self._connection():
            dist.broadcast_object_list(messages, 0, group=self._orders)
        return pickle.loads(messages[0])

    def gather(self, value: T) -> list[T]:
        """Each process's value, in the order of ranks."""
        return [found for _, found in self._exchange(None, value)]

    def _exchange(self, failure: str | None, value: T) -> list[tuple[str | None, T]]:
        """Each process's value, or why it has none; where these do not go together, it is the end."""
        told: list[Any] = [None] * self.count
        with self._connection():
            dist.all_gather_object(told, (failure, value), group=self._words)
            if len({failure for failure, _ in told}) > 1:
                failures = [f"process {rank}: {text}" for rank, (text, _) in enumerate(told) if text]
                raise LearnError("; ".join(failures))
        return told

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that all processes run; where it does not end alike in all of them, it is an error in each.

        Raises:
            LearnError: Another process failed, or ended.
        """
        error: TurnwiseError | None = None
        self._busy = True
        try:
            yield
        except TurnwiseError as raised:
            error = raised
        except BaseException as raised:
            # In the middle of what the others wait for: they learn of it from the store, and stop waiting.
            reason = f"process {self.rank}: {said(raised)}"
            others = self._reasons()
            self.leave(reason)
            if not isinstance(raised, Exception):
                raise
            raise LearnError("; ".join([*others, reason])) from raised
        if not self.lost:
            with nullcontext() if error is None else suppress(LearnError):
                self._exchange(None if error is None else said(error), None)
        self._busy = False
        if error is not None:
            raise error

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            with boundary(LearnError, "a process of this run has ended, or did not answer in time"):
                yield
        except LearnError as error:
            others = self._reasons()
            self.leave()
            raise LearnError("; ".join([*others, str(error)])) from error

    def _reasons(self) -> list[str]:
        """Why other processes left, as far as they said so."""
        if self.lost or not self.first:
            return []
        store = dist.distributed_c10d._get_default_store()
        keys = [f"turnwise/left/{rank}" for rank in range(self.count)]
        return [store.get(key).decode() for key in keys if store.check([key])]

    def leave(self, reason: str = "") -> None:
        """Close the connections, on which the others wait."""
        if self.lost:
            return
        self.lost = True
        if reason:
            with suppress(RuntimeError):  # The store may be gone with the process that had it.
                dist.distributed_c10d._get_default_store().set(f"turnwise/left/{self.rank}", reason)
        dist.destroy_process_group()

    def close(self) -> None:
        """At the end of the work; the processes may be joined again."""
        if not self.lost:
            dist.destroy_process_group(self._orders)
            dist.destroy_process_group(self._words)

    def dismiss(self, message: object) -> None:
        """Send the last order, where the others listen for one."""
        if self._busy:
            self.leave()
        if not self.lost:
            self.order(message)
            self.close()

    # -- tensors -----------------------------------------------------------------------------------

    def mesh(self) -> Any:
        """All of the processes in one row, to shard a model over."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.count,))

    def copy_from_first(self, model: PolicyModel) -> None:
        """Make weights and buffers those of the first process."""
        with torch.no_grad():
            for tensor in (*model.module.parameters(), *model.module.buffers()):
                if tensor.is_floating_point():
                    dist.broadcast(tensor.data, 0, group=self._group(tensor))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up gradients over the processes; one that no process has stays None."""
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(there, dist.ReduceOp.MAX, group=self._words)
        works = []
        for parameter, any_has_it in zip(parameters, there.tolist(), strict=True):
            if any_has_it:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, group=self._group(parameter), async_op=True))
        for work in works:
            work.wait()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._words if tensor.device.type == "cpu" else None


def _part() -> None:
    """Leave what torch has for all processes, which may be joined more than once until then."""
    if dist.is_initialized():
        dist.destroy_process_group()
