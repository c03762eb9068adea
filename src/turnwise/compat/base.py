"""`BaseTrainer`: what every trainer has beside its training: state, callbacks, logs, saving, the Hub.

The state, the control flags and the callbacks are transformers' own, so whatever is written for its Trainer
works: early stopping, progress bars, trackers, a callback of one's own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
)

from turnwise.compat.callbacks import Bar, Printer
from turnwise.compat.directory import STATE
from turnwise.compat.hub import Uploads
from turnwise.compat.internals import refuse_foreign_overrides, refuse_foreign_patch
from turnwise.compat.models import name_of
from turnwise.compat.trackers import trackers
from turnwise.errors import RecipeError, StoreError, TurnwiseError, boundary
from turnwise.journal import read_json, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")


class Processes:
    """Who else trains along: the part of ``accelerate.Accelerator`` that scripts read."""

    def __init__(self, args: Any) -> None:
        self.num_processes: int = args.world_size
        self.process_index: int = args.process_index
        self.local_process_index: int = args.local_process_index
        self.is_main_process = self.process_index == 0
        self.is_local_main_process = self.local_process_index == 0
        self.device = args.device

    def unwrap_model(self, model: Any, **_: Any) -> Any:
        """The model itself: nothing is wrapped around it."""
        return model

    def print(self, *values: Any, **how: Any) -> None:
        """Print once, whatever the number of processes."""
        if self.is_local_main_process:
            print(*values, **how)  # noqa: T201 - what it is for

    def wait_for_everyone(self) -> None:
        """Until all processes are here."""
        if self.num_processes > 1:
            torch.distributed.barrier()

    def by_the_first(self, work: Callable[[], T]) -> T:
        """What the first process does alone; each has the result, or the error that it raised."""
        if self.num_processes == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_main_process:
            try:
                told[0] = work()
            except TurnwiseError as error:
                told[1] = error
        torch.distributed.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result


class BaseTrainer:
    """State, callbacks, logs and saving of a trainer.

    Args:
        model: The live model.
        args: The trainer's arguments.
        processing_class: Its tokenizer or processor.
        callbacks: Beside those that every trainer has.
        optimizers: Only the default: settings are in ``args``.

    Raises:
        RecipeError: ``optimizers`` are given.
        TypeError: A subclass overrides what is not called here.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        processing_class: Any,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
    ) -> None:
        refuse_foreign_overrides(type(self))
        if any(one is not None for one in optimizers):
            raise RecipeError(
                "optimizers: Turnwise makes its own, whose moments a resumed run takes up; set args.optim, "
                "learning_rate, weight_decay, adam_beta1, adam_beta2, lr_scheduler_type and warmup_steps"
            )
        self.model, self.args, self.processing_class = model, args, processing_class
        self.accelerator = Processes(args)
        self.is_in_train = False
        self.beside: set[str] = set()
        """Names of what is logged beside TRL's metrics, and not printed."""
        self.control = TrainerControl()
        self.state = self._new_state(0)
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *trackers(args.report_to), *(callbacks or [])],
            model, processing_class, None, None,
        )  # fmt: skip
        self.callback_handler.add_callback((Printer if args.disable_tqdm else Bar)(self.beside))
        self.uploads = Uploads(args)
        if args.push_to_hub and self.is_world_process_zero():
            self.uploads.make_repo()  # What it lacks is better known now than after hours of training.

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_foreign_patch(type(self), name, value)
        super().__setattr__(name, value)

    @property
    def tokenizer(self) -> Any:
        """Of the processing class."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def model_wrapped(self) -> Any:
        """The model itself: nothing is wrapped around it."""
        return self.model

    @property
    def optimizer(self) -> Any:
        """As callbacks see it; None before training."""
        return self.callback_handler.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """As callbacks see it; None before training."""
        return self.callback_handler.lr_scheduler

    # -- callbacks ----------------------------------------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Have one more."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Take one out, by itself or by its class, and return it."""
        found: TrainerCallback | None = self.callback_handler.pop_callback(callback)
        return found

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Take one out."""
        self.callback_handler.remove_callback(callback)

    def fire(self, event: str, **arguments: Any) -> None:
        """Have an event of `transformers.TrainerCallback`."""
        handle = getattr(self.callback_handler, event)
        self.control = handle(self.args, self.state, self.control, **arguments)

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes and logs."""
        return bool(self.accelerator.is_main_process)

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return bool(self.accelerator.is_local_main_process)

    # -- state --------------------------------------------------------------------------------------

    def _new_state(self, max_steps: int) -> TrainerState:
        state = TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            train_batch_size=self.args.train_batch_size,
        )
        state.max_steps = max_steps
        state.num_train_epochs = int(-(-self.args.num_train_epochs // 1))
        state.compute_steps(self.args, max_steps)
        return state

    def _restored_state(self, checkpoint: Path, max_steps: int) -> TrainerState:
        """The state of a checkpoint, under the present arguments."""
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        state.max_steps = max_steps
        state.compute_steps(self.args, max_steps)
        if self.args.restore_callback_states_from_checkpoint:
            self._restore_callbacks(state.stateful_callbacks)
        return state

    def _restore_callbacks(self, stored: Mapping[str, Any]) -> None:
        for name, data in stored.items():
            own = [one for one in self._exportable() if type(one).__name__ == name]
            if not own:
                log.warning("the checkpoint has the state of a %s, and the trainer has none", name)
            for callback, saved in zip(own, data if isinstance(data, list) else [data], strict=False):
                for attribute, value in {**saved.get("args", {}), **saved.get("attributes", {})}.items():
                    setattr(callback, attribute, value)

    def _exportable(self) -> list[ExportableState]:
        found = (*self.callback_handler.callbacks, self.control)
        return [one for one in found if isinstance(one, ExportableState)]

    def _is_best(self, metrics: Mapping[str, float | None]) -> bool:
        """Note the best value of ``metric_for_best_model`` so far."""
        name = self.args.metric_for_best_model
        if name is None or not metrics:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise RecipeError(
                f"metric_for_best_model is {name!r}, which the evaluation does not have (nothing is learned "
                "in it, so there is no loss); it has: " + ", ".join(sorted(metrics))
            )
        value, best = metrics[name], self.state.best_metric
        if value is None or (best is not None and (value > best) is not bool(self.args.greater_is_better)):
            return False
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        return True

    def checkpoint_files(self) -> dict[str, bytes]:
        """What stands in a checkpoint beside the model and the learner's state."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        # A TrainerState makes callbacks' states of a list of them.
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._exportable()).stateful_callbacks
        arguments = io.BytesIO()
        torch.save(self.args, arguments)
        return {STATE: state_json(self.state), "training_args.bin": arguments.getvalue()}

    # -- logs ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
        """Put a line into ``state.log_history`` and show it to the callbacks.

        Args:
            logs: By name; None where a metric applied to nothing.
            start_time: Of the training, for speeds.
        """
        logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                seconds = time.time() - start_time
                logs["train_tokens_per_second"] = self.state.num_input_tokens_seen / seconds
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print metrics, one a line."""
        if self.is_world_process_zero():
            lines = [f"  {name} = {value}" for name, value in sorted(metrics.items())]
            print("\n".join([f"***** {split} metrics *****", *lines]))  # noqa: T201 - what it is for

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write metrics to ``<split>_results.json``, and to ``all_results.json`` with other splits'."""
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir)
            write_json(directory / f"{split}_results.json", dict(metrics))
            if combined:
                path = directory / "all_results.json"
                write_json(path, {**(read_json(path) or {}), **metrics})

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into ``output_dir``."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir)
            path.mkdir(parents=True, exist_ok=True)
            (path / STATE).write_bytes(state_json(self.state))

    # -- saving -------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as it is, for ``from_pretrained``: adapters as adapters, with the tokenizer.

        With ``args.push_to_hub`` it is uploaded too.

        Args:
            output_dir: ``args.output_dir`` if not given.

        Raises:
            StoreError: It could not be written, or uploaded.
        """
        if not self.is_world_process_zero():
            return
        path = Path(output_dir or self.args.output_dir)
        with boundary(StoreError, f"writing {path}"):
            path.mkdir(parents=True, exist_ok=True)
            self.model.save_pretrained(path)
            self.processing_class.save_pretrained(path)
            torch.save(self.args, path / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model as it is, to ``args.hub_model_id`` or a repository named as ``output_dir``.

        Args:
            commit_message: Of the upload.
            blocking: Wait for it; a future is returned otherwise.
            token: ``args.hub_token`` if not given.
            revision: Branch; ``args.hub_revision`` if not given.
            kwargs: For `create_model_card`.

        Raises:
            StoreError: The Hub could not be reached, or refused.
        """
        if not self.is_world_process_zero():
            return None
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        self.fire("on_push_begin")
        return self.uploads.push(message=commit_message, blocking=blocking, token=token, revision=revision)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Write a short ``README.md`` into ``output_dir``; one that is there already stays.

        Args:
            model_name: Its title; the directory's name if not given.
            dataset_name: What it was trained on.
            tags: For the Hub, beside ``turnwise``.
            metadata: More lines of the card's header, such as ``license``.
        """
        path = Path(self.args.output_dir) / "README.md"
        if path.exists() or not self.is_world_process_zero():
            return
        header: dict[str, Any] = {
            "base_model": name_of(self.model),
            "datasets": dataset_name,
            "library_name": "peft" if hasattr(self.model, "peft_config") else "transformers",
            "tags": ["turnwise", *([tags] if isinstance(tags, str) else tags or [])],
            **metadata,
        }
        lines = yaml.safe_dump({name: value for name, value in header.items() if value is not None})
        title = model_name or Path(self.args.output_dir).resolve().name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"---\n{lines}---\n\n# {title}\n\nTrained with Turnwise's {type(self).__name__}: "
            f"{self.state.global_step} updates. What it is good for, its author should say here.\n",
            encoding="utf-8",
        )


def state_json(state: TrainerState) -> bytes:
    """As ``TrainerState.save_to_json`` writes it."""
    return (json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n").encode()
