"""From TRL's names of advantages, losses and corrections to ours: the part of ``rl`` that is mathematics.

docs/algorithms.md has the formulas; `tests/learn/test_trl.py` and `tests/compat/referee` compare gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turnwise.compat.fields import is_set
from turnwise.errors import RecipeError

if TYPE_CHECKING:
    from turnwise.compat.arguments import GRPOConfig, RLOOConfig

Settings = dict[str, Any]

NORMALISE = {
    "grpo": "sequence", "sapo": "sequence", "dapo": "token", "bnpo": "token", "cispo": "token",
    "vespo": "token", "dr_grpo": "constant", "luspo": "sum",
}  # fmt: skip
"""What each ``loss_type`` divides by."""
CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
"""Those that clip a ratio, of a token or of a sequence."""
CORRECTIONS = {
    "token_truncate": "tis", "token_mask": "icepop", "sequence_truncate": "sequence_truncate",
    "sequence_mask": "sequence_mask",
}  # fmt: skip
"""By ``vllm_importance_sampling_mode``."""
UNBOUNDED = 1e9
"""Above what any ratio comes to: they are kept below e^20."""
READ_BY = {
    "epsilon": CLIPPED, "epsilon_high": (*CLIPPED, "cispo"), "delta": CLIPPED,
    "sapo_temperature_pos": ("sapo",), "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",), "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",), "vespo_lambda_neg": ("vespo",),
}  # fmt: skip
"""Arguments that some losses alone read."""


def grpo_settings(args: GRPOConfig, notes: list[str], *, cuts: bool) -> Settings:
    """Advantage, loss, correction and divergence of `GRPOTrainer`.

    Args:
        args: The trainer's arguments.
        notes: Takes what does nothing, or is done otherwise.
        cuts: Whether top-p or its like cut what is sampled.

    Raises:
        RecipeError: A name is not known, or two settings do not go together.
    """
    _known("loss_type", args.loss_type, NORMALISE)
    _known("importance_sampling_level", args.importance_sampling_level, ("token", "sequence"))
    for name, losses in READ_BY.items():
        if is_set(args, name) and args.loss_type not in losses:
            notes.append(
                f"{name} does nothing with loss_type={args.loss_type!r}; it is of {', '.join(losses)}"
            )
    return {
        **_advantage(args, notes),
        **_loss(args),
        **_correction(args, notes, cuts=cuts),
        **_divergence(args, notes),
        **_entropy(args, notes),
        "off_policy_kl": args.off_policy_mask_threshold,
    }


def rloo_settings(args: RLOOConfig, notes: list[str], *, cuts: bool) -> Settings:
    """Advantage, loss and divergence of `RLOOTrainer`: whole sequences, the divergence in their reward."""
    settings: Settings = {
        "advantage": "rloo",
        "scale": "batch" if args.normalize_advantages else "none",
        "loss": "rloo",
        "normalise": "sum",
        **_clips(args),
        "correction": _of_cuts(args, notes) if cuts else {"kind": "ignore"},
    }
    return settings | ({"kl": args.beta, "kl_in": "reward"} if args.beta else {})


def _advantage(args: GRPOConfig, notes: list[str]) -> Settings:
    _known("scale_rewards", args.scale_rewards, ("group", "batch", "none"))
    together = args.multi_objective_aggregation
    _known("multi_objective_aggregation", together, ("sum_then_normalize", "normalize_then_sum"))
    if together == "sum_then_normalize":
        return {"advantage": "grpo", "scale": args.scale_rewards}
    if is_set(args, "scale_rewards"):
        notes.append("scale_rewards does nothing with multi_objective_aggregation='normalize_then_sum'")
    return {"advantage": "grpo", "rewards": "separately"}


def _loss(args: GRPOConfig) -> Settings:
    name, sequence = args.loss_type, args.importance_sampling_level == "sequence"
    settings: Settings = {"normalise": NORMALISE[name]}
    if name in CLIPPED:
        # The names of dapo and its like are ppo in one normalisation; theirs may clip alike on both sides.
        settings |= {"loss": "gspo" if sequence else "ppo", "ratio_cap": args.delta, **_clips(args)}
        return settings
    if sequence:
        raise RecipeError(
            f"importance_sampling_level='sequence' with loss_type={name!r}: {name} is of tokens' ratios"
            + (", of which it makes the sequence's itself" if name == "vespo" else "")
            + "; use 'token', or loss_type='grpo'"
        )
    settings["loss"] = name
    if name == "cispo":
        cap = args.epsilon if args.epsilon_high is None else args.epsilon_high
        if cap <= 1:
            raise RecipeError(
                f"epsilon_high is {cap} and with loss_type='cispo' the cap on ratios itself, which would "
                "shrink them all, on-policy too: set it above 1 (5.0 in ScaleRL)"
            )
        settings["clip_high"] = cap - 1
    elif name == "sapo":
        settings["sapo"] = {
            "tau_positive": args.sapo_temperature_pos,
            "tau_negative": args.sapo_temperature_neg,
        }
    else:
        settings["vespo"] = {
            "k_positive": args.vespo_k_pos,
            "lambda_positive": args.vespo_lambda_pos,
            "k_negative": args.vespo_k_neg,
            "lambda_negative": args.vespo_lambda_neg,
        }
    return settings


def _clips(args: GRPOConfig | RLOOConfig) -> Settings:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return {"clip_low": args.epsilon, "clip_high": high}


def _correction(args: GRPOConfig, notes: list[str], *, cuts: bool) -> Settings:
    mode = args.vllm_importance_sampling_mode
    _known("vllm_importance_sampling_mode", mode, CORRECTIONS)
    on = args.use_vllm and args.vllm_importance_sampling_correction
    if not on:
        if cuts:
            return {"correction": _of_cuts(args, notes)}
        for name in ("mode", "clip_max", "clip_min"):
            if is_set(args, f"vllm_importance_sampling_{name}"):
                why = "vllm_importance_sampling_correction=False" if args.use_vllm else "use_vllm=False"
                notes.append(f"vllm_importance_sampling_{name} does nothing with {why}")
        return {"correction": {"kind": "ignore"}}
    if args.loss_type == "vespo" and mode.startswith("sequence"):
        raise RecipeError(
            f"vllm_importance_sampling_mode={mode!r} with loss_type='vespo', which makes a sequence's ratio "
            "of tokens': use 'token_truncate', 'token_mask', or vllm_importance_sampling_correction=False"
        )
    return {"correction": {"kind": CORRECTIONS[mode], **_bounds(args)}}


def _of_cuts(args: GRPOConfig | RLOOConfig, notes: list[str]) -> Settings:
    """Tokens of a cut distribution are weighed by what was kept; TRL takes them as if nothing were cut."""
    notes.append(
        "top_p, top_k or min_p cut what is sampled: each token is weighed by the mass that was kept "
        "(rl.correction.kind=tis), without which another distribution would be trained than is sampled"
    )
    return {"kind": "tis", **_bounds(args)}


def _bounds(args: GRPOConfig | RLOOConfig) -> Settings:
    low = getattr(args, "vllm_importance_sampling_clip_min", None)
    high = getattr(args, "vllm_importance_sampling_clip_max", None)
    return {"low": 0.0 if low is None else low, "high": UNBOUNDED if high is None else high}


def _divergence(args: GRPOConfig, notes: list[str]) -> Settings:
    if args.beta == 0:
        if is_set(args, "use_bias_correction_kl"):
            notes.append("use_bias_correction_kl does nothing with beta=0")
        return {}
    if not args.use_bias_correction_kl:
        return {"kl": args.beta, "kl_estimator": "k3"}
    sequence = args.importance_sampling_level == "sequence"
    return {"kl": args.beta, "kl_estimator": "k3_sequence_ratio" if sequence else "k3_ratio"}


def _entropy(args: GRPOConfig, notes: list[str]) -> Settings:
    normalise = NORMALISE[args.loss_type]
    if args.entropy_coef and normalise in ("constant", "sum"):
        raise RecipeError(
            f"entropy_coef with loss_type={args.loss_type!r}: the bonus is averaged as the loss is, and that "
            "one is no average; use 'dapo' or 'grpo'"
        )
    if args.entropy_coef and normalise == "sequence":
        notes.append(
            f"entropy_coef: with loss_type={args.loss_type!r} the entropy is a mean of sequences' means, as "
            "the loss is; TRL's is over all tokens"
        )
    return {"entropy": args.entropy_coef}


def _known(name: str, value: object, known: Any) -> None:
    if value not in known:
        raise RecipeError(f"{name} is one of {', '.join(known)}; found {value!r}")
