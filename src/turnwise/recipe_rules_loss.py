"""What may not stand together in the settings of RL's loss: `turnwise.recipe_rules` asks."""

from __future__ import annotations

from collections.abc import Iterator

from turnwise.config import LossName, RlConfig, Section

_CLIPS: dict[LossName, set[str]] = {"cispo": {"clip_high"}, "sapo": set(), "vespo": set(), "reinforce": set()}
"""The clips that a loss reads, where they are not both."""
_CAPPED: tuple[LossName, ...] = ("ppo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo")
"""Losses that read ``ratio_cap``: those whose ratio nothing else bounds for bad tokens."""
_NORMALISED: dict[LossName, tuple[str, LossName]] = {
    "dapo": ("token", "ppo"),
    "bnpo": ("token", "ppo"),
    "dr_grpo": ("constant", "ppo"),
    "luspo": ("sum", "gspo"),
}
"""Losses that are another in one normalisation: which one, and the other."""


def idle_loss_keys(rl: RlConfig) -> dict[str, str]:
    """The keys that do nothing with the chosen loss, correction and KL, each with the reason."""
    idle: dict[str, str] = {}
    for key in {"clip_low", "clip_high"} - _CLIPS.get(rl.loss, {"clip_low", "clip_high"}):
        idle[f"rl.{key}"] = f"with rl.loss={rl.loss}"
    for name in ("sapo", "dppo", "vespo"):
        if rl.loss != name:
            section: Section = getattr(rl, name)
            idle |= {f"rl.{name}.{key}": f"with rl.loss={rl.loss}" for key in type(section).model_fields}
    if (kind := rl.correction.kind) in ("none", "ignore"):
        idle |= {f"rl.correction.{key}": f"with rl.correction.kind={kind}" for key in ("low", "high")}
    if rl.loss not in _CAPPED:
        idle["rl.ratio_cap"] = f"with rl.loss={rl.loss}"
    if rl.kl == 0:
        idle |= {f"rl.{key}": "with rl.kl=0" for key in ("kl_estimator", "kl_in")}
    elif rl.kl_in == "reward":
        idle["rl.kl_estimator"] = "with rl.kl_in=reward, which sums the log-ratio itself"
    if rl.minibatches == 1:
        idle |= {f"rl.{key}": "with rl.minibatches=1" for key in ("minibatch_of", "normalise_over")}
    return idle


def loss_problems(rl: RlConfig) -> Iterator[str]:
    """What contradicts itself."""
    mode, plain = _NORMALISED.get(rl.loss, (None, rl.loss))
    if mode is not None and rl.normalise != mode:
        yield (
            f"rl.normalise: rl.loss={rl.loss} is {plain} normalised by {mode}, found {rl.normalise}; "
            f"set it to {mode}, or use rl.loss={plain}"
        )
    if rl.loss == "rloo" and rl.normalise != "sum":
        yield f"rl.normalise: rl.loss=rloo is a mean of sequences' sums, found {rl.normalise}; set it to sum"
    low, high = rl.clips
    if rl.ratio_cap is not None and rl.loss in _CAPPED and rl.ratio_cap <= 1 + high:
        yield (
            f"rl.ratio_cap: must be above the clip, 1 + rl.clip_high = {1 + high:g}, found {rl.ratio_cap}; "
            "raise it (4 in INTELLECT-2), or lower rl.clip_high"
        )
    if rl.loss == "dapo" and high <= low:
        yield (
            f"rl.clip_high: rl.loss=dapo clips higher above than below, found {high} with "
            f"rl.clip_low={low}; set it (0.28 in the paper), or use rl.loss=ppo"
        )
    kind = rl.correction.kind
    if kind != "none" and rl.loss == "dppo":
        yield (
            "rl.correction.kind: rl.loss=dppo weighs tokens by their whole ratio to the sampler, found "
            f"{kind}, which would take a part of it out; remove it"
        )
    if rl.loss == "vespo" and kind in ("sequence_truncate", "sequence_mask", "geometric_mask"):
        yield (
            f"rl.correction.kind: rl.loss=vespo makes its sequence's ratio of tokens', found {kind}, of the "
            "whole sequence; use tis or icepop, or none, with which it is the ratio to the sampler"
        )
    yield from _cuts(rl)


def _cuts(rl: RlConfig) -> Iterator[str]:
    sampling = rl.sampling
    if rl.correction.allows_cuts:
        return
    for key, cuts in (
        ("top_p", sampling.top_p < 1),
        ("top_k", sampling.top_k > 0),
        ("min_p", sampling.min_p > 0),
    ):
        if cuts:
            yield (
                f"rl.sampling.{key}: a cut distribution is not the one that is trained, found "
                f"{getattr(sampling, key)} with rl.correction.kind={rl.correction.kind}; remove it, or set "
                "rl.correction.kind to tis, icepop, sequence_truncate or sequence_mask"
            )
