"""`Flow`: the pipeline's steps as the events of a transformers Trainer, in the order in which that has them.

    one step of the pipeline                 one generation batch of TRL, updates_per_step optimizer steps
    step_began                               (on_epoch_begin) on_step_begin
      played                                   what episodes were like goes into the next log
      moving, updated                          on_pre_optimizer_step, on_optimizer_step
                                               on_step_end, (on_log), on_step_begin       between two updates
    step_ended                               on_step_end, (on_log), (on_evaluate)
    saved                                    on_save, (on_epoch_end …)

Evaluations and checkpoints that fall between two updates of a step take place at its end, when the engine has
the weights and a resumed run could go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.compat.metrics import OWN
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.pipeline.given import StepEnd, Watcher, Wish
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import TrajectoryGroup

if TYPE_CHECKING:
    from turnwise.compat.loop import Loop
    from turnwise.compat.training import RunTrainer


class Flow(Watcher):
    """Drives a trainer's callbacks while its run goes on. Callbacks are called where `Loop.run` waits.

    Args:
        trainer: Whose state, callbacks and logs.
        loop: On which the run goes on.
    """

    def __init__(self, trainer: RunTrainer, loop: Loop) -> None:
        self._trainer, self._loop = trainer, loop
        self._step = 0
        """Of the pipeline; the one that goes on, or was the last."""
        self._updates = 0
        """Of this step."""
        self._in_update = self._in_epoch = False
        self._began = 0.0
        self._ended: StepEnd | None = None
        self._owed = {"should_evaluate": False, "should_save": False}
        """Wished for between two updates."""

    # -- what the pipeline calls, on its loop and on the learner's thread -------------------------------

    async def opened(self, learner: Learner, done: int) -> None:
        """As of `Watcher`."""
        self._step = done
        await self._loop.here(self._trainer.training_begins, learner)

    async def playing(self, policy: ModelPolicy) -> None:
        """As of `Watcher`."""
        self._trainer.engine_is_open(policy)
        if self._trainer.args.eval_on_start and not self._step:
            await self._loop.here(self._trainer.evaluate)

    async def step_began(self, step: int) -> None:
        """As of `Watcher`."""
        self._step, self._updates = step, 0
        await self._loop.here(self._trainer.step_begins, step)
        await self._loop.here(self._begin_update)

    async def played(self, groups: Sequence[TrajectoryGroup]) -> None:
        """As of `Watcher`."""
        await self._loop.here(self._trainer.take_episodes, groups)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """As of `Watcher`."""
        self._loop.call(self._trainer.fire, "on_pre_optimizer_step")
        yield
        self._loop.call(self._trainer.fire, "on_optimizer_step")

    def updated(self, metrics: Mapping[str, float] | None) -> bool:
        """As of `Watcher`."""
        return self._loop.call(self._update, metrics)

    async def step_ended(self, end: StepEnd) -> Wish:
        """As of `Watcher`."""
        return await self._loop.here(self._end_step, end)

    async def saved(self, step: int, path: Path) -> bool:
        """As of `Watcher`."""
        return await self._loop.here(self._written, path)

    # -- on the trainer's thread ------------------------------------------------------------------------

    def finish(self) -> None:
        """Close an epoch that the run's end has cut."""
        if self._in_epoch:
            self._end_epoch()

    def _begin_update(self) -> None:
        if not self._in_epoch:
            self._in_epoch = True
            self._trainer.fire("on_epoch_begin")
        self._trainer.fire("on_step_begin")
        self._in_update, self._began = True, time.perf_counter()

    def _update(self, metrics: Mapping[str, float] | None) -> bool:
        """One update is made; returns whether the step goes on."""
        trainer, plan = self._trainer, self._trainer.plan
        self._updates += 1
        trainer.book.note_update(metrics, seconds=time.perf_counter() - self._began)
        trainer.state.global_step += 1
        done, share = plan.epoch_of(self._step - 1), self._updates / plan.updates_per_step
        trainer.state.epoch = done + share * (plan.epoch_of(self._step) - done)
        if self._updates == plan.updates_per_step:
            return False  # `_end_step` has the rest of it, when the engine has the weights.
        self._end_update()
        self._log_if_due()
        for flag in self._owed:
            self._owed[flag] |= getattr(trainer.control, flag)
        if trainer.control.should_training_stop:
            return False
        self._begin_update()
        return True

    def _end_update(self) -> None:
        self._in_update = False
        self._trainer.fire("on_step_end")

    def _end_step(self, end: StepEnd) -> Wish:
        trainer, self._ended = self._trainer, end
        beside = {name: value for name, value in end.metrics.items() if name not in OWN}
        trainer.beside.update(beside)
        trainer.book.note(beside)
        rl = trainer.plan.recipe.rl
        if rl is not None and rl.kl > 0 and rl.kl_in == "reward":  # Of the whole step; no update has one.
            trainer.book.note({"kl": end.metrics.get("kl_reference")})
        if self._in_update:
            self._end_update()
        for flag, owed in self._owed.items():
            setattr(trainer.control, flag, owed or getattr(trainer.control, flag))
            self._owed[flag] = False
        # What is saved is saved before the epoch ends; what the epoch's end wants saved, after it.
        save = self._log_and_evaluate(end) or self._end_epoch_if_over(end)
        return Wish(
            save=save,
            files=trainer.checkpoint_files() if save else {},
            stop=trainer.control.should_training_stop,
        )

    def _written(self, path: Path) -> bool:
        """A checkpoint is; returns whether the run goes on."""
        self._trainer.checkpoint_written(path)
        if self._ended is not None and self._end_epoch_if_over(self._ended):
            self._trainer.fire("on_save")  # It is there already, of these weights.
        return not self._trainer.control.should_training_stop

    def _end_epoch_if_over(self, end: StepEnd) -> bool:
        """End an epoch, once; returns whether a checkpoint is wanted then."""
        trainer, plan = self._trainer, self._trainer.plan
        last = trainer.control.should_training_stop or trainer.state.global_step >= plan.max_steps
        over = last or int(plan.epoch_of(self._step)) > int(plan.epoch_of(self._step - 1))
        if trainer.control.should_epoch_stop and not last:
            raise RecipeError(
                "a callback has set should_epoch_stop, and a run goes through its data set without a break "
                "between epochs; set should_training_stop to end it"
            )
        if not (over and self._in_epoch):
            return False
        self._end_epoch()
        return self._log_and_evaluate(end)

    def _end_epoch(self) -> None:
        self._in_epoch = False
        self._trainer.fire("on_epoch_end")

    def _log_and_evaluate(self, end: StepEnd) -> bool:
        """What callbacks have asked for; returns whether they want a checkpoint too."""
        control = self._trainer.control
        self._log_if_due()
        if control.should_evaluate:
            self._trainer.evaluate_in_training(end.step, redone=end.redone)
        save, control.should_save = bool(control.should_save), False
        return save

    def _log_if_due(self) -> None:
        if self._trainer.control.should_log:
            self._trainer.log_training()
