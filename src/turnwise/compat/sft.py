"""`SFTTrainer`: TRL's trainer of that name, on Turnwise's pipeline."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import speed_metrics

from turnwise.compat import rows as data
from turnwise.compat.arguments import SFTConfig
from turnwise.compat.attributes import Rows
from turnwise.compat.best import SPEEDS, check_metric
from turnwise.compat.course import Course, CoursePlan, batches, shuffled
from turnwise.compat.internals import KEYWORDS, hinted, need_config
from turnwise.compat.lessonbook import LessonBook
from turnwise.compat.lessons import ENV, Lesson, Lessons, packed, truncated
from turnwise.compat.loop import Loop
from turnwise.compat.models import load_policy, load_processing, name_of
from turnwise.compat.training import RunTrainer
from turnwise.compat.translate import Plan, sft_recipe
from turnwise.config import EnvConfig
from turnwise.envs.base import Env
from turnwise.envs.registry import make
from turnwise.errors import RecipeError, TaskError
from turnwise.learn.learner import Learner
from turnwise.learn.ranks import Ranks
from turnwise.pipeline.context import Run
from turnwise.pipeline.given import Given, Watcher
from turnwise.pipeline.learning import open_learner
from turnwise.pipeline.sft import STAGE, sft
from turnwise.types import Sample, Task

log = logging.getLogger(__name__)

Unit = list[Lesson]
"""What a batch is counted in: the lessons of one row, or those that are packed together."""


class SFTTrainer(RunTrainer):
    """Supervised learning on conversations, completions or text.

        trainer = SFTTrainer(
            model="Qwen/Qwen3-0.6B",
            args=SFTConfig(output_dir="runs/sft", assistant_only_loss=True),
            train_dataset=rows,                       # with a column "messages", and perhaps "tools"
        )
        trainer.train()

    Args:
        model: Name, path, model of transformers or ``PeftModel``. ``trainer.model`` is the live one.
        args: `SFTConfig`, or transformers' ``TrainingArguments``.
        data_collator: Not taken: rows are rendered and packed here.
        train_dataset: Rows as in `turnwise.compat.lessons`.
        eval_dataset: For `evaluate`; several by name.
        processing_class: Tokenizer or processor; the model's own if not given.
        compute_loss_func: Not taken.
        compute_metrics: Not taken.
        callbacks: Beside those that every trainer has.
        optimizers: Only ``(None, None)``: settings are in ``args``.
        optimizer_cls_and_kwargs: Not taken.
        preprocess_logits_for_metrics: Not taken.
        quantization_config: ``BitsAndBytesConfig(load_in_4bit=True)``, under ``peft_config``.
        peft_config: Train adapters in place of all weights.
        formatting_func: Makes text of a row.

    Raises:
        RecipeError: Arguments contradict one another, or ask for what Turnwise does not do.
        TaskError, TemplateError: A row cannot be learned from.
        TypeError: A subclass overrides what is not called here, or a keyword is of another trainer.
    """

    stage: ClassVar[str] = STAGE

    @hinted
    def __init__(
        self,
        model: Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        _refuse(
            data_collator=data_collator, compute_loss_func=compute_loss_func, compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        settings = _config(self, args, model)
        set_seed(settings.seed)
        live = load_policy(
            model,
            init_kwargs=settings.model_init_kwargs,
            trust_remote_code=settings.trust_remote_code,
            quantization_config=quantization_config,
            peft_config=peft_config,
            seed=settings.seed,
        )
        processing = load_processing(
            live,
            processing_class,
            trust_remote_code=settings.trust_remote_code,
            revision=(settings.model_init_kwargs or {}).get("revision"),
        )
        if settings.chat_template_path is not None:
            processing.chat_template = _template(settings.chat_template_path)
        super().__init__(live, settings, processing, callbacks, optimizers)
        self.train_dataset, self.eval_dataset, self._formatting = train_dataset, eval_dataset, formatting_func
        self.plan_anew()
        self.fire("on_init_end")

    def plan_anew(self) -> None:
        """As of `RunTrainer`."""
        args = self.args
        if self.train_dataset is None:
            raise RecipeError("train_dataset is needed: supervised learning plays nothing")
        self.train_dataset = data.split_of(self.train_dataset, "train")
        self._micro = args.per_device_train_batch_size * self.accelerator.num_processes
        self.rows_per_update = self._micro * args.gradient_accumulation_steps
        self._lessons_of: Lessons | None = None
        self._evaluation: tuple[Any, list[Unit]] | None = None
        """The data set that was evaluated last, rendered."""
        self._units = self._units_of(
            self.train_dataset, "train_dataset", pack=args.packing, limit=self._limit()
        )
        self._course = self._ordered()
        self.plan = self._planned()
        self.book = LessonBook()
        check_metric(args, ("loss", *SPEEDS), datasets=self.eval_dataset)
        self.planned()

    def _planned(self) -> Plan:
        plan = sft_recipe(
            self.args,
            model_name=name_of(self.model),
            environments={ENV: EnvConfig()},
            # An epoch's last update takes what is left, and counts as a whole one.
            rows=self._course.updates * self.rows_per_update,
            sources=["train_dataset"],
            processes=self.accelerator.num_processes,
        )
        if self.tokenizer.chat_template is None:
            plan = plan.of_plain_text()
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
        return CoursePlan(**fields, course=self._course)

    # -- rows ---------------------------------------------------------------------------------------

    def _limit(self) -> int | None:
        """How many rows of a stream are read: as many as the updates take."""
        if not data.is_stream(self.train_dataset):
            return None
        if self.args.max_steps <= 0:
            raise RecipeError("max_steps is needed where the number of rows is not known: set it above 0")
        if self.args.packing:
            raise RecipeError(
                "packing is for data sets of a known length: how many rows of a stream fill an update only "
                "shows as they are read; leave it out, or hand over a list of rows"
            )
        steps: int = self.args.max_steps
        return steps * self.rows_per_update

    def _units_of(self, dataset: Any, what: str, *, pack: bool, limit: int | None = None) -> list[Unit]:
        """What batches are made of, cut to ``max_length`` and packed where that is asked for."""
        args = self.args
        rows: Iterable[Mapping[str, Any]] = data.tasks_of(dataset, what, limit=limit)
        if self._formatting is not None:
            if args.completion_only_loss:
                raise RecipeError("formatting_func makes plain text, which has no completion: leave one out")
            rows = [{args.dataset_text_field: self._formatting(data.in_memory(row))} for row in rows]
        made = self._maker().of(rows, what)
        most = args.max_length
        if not pack:
            end = args.truncation_mode == "keep_end"
            units = [kept for lessons in made if (kept := truncated(lessons, most, end=end))]
        else:
            if most is None:
                raise RecipeError("packing fills rows of max_length tokens: set max_length")
            if args.shuffle_dataset:
                made = shuffled(made, args.seed)
            flat = [one for lessons in made for one in lessons]
            units = [
                unit
                for unit in packed(flat, most, args.packing_strategy)
                if any(one.loss_T.any() for one in unit)
            ]
        if not units:
            raise TaskError(f"{what}: no row has a token with loss within max_length={most}")
        return shuffled(units, args.seed) if args.shuffle_dataset else units

    def _maker(self) -> Lessons:
        if self._lessons_of is None:
            from turnwise.chat.renderer import load_renderer

            # Made once; the run's own renderer is this one's equal.
            renderer = load_renderer(self.processing_class) if self.args.assistant_only_loss else None
            self._lessons_of = Lessons(
                self.processing_class,
                renderer,
                text_column=self.args.dataset_text_field,
                assistant_only=self.args.assistant_only_loss,
                completion_only=self.args.completion_only_loss,
            )
        return self._lessons_of

    def _ordered(self) -> Course:
        args = self.args
        in_order = args.train_sampling_strategy == "sequential" or data.is_stream(self.train_dataset)
        return Course(
            len(self._units),
            micro=self._micro,
            accumulated=args.gradient_accumulation_steps,
            whole=args.dataloader_drop_last,
            seed=None if in_order else args.seed if args.data_seed is None else args.data_seed,
        )

    def _update(self, number: int) -> list[Sample]:
        return [one.sample(f"{ENV}/{row}") for row in self._course.update(number) for one in self._units[row]]

    # -- training -----------------------------------------------------------------------------------

    async def pipeline(self, run: Run) -> None:
        """As of `RunTrainer`."""
        await sft(run)

    def given(self, loop: Loop, watcher: Watcher, ranks: Ranks | None) -> Given:
        """As of `RunTrainer`."""
        return Given(
            model=self.model,
            processing=self.processing_class,
            environments={ENV: make(Recorded)},
            lessons=self._update,
            watcher=watcher,
            kept_checkpoints=None,
            export=False,
            ranks=ranks,
        )

    def rows_of_a_pass(self) -> Rows:
        """As of `RunTrainer`."""
        batches = self._course.micro_batches
        return Rows(self.train_dataset, batch_size=self.args.train_batch_size, batches=batches)

    def training_begins(self, learner: Learner) -> None:
        """As of `RunTrainer`."""
        super().training_begins(learner)
        if self.args.eval_on_start and not self.state.global_step:
            self.evaluate()

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float | None]:
        """The loss on rows that are not learned from, in the weights as they are; it is logged.

        Args:
            eval_dataset: In place of the trainer's; of several by name each has its own metrics.
            ignore_keys: Not taken.
            metric_key_prefix: Of the metrics' names.

        Returns:
            Metrics by name: the loss is the mean over batches of ``per_device_eval_batch_size``, as TRL's.

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

    def _evaluated(self, dataset: Any, prefix: str) -> dict[str, float | None]:
        args, began = self.args, time.time()
        pack = args.packing if args.eval_packing is None else args.eval_packing
        if self._evaluation is None or self._evaluation[0] is not dataset:
            self._evaluation = dataset, self._units_of(dataset, "eval_dataset", pack=pack)
        units = self._evaluation[1]
        size = args.per_device_eval_batch_size * self.accelerator.num_processes
        groups = batches(units, size, whole=args.dataloader_drop_last)
        self.callback_handler.eval_dataloader = groups
        learner, total = self._scorer(), 0.0
        for batch in groups:
            total += len(batch) * _loss(learner, batch)
            self.fire("on_prediction_step")
        metrics: dict[str, float | None] = {
            f"{prefix}_loss": total / sum(map(len, groups)),
            **speed_metrics(prefix, began, num_samples=len(units), num_steps=len(groups)),
        }
        self.log(dict(metrics))
        self.fire("on_evaluate", metrics=metrics)
        return metrics

    def _scorer(self) -> Learner:
        """The learner that has the model; one that learns nothing where there was no training yet."""
        if self._learner is None:
            config = self.plan.recipe.sft
            assert config is not None
            with Loop() as loop:
                run = self.new_run(self.directory(), loop, Watcher())
            self._learner = open_learner(
                run, run.model_before(STAGE), optimizer=config.optimizer, rows=config.rows, total_steps=1
            )
        return self._learner


class Recorded(Env):
    """Stands for conversations that were had elsewhere: they are learned from, and nobody plays."""

    def reset(self, task: Task) -> str:
        """Never called."""
        raise AssertionError("recorded conversations are not played")


def _loss(learner: Learner, units: Sequence[Unit]) -> float:
    """The mean over a batch's tokens of how unlikely each was."""
    samples = [one.sample(ENV) for unit in units for one in unit]
    logprobs = learner.logprobs(samples)
    tokens = sum(int(one.loss_mask_T.sum()) for one in samples)
    return -math.fsum(float(one.sum(dtype=np.float64)) for one in logprobs) / max(1, tokens)


def _template(path: str) -> str:
    if not path.endswith((".jinja", ".j2")) or not Path(path).is_file():
        raise RecipeError(
            f"chat_template_path is a Jinja file, and {path} is none: to take another tokenizer's template, "
            "set tokenizer.chat_template and pass it as processing_class"
        )
    return Path(path).read_text(encoding="utf-8")


def _config(trainer: object, args: SFTConfig | TrainingArguments | None, model: Any) -> Any:
    """The arguments, where plain ``TrainingArguments`` or none are given too."""
    if args is None:
        name = model if isinstance(model, str) else name_of(model)
        return SFTConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-SFT")
    if type(args) is TrainingArguments:
        return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})
    need_config(trainer, args, "SFTConfig")
    return args


def _refuse(**given: Any) -> None:
    found = [f"{name}: {KEYWORDS[name]}" for name, value in given.items() if value is not None]
    if found:
        raise RecipeError("SFTTrainer: " + "; ".join(found))
