"""`GRPOTrainer`: TRL's trainer of that name, on Turnwise's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from turnwise.compat.arguments import GRPOConfig
from turnwise.compat.environments import Factory
from turnwise.compat.internals import hinted
from turnwise.compat.models import name_of
from turnwise.compat.trainer import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """Group relative policy optimization, over episodes of one turn or many.

        trainer = GRPOTrainer(
            model="Qwen/Qwen3-0.6B",
            args=GRPOConfig(output_dir="runs/shop", max_steps=200),
            train_dataset=rows,                       # with a column "prompt"
            reward_funcs=accuracy,
            environment_factory=Shop,
        )
        trainer.train()

    Args:
        model: Name, path, model of transformers or ``PeftModel``. ``trainer.model`` is the live one.
        reward_funcs: Functions, names of sequence classifiers, or a list of both; None where environments
            score.
        args: `GRPOConfig`.
        train_dataset: Rows with a ``prompt``, text or messages; None where ``reset`` returns the prompt.
        eval_dataset: For `evaluate`; several by name.
        processing_class: Tokenizer or processor; the model's own if not given.
        reward_processing_classes: Tokenizers of reward models.
        callbacks: Beside those that every trainer has.
        optimizers: Only ``(None, None)``: settings are in ``args``.
        quantization_config: ``BitsAndBytesConfig(load_in_4bit=True)``, under ``peft_config``.
        peft_config: Train adapters in place of all weights.
        tools: Functions that the model may call.
        rollout_func: Plays the episodes itself: ``rollout_func(prompts, trainer)``.
        environment_factory: Makes an environment, or is an OpenEnv server's address; or several by name.

    Raises:
        RecipeError: Arguments contradict one another, or ask for what Turnwise does not do.
        TypeError: A subclass overrides what is not called here, or a keyword is of another trainer.
    """

    config_name = "GRPOConfig"

    @hinted
    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else name_of(model)
            args = GRPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-GRPO")
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, tools,
            rollout_func, environment_factory,
        )  # fmt: skip
