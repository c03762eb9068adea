"""Methods of TRL's and transformers' trainers that are not called here, and what to use in their place.

A subclass that overrides one would be silently ignored, so it is refused where the trainer is made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., None])

LOSS = "the loss is chosen by args.loss_type, beta, epsilon; a new one is a term in turnwise.learn.losses"
PLAY = "pass rollout_func to play episodes your own way, environment_factory or tools for turns"
REWARD = "pass functions as reward_funcs; log_metric and log_extra are among their keywords"
DATA = "pass train_dataset in the order you want, with shuffle_dataset=False"
OPTIM = "set args.optim, learning_rate, weight_decay, lr_scheduler_type, warmup_steps"
SAVE = "use a callback's on_save, or override save_model"
INSTEAD = {
    "compute_loss": LOSS, "_compute_loss": LOSS, "compute_liger_loss": LOSS, "training_step": LOSS,
    "_get_per_token_logps_and_entropies": LOSS, "_get_per_token_logps": LOSS, "get_off_policy_mask": LOSS,
    "_generate": PLAY, "_generate_single_turn": PLAY, "_generate_and_score_completions": PLAY,
    "_tool_call_loop": PLAY, "_prepare_inputs": PLAY, "_move_model_to_vllm": PLAY,
    "_calculate_rewards": REWARD, "compute_metrics": REWARD,
    "get_train_dataloader": DATA, "_get_train_sampler": DATA, "get_batch_samples": DATA,
    "get_eval_dataloader": "pass eval_dataset, here or to evaluate()", "_get_eval_sampler": DATA,
    "evaluation_loop": "override evaluate", "prediction_step": "override evaluate",
    "predict": "use evaluate",
    "create_optimizer": OPTIM, "create_scheduler": OPTIM, "create_optimizer_and_scheduler": OPTIM,
    "_save_checkpoint": SAVE, "_save": SAVE, "_load_from_checkpoint": SAVE,
    "_inner_training_loop": "use callbacks: each event of a transformers Trainer is there",
    "_maybe_log_save_evaluate": "use callbacks: each event of a transformers Trainer is there",
}  # fmt: skip
"""By method. Others of transformers' Trainer are refused too, with a more general hint."""
KEYWORDS = {
    "tokenizer": "it is processing_class now",
    "compute_metrics": REWARD,
    "compute_loss_func": LOSS,
    "data_collator": DATA,
    "model_init": "pass a model, or its name with args.model_init_kwargs",
    "optimizer_cls_and_kwargs": OPTIM,
    "preprocess_logits_for_metrics": REWARD,
    "ref_model": "the model as it is at the start is the reference; args.beta weighs the KL term",
    "judge": REWARD,
}
"""Keywords of other trainers, or of older versions."""


def refuse_foreign_overrides(trainer: type) -> None:
    """Refuse a subclass that overrides what no trainer of Turnwise calls.

    Raises:
        TypeError: It does; the message names each method and what to use.
    """
    from transformers import Trainer

    own = [base for base in trainer.__mro__ if base.__module__.startswith("turnwise.compat.")]
    known = {name for base in own for name in vars(base)}
    foreign = {*INSTEAD, *(name for name, _ in inspect.getmembers(Trainer, inspect.isfunction))} - known
    overridden = [
        name
        for base in trainer.__mro__
        if base not in own and base is not object
        for name in vars(base)
        if name in foreign and not name.startswith("__")
    ]
    if overridden:
        hints = [
            f"{name}: {INSTEAD.get(name, 'it is never called here; use callbacks, or arguments')}"
            for name in dict.fromkeys(overridden)
        ]
        raise TypeError(
            f"{trainer.__name__} overrides what Turnwise's trainers do not have:\n  " + "\n  ".join(hints)
        )


def hinted(init: Made) -> Made:
    """A constructor that says of a keyword of another trainer what to use in its place."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> None:
        unknown = [name for name in keywords if name not in known]
        if unknown:
            hints = [f"{name} ({KEYWORDS[name]})" if name in KEYWORDS else name for name in unknown]
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(hints)}; it takes: {', '.join(list(known)[1:])}"
            )
        init(self, *arguments, **keywords)

    return wrapped  # type: ignore[return-value]  # functools.wraps keeps the signature
