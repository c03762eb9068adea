"""`RunTrainer`: a trainer whose training is a run of the pipeline: begun or gone on with, watched, concluded.

class SFTTrainer(RunTrainer):
    stage = "sft"
    async def pipeline(self, run): await sft(run)
    def given(self, loop, watcher, ranks): return Given(…)
"""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from turnwise.compat.attributes import Rates, Rows
from turnwise.compat.base import BaseTrainer
from turnwise.compat.directory import EVALUATION, TrainerDir
from turnwise.compat.flow import Flow
from turnwise.compat.loop import Loop
from turnwise.compat.metrics import Metrics
from turnwise.compat.translate import Plan
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.learn.ranks import Ranks
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given, Watcher
from turnwise.pipeline.ranks import joined
from turnwise.pipeline.resume import check_unchanged
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import TrajectoryGroup
from turnwise.view.events import Event, Note

log = logging.getLogger(__name__)

_OF_LINE = ("stage", "step", "time", "schema")
"""Of a line of metrics.jsonl, beside the metrics."""


class Book(Protocol):
    """What a trainer notes between two logs."""

    @property
    def train_loss(self) -> float | None:
        """The mean over all updates that were made."""
        ...

    def note(self, metrics: Mapping[str, float | None]) -> None:
        """Take any metrics, of which the line has the means."""
        ...

    def note_update(self, learned: Mapping[str, float] | None, *, seconds: float) -> None:
        """Take an update: its rates where there was nothing to learn from, None where it was refused."""
        ...

    def line(self) -> Metrics:
        """Everything since the last line."""
        ...


class RunTrainer(BaseTrainer):
    """A `BaseTrainer` that trains by a run of the pipeline."""

    stage: ClassVar[str]
    """Of the pipeline: ``rl`` or ``sft``."""
    plan: Plan
    train_dataset: Any
    eval_dataset: Any
    book: Book
    rows_per_update: int
    """What ``train_samples_per_second`` counts."""
    _loop: Loop | None = None
    _run: Run | None = None
    _learner: Learner | None = None
    """The last training's, which has the model."""
    _asked: tuple[Any, ...] = ()
    """Arguments that were planned for."""
    _asked_on: Any = None
    """The data set that was."""
    _told: frozenset[str] = frozenset()
    _began = 0.0
    _started_at = _logged_at = 0

    # -- what a trainer adds ------------------------------------------------------------------------

    @abstractmethod
    async def pipeline(self, run: Run) -> None:
        """Train."""

    @abstractmethod
    def given(self, loop: Loop, watcher: Watcher, ranks: Ranks | None) -> Given:
        """What the run is given."""

    @abstractmethod
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float | None]:
        """Evaluate the weights as they are."""

    @abstractmethod
    def plan_anew(self) -> None:
        """Plan for the arguments and the data set as they are now."""

    # -- the plan -----------------------------------------------------------------------------------

    def planned(self) -> None:
        """A plan was made: say what there is to say of it, once.

        Raises:
            RecipeError: Evaluations are asked for, and there is nothing to evaluate on.
        """
        args = self.args
        if args.eval_strategy != "no" and self.eval_dataset is None:
            when = getattr(args.eval_strategy, "value", args.eval_strategy)
            raise RecipeError(f"eval_strategy is {when!r} and there is no eval_dataset")
        notes = (*self.plan.notes, *self._late())
        for note in notes:
            if note not in self._told:
                log.warning(note)
        self._told |= set(notes)
        self._asked, self._asked_on = self._asking(), self.train_dataset

    def _late(self) -> list[str]:
        """What is said where evaluations or checkpoints fall between two updates of a generation batch."""
        updates, state = self.plan.updates_per_step, self._new_state(self.plan.max_steps)
        strategies = {"eval_steps": self.args.eval_strategy, "save_steps": self.args.save_strategy}
        late = [
            f"{name}={getattr(state, name)}"
            for name, strategy in strategies.items()
            if strategy == "steps" and getattr(state, name) % updates
        ]
        if not late:
            return []
        return [
            f"{' and '.join(late)}: a generation batch makes {updates} updates, and what falls between them "
            "takes place after the last of them"
        ]

    def _asking(self) -> tuple[Any, ...]:
        # By their texts: a dict may have been changed in place.
        settings = [repr(getattr(self.args, field.name)) for field in dataclasses.fields(self.args)]
        return (*settings, self.eval_dataset is None)

    # -- training -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. Works inside of a running event loop; callbacks are called on this thread.

        Of several processes the first one plays, logs and writes, and its callbacks alone see events; the
        others learn along, and have the model and the state at the end.

        Args:
            resume_from_checkpoint: True to go on with the run in ``output_dir``, or the path of one of its
                checkpoints; otherwise a run begins, and one that is there already is set aside.
            trial: Not taken.
            ignore_keys_for_eval: Not taken.

        Raises:
            RecipeError: There is nothing to go on with, or arguments that are not taken.
            KeyboardInterrupt: Ctrl-C; what was finished is on disk, for ``resume_from_checkpoint=True``.
            TurnwiseError: What went wrong; everything finished is on disk.
        """
        if trial is not None or ignore_keys_for_eval is not None:
            raise RecipeError("train: trial and ignore_keys_for_eval are of other trainers; leave them out")
        # Scripts set args and train_dataset on a trainer.
        if self._asking() != self._asked or self.train_dataset is not self._asked_on:
            self.plan_anew()
        recipe = self.plan.recipe
        with joined(recipe.parallel, recipe.model.device, module=self.model) as ranks:
            output = self._train(resume_from_checkpoint, ranks) if self.accelerator.is_main_process else None
        # The other processes have followed the learner; what there is to know of it they are told now.
        self.state, output = self.accelerator.by_the_first(lambda: (self.state, output))
        assert output is not None
        return output

    def _train(self, resume_from_checkpoint: str | bool | None, ranks: Ranks | None) -> TrainOutput:
        self.uploads.finish()  # Checkpoints may be set aside.
        directory = self.directory()
        with directory.lock():
            if resume_from_checkpoint in (None, False):
                directory.set_aside()
                self.state = self._new_state(self.plan.max_steps)
            else:
                assert resume_from_checkpoint is not None
                checkpoint = directory.resume(resume_from_checkpoint)
                found = None if checkpoint is None else checkpoint.path
                (directory.path / "done" / f"{self.stage}.json").unlink(missing_ok=True)
                self.state = (
                    self._new_state(self.plan.max_steps)
                    if found is None
                    else self._restored_state(found, self.plan.max_steps)
                )
            check_unchanged(directory, self.plan.recipe, allowed=True)
            self.before_training()
            self._started_at = self._logged_at = self.state.global_step
            self.is_in_train = True
            try:
                with Loop() as loop:
                    flow = Flow(self, loop)
                    self._loop, self._run = loop, self.new_run(directory, loop, flow, ranks)
                    loop.run(self.pipeline(self._run))
                    flow.finish()
                    return self._conclude()
            except KeyboardInterrupt:
                log.warning("interrupted: train(resume_from_checkpoint=True) goes on from here")
                raise
            finally:
                self.is_in_train, self._loop, self._run = False, None, None
                self.after_training()

    def before_training(self) -> None:
        """The state is there, and nothing has begun."""

    def after_training(self) -> None:
        """It has ended, well or not."""

    def directory(self) -> TrainerDir:
        """``output_dir``."""
        return TrainerDir(self.args.output_dir, self.stage, lambda: self.state.global_step)

    def new_run(self, directory: TrainerDir, loop: Loop, watcher: Watcher, ranks: Ranks | None = None) -> Run:
        """A run of the plan's recipe."""
        return Run(self.plan.recipe, directory, tell, self.given(loop, watcher, ranks))

    def _conclude(self) -> TrainOutput:
        """What `train` ends with: the last log, the best model where it is wanted, the output."""
        made = self.state.global_step - self._started_at
        metrics: dict[str, float | None] = speed_metrics(
            "train", self._began, num_samples=made * self.rows_per_update, num_steps=made
        )
        metrics |= {"total_flos": self.state.total_flos, "train_loss": self.book.train_loss}
        self.log({**metrics, **self.rest_of_log()})
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            assert self._learner is not None
            self._learner.load(best)
        self.uploads.finish()
        self._drop_surplus()
        self.fire("on_train_end")
        return TrainOutput(self.state.global_step, self.book.train_loss, metrics)

    # -- what `Flow` calls --------------------------------------------------------------------------

    def engine_is_open(self, policy: ModelPolicy) -> None:
        """From here on it plays."""

    def step_begins(self, step: int) -> None:
        """One of the pipeline's steps, counted from 1, is about to be played."""

    def rest_of_log(self) -> Metrics:
        """What the last line has beside what it always has."""
        return {}

    def take_episodes(self, groups: Sequence[TrajectoryGroup]) -> None:
        """What the next updates learn from was played."""

    def training_begins(self, learner: Learner) -> None:
        """The learner is ready: callbacks see its optimizer from here on."""
        self._learner, self._began = learner, time.time()
        self.callback_handler.optimizer = learner.optimizer
        self.callback_handler.lr_scheduler = Rates(learner.optimizer)
        self.callback_handler.train_dataloader = self.rows_of_a_pass()
        self.fire("on_train_begin")

    def rows_of_a_pass(self) -> Rows:
        """What callbacks see as ``train_dataloader``."""
        steps = round(1 / self.plan.epoch_of(1))
        micro = steps * self.plan.updates_per_step * self.args.gradient_accumulation_steps
        return Rows(self.train_dataset, batch_size=self.args.train_batch_size, batches=micro)

    def log_training(self) -> None:
        """Log what there is since the last time."""
        if self.state.global_step > self._logged_at:
            self._logged_at = self.state.global_step
            self.log(self.book.line(), self._began)

    def evaluate_in_training(self, step: int, *, redone: bool) -> None:
        """Evaluate after one of the pipeline's steps, or take what it came to when that was made before."""
        assert self._run is not None
        directory = self._run.directory
        told = [line for line in directory.read_metrics(EVALUATION) if redone and line["step"] == step]
        if told:
            metrics = {name: value for name, value in told[0].items() if name not in _OF_LINE}
            self.log(dict(metrics))
            self.fire("on_evaluate", metrics=metrics)
        else:
            metrics = self.evaluate()
            directory.metrics(EVALUATION, step, metrics)
        self.control.should_evaluate = False
        if self._is_best(metrics) and self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = True

    def checkpoint_written(self, path: Path) -> None:
        """Upload it where that is asked for, drop those that are too many, and tell."""
        if self.args.push_to_hub and self.uploads.saved(path, self.state):
            self.fire("on_push_begin")
        self._drop_surplus()
        self.fire("on_save")

    def _drop_surplus(self) -> None:
        assert self._run is not None
        limit, there = self.args.save_total_limit, self._run.directory.checkpoints(self.stage)
        if not limit or limit < 0 or not there:
            return
        best, uploading = self.state.best_model_checkpoint, self.uploads.path
        kept = {there[-1].path, Path(best)} if best else {there[-1].path}
        others = [one for one in there if one.path not in kept]
        room = max(0, limit - len(kept))
        for one in others[: len(others) - room]:
            if one.path != uploading:  # Which the next save drops, or the end.
                self._run.directory.drop(one)


def tell(event: Event) -> None:
    """What the pipeline has to say goes where a library's messages go."""
    if isinstance(event, Note):
        log.log(logging.INFO if event.level == "info" else logging.WARNING, event.text)
