"""Methods of TRL's and transformers' trainers that are not called here, and what to use in their place.

Whoever overrides one, in a subclass, on the class or on a trainer, would be silently ignored, and is told so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_OURS = "turnwise.compat."
Made = TypeVar("Made", bound=Callable[..., None])

LOSS = "the loss is chosen by args.loss_type, beta, epsilon; a new one is a term in turnwise.learn.losses"
PLAY = "pass rollout_func to play episodes your own way, environment_factory or tools for turns"
REWARD = "pass functions as reward_funcs; log_metric and log_extra are among their keywords"
DATA = "pass train_dataset in the order you want, with shuffle_dataset=False"
ROWS = "pass rows as they are to be read; a tokenizer's chat_template renders messages"
OPTIM = "set args.optim, learning_rate, weight_decay, lr_scheduler_type, warmup_steps"
SAVE = "use a callback's on_save, or override save_model"
INSTEAD = {
    "compute_loss": LOSS, "_compute_loss": LOSS, "compute_liger_loss": LOSS, "training_step": LOSS,
    "_get_per_token_logps_and_entropies": LOSS, "_get_per_token_logps": LOSS, "get_off_policy_mask": LOSS,
    "_generate": PLAY, "_generate_single_turn": PLAY, "_generate_and_score_completions": PLAY,
    "_tool_call_loop": PLAY, "_prepare_inputs": PLAY, "_move_model_to_vllm": PLAY,
    "_get_tool_suffix_ids": PLAY, "_tokenize_prompts": ROWS, "_prepare_dataset": ROWS,
    "_reject_skip_prepare_without_labels": ROWS,
    "get_high_entropy_mask": LOSS, "get_gamma_weights": LOSS,
    "_calculate_rewards": REWARD, "compute_metrics": REWARD,
    "_log_metric": REWARD, "_log_completion_extra": REWARD,
    "_send_telemetry": "leave it out: nothing is sent",
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


@functools.cache
def foreign() -> frozenset[str]:
    """Methods of TRL's and of transformers' trainers, those that ours have too among them."""
    from transformers import Trainer

    return frozenset({*INSTEAD, *(name for name, _ in inspect.getmembers(Trainer, inspect.isfunction))})


def refuse_foreign_overrides(trainer: type) -> None:
    """Refuse a subclass that overrides what no trainer of Turnwise calls, and a trainer so patched.

    Raises:
        TypeError: It does; the message names each method and what to use.
    """
    bases = [base for base in trainer.__mro__ if base is not object]
    known = {name for base in bases for name, value in vars(base).items() if _is_ours(base, value)}
    overridden = [
        name
        for base in bases
        for name in vars(base)
        if name in foreign() - known and not name.startswith("__")
    ]
    if overridden:
        raise TypeError(_told(trainer, overridden))


def refuse_foreign_patch(trainer: type, name: str, value: Any) -> None:
    """Refuse a function that is put on a trainer in place of a method that it does not have.

    Raises:
        TypeError: It is one; the message says what to use.
    """
    if callable(value) and (name in foreign() or name in KEYWORDS) and not hasattr(trainer, name):
        raise TypeError(_told(trainer, [name]))


def _is_ours(base: type, value: Any) -> bool:
    """Whether a class of ours has this of itself, and was not patched with it."""
    return all(str(getattr(one, "__module__", None) or _OURS).startswith(_OURS) for one in (base, value))


def _told(trainer: type, names: list[str]) -> str:
    general = "it is never called here; use callbacks, or arguments"
    hints = [f"{name}: {(KEYWORDS | INSTEAD).get(name, general)}" for name in dict.fromkeys(names)]
    return f"{trainer.__name__} overrides what Turnwise's trainers do not have:\n  " + "\n  ".join(hints)


def need_config(trainer: object, args: object, name: str) -> None:
    """Refuse arguments of another trainer: those of this one, ours or TRL's own, are of a class of this name.

    Raises:
        TypeError: They are others.
    """
    if all(base.__name__ != name for base in type(args).__mro__):
        raise TypeError(
            f"args: {type(trainer).__name__} takes a turnwise.{name}, which has every field of transformers' "
            f"TrainingArguments and its own; found {type(args).__name__}"
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
