"""`OnlineTrainer`: what `GRPOTrainer` and `RLOOTrainer` are. Arguments become a recipe and live objects, and
`turnwise.pipeline.rl` trains; nothing is learned here.

    trainer = GRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=accuracy, args=config, train_dataset=rows)
    trainer.train()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import speed_metrics

from turnwise.compat import rows as data
from turnwise.compat.attributes import Environments, OnlineAttributes
from turnwise.compat.best import by_reward, check_played
from turnwise.compat.completions import show_completions
from turnwise.compat.environments import PLACEHOLDER, environments, need_a_reward, placed, rows_by_environment
from turnwise.compat.evaluation import orders_of, play_rows
from turnwise.compat.guarded import Guarded
from turnwise.compat.internals import need_config
from turnwise.compat.logbook import Logbook
from turnwise.compat.loop import Loop
from turnwise.compat.metrics import Metrics, tokens_of
from turnwise.compat.models import image_of, keep_starting_adapters, load_policy, load_processing, name_of
from turnwise.compat.rewards import Board, Form, TrlContract, form_of, in_turn, need_columns, reward_functions
from turnwise.compat.rollout_func import Rollouts, check_signature, player
from turnwise.compat.stream import Stream, StreamRows
from turnwise.compat.training import RunTrainer
from turnwise.compat.translate import Plan, rl_recipe
from turnwise.config import EnvConfig, RlConfig
from turnwise.errors import RecipeError, TooManyFailuresError
from turnwise.learn.ranks import Ranks
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given, Watcher
from turnwise.pipeline.rl import STAGE, rl
from turnwise.rollout.group import PlayGroup
from turnwise.rollout.player import Player
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.scheduler import Scheduler
from turnwise.types import FloatArray, Sample, Task, TrajectoryGroup

log = logging.getLogger(__name__)


class OnlineTrainer(OnlineAttributes, RunTrainer):
    """Plays, rewards and learns; see `turnwise.compat.grpo.GRPOTrainer` for the arguments."""

    stage = STAGE
    config_name: ClassVar[str]
    """Of the class of its arguments."""
    book: Logbook
    _stream: Stream
    _streamed: Any = None
    """The data set that it reads."""

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
        need_config(self, args, self.config_name)
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
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        by_reward(args)
        self.tools, self.rollout_func = list(tools or ()), rollout_func
        self.board = Board()
        self.board.trainer_state = self.state
        self.policy: ModelPolicy | None = None
        """With the engine while training lasts; None before and after."""
        self._routed = isinstance(environment_factory, Mapping)
        self._specs = environments(environment_factory, tools, rollout_func=rollout_func)
        if rollout_func is not None:
            check_signature(rollout_func)
        self._prompted = environment_factory is None
        """A row's prompt is all that there is to begin with."""
        self._plays = environment_factory is not None or bool(tools)
        form = self.prepare()
        self.given_rewards = [] if reward_funcs is None else reward_funcs
        if not isinstance(self.given_rewards, list | tuple):
            self.given_rewards = [reward_funcs]
        self.functions = reward_functions(
            reward_funcs,
            weights=args.reward_weights,
            board=self.board,
            processing=processing,
            form=form,
            environments=environment_factory is not None,
            routed=self._routed,
            reward_processing=reward_processing_classes,
            model_kwargs=args.model_init_kwargs,
            template_kwargs=args.chat_template_kwargs,
        )
        need_a_reward(self._specs, self.functions)
        need_columns(self.functions, self._train_rows)
        check_played(args, self.functions, scores=self._plays, datasets=eval_dataset)
        self.fire("on_init_end")

    @property
    def environments(self) -> Environments:
        """By name; live instances are opened and closed by whoever plays, and shown to reward functions."""
        return Environments(self._specs)

    # -- what is played -----------------------------------------------------------------------------

    def plan_anew(self) -> None:
        """As of `RunTrainer`; reward functions are those that were handed over, weighed as ``args`` says."""
        form, weights = self.prepare(), self.args.reward_weights or [1.0] * len(self.functions)
        if len(weights) != len(self.functions):
            raise RecipeError(f"reward_weights: {len(weights)} for {len(self.functions)} reward functions")
        made = []
        for one, weight in zip(self.functions, weights, strict=True):
            assert isinstance(one.contract, TrlContract)
            made.append(replace(one, weight=float(weight), contract=replace(one.contract, form=form)))
        self.functions = tuple(made)
        need_columns(self.functions, self._train_rows)
        check_played(self.args, self.functions, scores=self._plays, datasets=self.eval_dataset)

    def prepare(self) -> Form:
        """Plan, from the arguments and rows as they are; returns what completions will look like."""
        if self.train_dataset is not None:
            self.train_dataset = data.split_of(self.train_dataset, "train")
        self.plan, self._train_rows = self._planned(name_of(self.model))
        form: Form = "rollout" if self.rollout_func else form_of(self._train_rows, plays=self._plays)
        if form == "text":
            self.plan = self.plan.of_plain_text()
        config = self.plan.recipe.rl
        assert config is not None
        self.config: RlConfig = config
        self.book = Logbook(config)
        self.rows_per_update = self.plan.prompts_per_step * config.group_size // self.plan.updates_per_step
        self.planned()
        return form

    def _planned(self, name: str) -> tuple[Plan, Mapping[str, Sequence[Task]]]:
        """The plan, and the rows by environment; those of a stream are read as steps need them."""
        dataset: Any = self.train_dataset
        rows: Mapping[str, Sequence[Task]] | None = None
        if dataset is None:
            if self._prompted:
                raise RecipeError(
                    "train_dataset is needed: without an environment_factory, whose reset can return one, "
                    "prompts are its column 'prompt'"
                )
            if self._routed:
                raise RecipeError(
                    "train_dataset is needed where environments are given by name: its 'environment' column "
                    "says who plays a row"
                )
            rows = {env: [dict(PLACEHOLDER)] for env in self._specs}
        elif not data.is_stream(dataset):
            rows = self._by_environment(dataset, "train_dataset")
        plan = rl_recipe(
            self.args,
            model_name=name,
            environments={env: EnvConfig() for env in self._specs},
            rows=None if dataset is None or rows is None else {env: len(own) for env, own in rows.items()},
            processes=self.accelerator.num_processes,
            context=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        if rows is None:
            if self.args.shuffle_dataset and hasattr(dataset, "shuffle"):
                dataset = dataset.shuffle(seed=self.args.seed)
            if self._streamed is not self.train_dataset:  # What was read is kept when it is planned anew.
                self._streamed = self.train_dataset
                self._stream = Stream(data.rows_of(dataset, "train_dataset"), self._placed, self._specs)
            self._stream.limit = plan.steps * plan.prompts_per_step
            rows = {env: self._stream.of(env) for env in self._specs}
        return plan, rows

    def _by_environment(self, dataset: Any, what: str) -> dict[str, list[Task]]:
        tasks = (self._task(row, what, number) for number, row in enumerate(data.rows_of(dataset, what)))
        return rows_by_environment(tasks, self._specs, routed=self._routed)

    def _placed(self, row: Any, number: int) -> tuple[str, Task]:
        task = self._task(row, "train_dataset", number)
        return placed(task, number, self._specs, routed=self._routed)

    def _task(self, row: Any, what: str, number: int) -> Task:
        only, image = bool(self.args.remove_unused_columns), image_of(self.processing_class)
        task = data.task_of(row, what, number, prompt_only=only, image=image)
        if self.rollout_func is None:
            data.check_prompt(task, what, number)
        if self._prompted:
            data.need_prompt(task, what, number)
        return task

    def step_begins(self, step: int) -> None:
        """As of `RunTrainer`: rows of this step and the next are read here, where the data set was made."""
        for env, count in self.config.groups.items():
            rows = self._train_rows[env]
            if isinstance(rows, StreamRows):
                rows.prepare((step + 1) * count)

    def given(self, loop: Loop, watcher: Watcher, ranks: Ranks | None) -> Given:
        """As of `RunTrainer`."""
        shuffle = bool(self.args.shuffle_dataset) and not data.is_stream(self.train_dataset)
        return Given(
            model=self.model,
            processing=self.processing_class,
            environments=self._specs,
            functions=dict.fromkeys(self._specs, in_turn(self.functions, loop.here)),
            tasks={"train": self._train_rows},
            order=data.PromptOrder(self.config.groups, shuffle=shuffle, seed=self.args.seed),
            player=self._player(loop),
            watcher=watcher,
            updates=self.plan.max_steps,
            kept_checkpoints=None,
            export=False,
            ranks=ranks,
        )

    def _player(self, loop: Loop) -> Callable[..., Player]:
        if self.rollout_func is None:
            return partial(Scheduler, play=Guarded())
        return player(self.rollout_func, self, call=loop.here, score=self._logprobs)

    def _logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        assert self._learner is not None, "rollouts are scored while training lasts"
        return self._learner.logprobs(samples)

    async def pipeline(self, run: Run) -> None:
        """As of `RunTrainer`."""
        try:
            await rl(run)
        except TooManyFailuresError as error:
            error.add_note("A trainer stops where more than half of what it plays fails, or all for a while.")
            raise

    def before_training(self) -> None:
        """As of `RunTrainer`."""
        self.board.trainer_state = self.state

    def after_training(self) -> None:
        """As of `RunTrainer`."""
        self.policy = None

    def engine_is_open(self, policy: ModelPolicy) -> None:
        """As of `RunTrainer`."""
        self.policy = policy

    def take_episodes(self, groups: Sequence[TrajectoryGroup]) -> None:
        """As of `RunTrainer`."""
        self.state.num_input_tokens_seen += tokens_of(groups)
        self.book.note_episodes(groups, seen=self.state.num_input_tokens_seen)
        self.book.note(self.board.take_metrics())

    def rest_of_log(self) -> Metrics:
        """As of `RunTrainer`: what came after the last log."""
        return self.book.rest()

    def log_training(self) -> None:
        """As of `RunTrainer`, and with the episodes where they are asked for."""
        super().log_training()
        if self.args.log_completions and self.book.played:
            show_completions(self, self.book.played)
            self.book.played = ()

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
        if self.is_in_train:  # Which the first process alone is; the others follow its learner.
            return self._evaluated(dataset, metric_key_prefix)
        return self.accelerator.by_the_first(lambda: self._evaluated(dataset, metric_key_prefix))

    def _evaluated(self, dataset: Any, metric_key_prefix: str) -> dict[str, float | None]:
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
        if self._loop is not None and self._run is not None:
            return self._loop.run(self._played(self._run, rows, self._loop))
        directory = self.directory()
        with directory.lock(), Loop() as loop:
            return loop.run(self._played(self.new_run(directory, loop, Watcher()), rows, loop))

    async def _played(
        self, run: Run, rows: Mapping[str, Sequence[Task]], loop: Loop
    ) -> list[TrajectoryGroup]:
        """On the live engine while training lasts; before and after, on one of its own."""
        async with AsyncExitStack() as stack:
            policy = self.policy
            if policy is None:
                model = run.model_before(STAGE)
                engine = await stack.enter_async_context(run.engine(model))
                policy = ModelPolicy(engine, run.renderer(model))
            play: PlayGroup = Guarded()
            if self.rollout_func is not None:
                play = Rollouts(self.rollout_func, self, policy, call=loop.here).play
            orders = orders_of(run, rows, size=self.args.num_generations_eval or self.args.num_generations)
            self.callback_handler.eval_dataloader = orders
            ended = partial(loop.here, self.fire, "on_prediction_step")
            return await play_rows(run, policy, orders, play=play, ended=ended)
