"""What may not stand together in the settings of what RL's steps learn from: `turnwise.recipe_rules` asks."""

from __future__ import annotations

from collections.abc import Iterator

from turnwise.config import Recipe, RlConfig


def idle_selection_keys(rl: RlConfig) -> dict[str, str]:
    """The keys that do nothing with what is chosen, each with the reason."""
    idle: dict[str, str] = {}
    if rl.flat_groups != "refill":
        idle["rl.refill_limit"] = f"with rl.flat_groups={rl.flat_groups}"
    if not rl.overlong.mask:
        idle["rl.overlong.reasons"] = "with rl.overlong.mask=false"
    return idle


def selection_problems(recipe: Recipe) -> Iterator[str]:
    """What contradicts itself."""
    rl = recipe.rl
    assert rl is not None
    if rl.flat_groups != "keep" and rl.advantage == "reinforce_pp":
        yield (
            "rl.flat_groups: with rl.advantage=reinforce_pp siblings are not compared with each other, and a "
            f"group of equal rewards teaches as much as any; found {rl.flat_groups}; remove it, or use "
            "rl.advantage=reinforce_pp_baseline"
        )
    if rl.overlong.penalty is not None and rl.advantage == "maxrl":
        yield (
            "rl.overlong.penalty: rl.advantage=maxrl divides by the mean of a group's rewards, which must "
            "not be negative, and a penalty is; remove it, or use rl.advantage=grpo"
        )
    cut = {recipe.environments[env].limits.cut_reply for env in rl.groups if env in recipe.environments}
    if rl.overlong.mask and rl.overlong.reasons == ["cut_reply"] and cut == {"continue"}:
        yield (
            "rl.overlong.mask: does nothing: no episode ends for cut_reply where limits.cut_reply is "
            "continue; remove the one or the other, or name other rl.overlong.reasons"
        )
    for env in rl.groups:
        if env in recipe.environments:
            yield from _penalty(recipe, rl, env)


def _penalty(recipe: Recipe, rl: RlConfig, env: str) -> Iterator[str]:
    """A limit to stay below, and a penalty that begins before it."""
    penalty, key = rl.overlong.penalty, "rl.overlong.penalty"
    if penalty is None:
        return
    most, owner = recipe.environments[env].limits.max_tokens, f"environments.{env}.limits.max_tokens"
    if penalty.of == "reply":
        most, owner = rl.sampling.max_tokens, "rl.sampling.max_tokens"
    limit = penalty.max_tokens or most
    if limit is None:
        yield f"{key}.max_tokens: {env} has no limit to stay below; set it, or {owner}"
    elif penalty.cache > limit:
        yield f"{key}.cache: {penalty.cache} is more than the limit of {env}, which is {limit}; lower it"
    elif most is not None and limit - penalty.cache >= most:
        yield (
            f"{key}.max_tokens: does nothing for {env}: the penalty begins after {limit - penalty.cache} "
            f"tokens and {owner} is {most}; lower it"
        )
