"""`OnlineTrainer`: what `GRPOTrainer` and `RLOOTrainer` are. Arguments become a recipe and live objects, and
`turnwise.pipeline.rl` trains; nothing is learned here.

    trainer = GRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=accuracy, args=config, train_dataset=rows)
    trainer.train()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from turnwise.compat import rows as data
from turnwise.compat.base import BaseTrainer
from turnwise.compat.completions import show_completions
from turnwise.compat.directory import EVALUATION, TrainerDir
from turnwise.compat.environments import PLACEHOLDER, environments, rows_by_environment
from turnwise.compat.evaluation import orders_of, play_rows
from turnwise.compat.flow import Flow
from turnwise.compat.logbook import Logbook
from turnwise.compat.loop import Loop
from turnwise.compat.models import keep_starting_adapters, load_policy, load_processing, name_of
from turnwise.compat.rewards import Board, reward_functions
from turnwise.compat.rollout_func import Rollouts, player
from turnwise.compat.translate import Plan, rl_recipe
from turnwise.config import EnvConfig, RlConfig
from turnwise.errors import RecipeError
from turnwise.learn.learner import Learner
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given, Watcher
from turnwise.pipeline.resume import check_unchanged
from turnwise.pipeline.rl import STAGE, rl
from turnwise.rollout.group import play_group
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import Task, TrajectoryGroup
from turnwise.view.events import Event, Note

log = logging.getLogger(__name__)


class OnlineTrainer(BaseTrainer):
    """Plays, rewards and learns; see `turnwise.compat.grpo.GRPOTrainer` for the arguments."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        reward_processing_classes: Any,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
        quantization_config: Any,
        peft_config: Any,
        tools: Sequence[Callable[..., Any]] | None,
        rollout_func: Callable[..., Any] | None,
        environment_factory: Any,
    ) -> None:
        set_seed(args.seed)
        live = load_policy(
            model,
            init_kwargs=args.model_init_kwargs,
            trust_remote_code=args.trust_remote_code,
            quantization_config=quantization_config,
            peft_config=peft_config,
            seed=args.seed,
        )
        processing = load_processing(
            live,
            processing_class,
            trust_remote_code=args.trust_remote_code,
            revision=(args.model_init_kwargs or {}).get("revision"),
        )
        if args.beta > 0 and peft_config is None and hasattr(live, "peft_config"):
            keep_starting_adapters(live)
        super().__init__(live, args, processing, callbacks, optimizers)
        self.train_dataset = None if train_dataset is None else data.split_of(train_dataset, "train")
        self.eval_dataset = eval_dataset
        if args.eval_strategy != "no" and eval_dataset is None:
            raise RecipeError(f"eval_strategy is {args.eval_strategy.value!r} and there is no eval_dataset")
        self.tools, self.rollout_func = list(tools or ()), rollout_func
        self.board = Board()
        self.board.trainer_state = self.state
        self.policy: ModelPolicy | None = None
        """With the engine while training lasts; None before and after."""
        self._routed = isinstance(environment_factory, Mapping)
        self._specs = environments(environment_factory, tools, rollout_func=rollout_func)
        self.plan: Plan = rl_recipe(
            args,
            model_name=name_of(live),
            environments={name: EnvConfig() for name in self._specs},
            rows=self._rows_known(),
            processes=self.accelerator.num_processes,
        )
        config = self.plan.recipe.rl
        assert config is not None
        self.config: RlConfig = config
        self._train_rows = self._load_rows()
        self._functions = reward_functions(
            reward_funcs,
            weights=args.reward_weights,
            board=self.board,
            processing=processing,
            form=self._form(environment_factory),
            environments=environment_factory is not None,
            routed=self._routed,
            reward_processing=reward_processing_classes,
            template_kwargs=args.chat_template_kwargs,
        )
        self.book = Logbook(config)
        self._loop: Loop | None = None
        self._run: Run | None = None
        self._learner: Learner | None = None
        self._began = 0.0
        self._started_at = self._logged_at = self._evaluations = 0
        for note in self.plan.notes:
            log.warning(note)
        self.fire("on_init_end")

    # -- what is played -----------------------------------------------------------------------------

    def _rows_known(self) -> int | None:
        return None if self.train_dataset is None else data.rows_known(self.train_dataset)

    def _load_rows(self) -> dict[str, list[Task]]:
        """The training rows by environment."""
        if self.train_dataset is None:
            if self._routed:
                raise RecipeError(
                    "train_dataset is needed where environments are given by name: its 'environment' column "
                    "says who plays a row"
                )
            return {name: [dict(PLACEHOLDER)] for name in self._specs}
        limit = None
        dataset = self.train_dataset
        if self._rows_known() is None:
            limit = self.plan.steps * self.plan.prompts_per_step
            if self.args.shuffle_dataset and hasattr(dataset, "shuffle"):
                dataset = dataset.shuffle(seed=self.args.seed)
        return self._by_environment(dataset, "train_dataset", limit)

    def _by_environment(self, dataset: Any, what: str, limit: int | None = None) -> dict[str, list[Task]]:
        tasks = data.tasks_of(
            dataset, what, limit=limit, prompt_only=bool(self.args.remove_unused_columns), image=None
        )
        return rows_by_environment(tasks, self._specs, routed=self._routed)

    def _form(self, environment_factory: Any) -> Any:
        """What completions look like to reward functions."""
        if self.rollout_func is not None:
            return "rollout"
        prompts = [row.get("prompt") for rows in self._train_rows.values() for row in rows[:1]]
        plain = (
            environment_factory is None and not self.tools and all(isinstance(one, str) for one in prompts)
        )
        return "text" if plain else "chat"

    def _given(self, loop: Loop, watcher: Watcher) -> Given:
        shuffle = bool(self.args.shuffle_dataset) and self._rows_known() is not None
        return Given(
            model=self.model,
            processing=self.processing_class,
            environments=self._specs,
            functions=dict.fromkeys(self._specs, self._functions),
            tasks={"train": self._train_rows},
            order=data.PromptOrder(self.config.groups, shuffle=shuffle, seed=self.args.seed),
            player=None if self.rollout_func is None else player(self.rollout_func, self, call=loop.here),
            watcher=watcher,
            kept_checkpoints=None,
            export=False,
        )

    # -- training -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. Works inside of a running event loop; callbacks are called on this thread.

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
        directory = self._directory()
        with directory.lock():
            if resume_from_checkpoint in (None, False):
                directory.set_aside()
                self.state = self._new_state(self.plan.max_steps)
            else:
                checkpoint = directory.resume(resume_from_checkpoint)
                found = None if checkpoint is None else checkpoint.path
                (directory.path / "done" / f"{STAGE}.json").unlink(missing_ok=True)
                self.state = (
                    self._new_state(self.plan.max_steps)
                    if found is None
                    else self._restored_state(found, self.plan.max_steps)
                )
            check_unchanged(directory, self.plan.recipe, allowed=True)
            self.board.trainer_state = self.state
            self._started_at = self._logged_at = self.state.global_step
            self.is_in_train = True
            try:
                with Loop() as loop:
                    flow = Flow(self, loop)
                    self._loop, self._run = loop, self._new_run(directory, loop, flow)
                    loop.run(rl(self._run))
                    flow.finish()
                    return self._conclude()
            except KeyboardInterrupt:
                log.warning("interrupted: train(resume_from_checkpoint=True) goes on from here")
                raise
            finally:
                self.is_in_train, self._loop, self._run, self.policy = False, None, None, None

    def _directory(self) -> TrainerDir:
        return TrainerDir(self.args.output_dir, STAGE, lambda: self.state.global_step)

    def _new_run(self, directory: TrainerDir, loop: Loop, watcher: Watcher) -> Run:
        return Run(self.plan.recipe, directory, _tell, self._given(loop, watcher))

    def _conclude(self) -> TrainOutput:
        """What `train` ends with: the last log, the best model where it is wanted, the output."""
        made = self.state.global_step - self._started_at
        metrics: dict[str, float | None] = speed_metrics(
            "train",
            self._began,
            num_samples=made * self.args.generation_batch_size // self.plan.updates_per_step,
            num_steps=made,
        )
        metrics["train_loss"] = self.book.train_loss
        self.log(metrics)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            assert self._learner is not None
            self._learner.load(best)
        self.fire("on_train_end")
        return TrainOutput(self.state.global_step, self.book.train_loss, metrics)

    # -- what `Flow` calls --------------------------------------------------------------------------

    def training_begins(self, learner: Learner) -> None:
        """The learner is ready: callbacks see its optimizer from here on."""
        self._learner, self._began = learner, time.time()
        self.callback_handler.optimizer = learner.optimizer
        self.fire("on_train_begin")

    def log_training(self) -> None:
        """Log what there is since the last time."""
        if self.state.global_step <= self._logged_at:
            return
        self._logged_at = self.state.global_step
        self.log(self.book.line(), self._began)
        if self.args.log_completions and self.book.played:
            show_completions(self, self.book.played)
            self.book.played = ()

    def evaluate_in_training(self, step: int, *, redone: bool) -> None:
        """Evaluate after one of the pipeline's steps, or take what it came to when that was made before."""
        assert self._run is not None
        directory = self._run.directory
        told = {line["step"]: line for line in directory.read_metrics(EVALUATION)} if redone else {}
        if redone:
            metrics = {name: value for name, value in told.get(step, {}).items() if name not in _OF_LINE}
            if metrics:
                self.log(dict(metrics))
                self.fire("on_evaluate", metrics=metrics)
        else:
            metrics = self.evaluate()
            directory.metrics(EVALUATION, step, metrics)
        self.control.should_evaluate = False
        if self._is_best(metrics) and self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = True

    def checkpoint_written(self, path: Path) -> None:
        """Drop those that are too many, and tell."""
        assert self._run is not None
        if self.args.save_total_limit is not None and self.args.save_total_limit > 0:
            best = self.state.best_model_checkpoint
            kept = {path, Path(best)} if best else {path}
            others = [one for one in self._run.directory.checkpoints(STAGE) if one.path not in kept]
            room = max(0, self.args.save_total_limit - len(kept))
            for one in others[: len(others) - room]:
                self._run.directory.drop(one)
        self.fire("on_save")

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float | None]:
        """Play rows in the weights as they are, ``num_generations_eval`` episodes of each, and log them.

        Args:
            eval_dataset: In place of the trainer's; of several by name each has its own metrics.
            ignore_keys: Not taken.
            metric_key_prefix: Of the metrics' names.

        Returns:
            Metrics by name; None where one applied to nothing.

        Raises:
            RecipeError: There is no data set.
        """
        if ignore_keys is not None:
            raise RecipeError("evaluate: ignore_keys is of other trainers; leave it out")
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise RecipeError("evaluate: there is no eval_dataset; give one here or to the trainer")
        if isinstance(dataset, Mapping) and not data.is_columns(dataset):
            metrics: dict[str, float | None] = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        rows, began = self._by_environment(dataset, "eval_dataset"), time.time()
        groups = self._play(rows)
        found: dict[str, float | None] = {
            "num_tokens": float(self.state.num_input_tokens_seen),
            **self.book.of_episodes(groups),
            **self.board.take_metrics(),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        played = sum(len(group.trajectories) for group in groups)
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=played, num_steps=len(groups))
        self.log(dict(metrics))
        self.fire("on_evaluate", metrics=metrics)
        return metrics

    def _play(self, rows: Mapping[str, Sequence[Task]]) -> list[TrajectoryGroup]:
        """On the live engine while training; otherwise on one of its own."""
        if self._loop is not None and self._run is not None:
            if self.policy is None:
                raise RecipeError("evaluate: the engine is not there yet; use eval_on_start=True")
            return self._loop.run(self._played(self._run, self.policy, rows, self._loop))
        directory = self._directory()
        with directory.lock(), Loop() as loop:
            run = self._new_run(directory, loop, Watcher())

            async def alone() -> list[TrajectoryGroup]:
                model = run.model_before(STAGE)
                async with run.engine(model) as engine:
                    policy = ModelPolicy(engine, run.renderer(model))
                    return await self._played(run, policy, rows, loop)

            return loop.run(alone())

    async def _played(
        self, run: Run, policy: ModelPolicy, rows: Mapping[str, Sequence[Task]], loop: Loop
    ) -> list[TrajectoryGroup]:
        known = [int(one.split("/")[1]) for one in run.directory.ids(EVALUATION)]
        self._evaluations = 1 + max([self._evaluations, *known])
        size = self.args.num_generations_eval or self.args.num_generations
        orders = orders_of(run, rows, number=self._evaluations, size=size)
        self.callback_handler.eval_dataloader = orders
        play = play_group
        if self.rollout_func is not None:
            play = Rollouts(self.rollout_func, self, policy, call=loop.here).play
        ended = partial(loop.here, self.fire, "on_prediction_step")
        return await play_rows(run, policy, orders, play=play, ended=ended)


_OF_LINE = ("stage", "step", "time", "schema")
"""Of a line of metrics.jsonl, beside the metrics."""


def _tell(event: Event) -> None:
    """What the pipeline has to say goes where a library's messages go."""
    if isinstance(event, Note):
        log.log(logging.INFO if event.level == "info" else logging.WARNING, event.text)
