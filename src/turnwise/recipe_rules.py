"""What may not stand together in a recipe, beyond keys and types: a setting that does nothing is an error.

Each rule looks at the whole recipe and says what it found, what is allowed and what to do. They are checked
when a recipe is loaded, before anything heavy is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from turnwise.config import OptimizerConfig, ParallelConfig, Recipe, SamplingConfig, Section
from turnwise.recipe_rules_credit import credit_problems, idle_credit_keys
from turnwise.recipe_rules_engine import engine_problems, idle_engine_keys
from turnwise.recipe_rules_loss import idle_loss_keys, loss_problems
from turnwise.recipe_rules_selection import idle_selection_keys, selection_problems


def problems(recipe: Recipe) -> list[str]:
    """Everything that is wrong with ``recipe``; empty where nothing is."""
    found = [
        f"{key}: does nothing {reason}; remove it"
        for key, reason in idle_keys(recipe).items()
        if _is_set(recipe, key)
    ]
    for rule in (_stages, _model, _tasks, _environments, _collect, _sft, _rl, _evaluate, engine_problems):
        found += rule(recipe)
    return found


def made_stages(recipe: Recipe) -> list[str]:
    """The stages of the model that a run of ``recipe`` makes, which are those that it can evaluate."""
    return ["untrained", *(["sft"] if recipe.sft else []), *(["rl"] if recipe.rl else [])]


def idle_keys(recipe: Recipe) -> dict[str, str]:
    """The keys that do nothing in the chosen modes, each with the reason: ``with rl.loss=reinforce``."""
    idle = idle_engine_keys(recipe)
    if recipe.model.scratch is not None:
        idle["model.revision"] = "with model.scratch"
        if recipe.model.chat_template is None:
            idle["model.thinking"] = "with model.scratch, whose own template writes no thinking"
    if recipe.model.prompt == "text":
        for key in ("chat_template", "chat_template_kwargs", "dialect", "thinking"):
            idle[f"model.{key}"] = "with model.prompt=text"
    for stage in ("sft", "rl"):
        section = getattr(recipe, stage)
        if section is None:
            continue
        optimizer: OptimizerConfig = section.optimizer
        if optimizer.schedule == "constant":
            idle[f"{stage}.optimizer.floor"] = f"with {stage}.optimizer.schedule=constant"
        if optimizer.kind == "adamw":
            idle[f"{stage}.optimizer.muon_lr"] = f"with {stage}.optimizer.kind=adamw"
    if recipe.sft is None and recipe.rl is None:
        idle["model.quantization"] = "without sft or rl: what plays has whole weights"
        for key in ParallelConfig.model_fields:
            idle[f"parallel.{key}"] = "without sft or rl: nothing else is done by several processes"
    if recipe.rl is not None:
        idle |= idle_loss_keys(recipe.rl) | idle_credit_keys(recipe.rl) | idle_selection_keys(recipe.rl)
    if recipe.evaluate is not None and recipe.evaluate.sampling.temperature == 0:
        for key in ("top_p", "top_k", "min_p"):
            idle[f"evaluate.sampling.{key}"] = "at temperature 0"
    if recipe.collect is not None and recipe.collect.policy == "teacher":
        for key in SamplingConfig.model_fields:
            idle[f"collect.sampling.{key}"] = "with collect.policy=teacher"
    return idle


def _is_set(recipe: Recipe, key: str) -> bool:
    section: object = recipe
    *path, name = key.split(".")
    for part in path:
        section = getattr(section, part)
    assert isinstance(section, Section)
    return name in section.model_fields_set and getattr(section, name) is not None


def _stages(recipe: Recipe) -> Iterator[str]:
    if not (recipe.collect or recipe.sft or recipe.rl or recipe.evaluate):
        yield "there is nothing to do: add at least one of collect, sft, rl, evaluate"
    if recipe.push_to_hub and not (recipe.sft or recipe.rl):
        yield "push_to_hub: nothing is trained, so there is nothing to upload; add sft or rl, or remove it"


def _model(recipe: Recipe) -> Iterator[str]:
    if recipe.model.dtype == "float16" and (recipe.sft or recipe.rl):
        yield "model.dtype: float16 overflows in training; use bfloat16, or float32 where there is none"
    if recipe.model.prompt == "text" and (recipe.model.scratch or recipe.sft):
        what = "model.scratch has a tokenizer for chats" if recipe.model.scratch else "sft learns from chats"
        yield f"model.prompt: {what}; leave it out, or leave out model.prompt=text"
    if recipe.model.quantization is not None and recipe.model.lora is None:
        yield "model.quantization: weights in 4 bits are not trained themselves; add model.lora, or remove it"
    if recipe.model.quantization is not None and recipe.parallel.kind == "fsdp":
        yield "model.quantization: fsdp cannot spread weights in 4 bits; use parallel.kind=ddp, or remove it"


def _tasks(recipe: Recipe) -> Iterator[str]:
    played = {"train"} if recipe.collect or recipe.rl or recipe.model.scratch else set()
    played |= {recipe.evaluate.split} if recipe.evaluate else set()
    for split in recipe.tasks:
        if split not in played:
            found = ", ".join(sorted(played)) or "none"
            yield f"tasks.{split}: no stage plays this split; played are: {found}{nearest(split, played)}"


def _environments(recipe: Recipe) -> Iterator[str]:
    named: dict[str, Iterable[str]] = {}
    if recipe.collect:
        named["collect.episodes"] = recipe.collect.episodes
        if isinstance(recipe.collect.keep, dict):
            named["collect.keep"] = recipe.collect.keep
    if recipe.sft:
        named["sft.batch"] = recipe.sft.batch
    if recipe.rl:
        named["rl.groups"] = recipe.rl.groups
    if recipe.evaluate:
        named["evaluate.tasks"] = recipe.evaluate.tasks
    known = list(recipe.environments)
    for name, config in recipe.environments.items():
        if isinstance(config.env, list):
            if not config.env:
                yield f"environments.{name}.env: names no server; write http://host:port, or leave it out"
            for url in config.env:
                if "://" not in url:
                    yield f"environments.{name}.env: a list is of servers, http://host:port; found '{url}'"
    for key, names in named.items():
        for name in names:
            if name not in known:
                yield f"{key}.{name}: no such environment; there are {', '.join(known)}{nearest(name, known)}"
    used = {name for names in named.values() for name in names}
    if named:
        for name in known:
            if name not in used:
                yield f"environments.{name}: no stage plays it; name it in {' or '.join(named)}, or remove it"


def _counts(key: str, counts: dict[str, int]) -> Iterator[str]:
    if not counts:
        yield f"{key}: names no environment"
    for name, count in counts.items():
        if count < 1:
            yield f"{key}.{name}: must be at least 1, found {count}; to leave it out, leave out its key"


def _collect(recipe: Recipe) -> Iterator[str]:
    collect = recipe.collect
    if collect is None:
        return
    yield from _counts("collect.episodes", collect.episodes)
    if isinstance(collect.keep, dict):
        for name in collect.keep.keys() - collect.episodes.keys():
            if name in recipe.environments:
                yield f"collect.keep.{name}: collect.episodes plays no {name}; add it there or remove it here"
    if collect.policy not in ("teacher", "engine"):
        url, _, model = collect.policy.removeprefix("endpoint:").partition("#")
        if not collect.policy.startswith("endpoint:") or not url or not model:
            yield (
                f"collect.policy: must be teacher, engine or endpoint:URL#model, found {collect.policy!r}"
                f"{nearest(collect.policy, ['teacher', 'engine'])}"
            )


def _sft(recipe: Recipe) -> Iterator[str]:
    sft = recipe.sft
    if sft is None:
        return
    yield from _counts("sft.batch", sft.batch)
    yield from _optimizer("sft", sft.optimizer, sft.steps)
    if recipe.collect is None and not sft.sources:
        yield "sft: there is nothing to learn from; add collect, or trajectory files in sft.sources"
    if recipe.collect is not None and not sft.sources:
        for name in sft.batch:
            if name in recipe.environments and name not in recipe.collect.episodes:
                yield f"sft.batch.{name}: collect.episodes plays no {name}; add it there or remove it here"


def _rl(recipe: Recipe) -> Iterator[str]:
    rl = recipe.rl
    if rl is None:
        return
    yield from _counts("rl.groups", rl.groups)
    yield from _optimizer("rl", rl.optimizer, rl.steps * rl.minibatches * rl.epochs)
    units = sum(rl.groups.values()) * (rl.group_size if rl.minibatch_of == "episodes" else 1)
    if rl.minibatches > units:
        of = rl.minibatch_of
        yield f"rl.minibatches: {rl.minibatches} need as many {of} a step, and rl.groups makes {units}"
    yield from credit_problems(rl)
    yield from loss_problems(rl)
    yield from selection_problems(recipe)
    if rl.sampling.temperature == 0:
        yield "rl.sampling.temperature: siblings must differ to be compared, found 0; use 1.0"
    if rl.normalise_by_env and len(rl.groups) == 1:
        yield "rl.normalise_by_env: does nothing with a single environment in rl.groups; remove it"


def _optimizer(stage: str, optimizer: OptimizerConfig, updates: int) -> Iterator[str]:
    if optimizer.warmup_steps >= updates:
        yield (
            f"{stage}.optimizer.warmup_steps: {optimizer.warmup_steps} leave none of the stage's {updates} "
            "updates at the full rate; lower it"
        )


def _evaluate(recipe: Recipe) -> Iterator[str]:
    evaluate = recipe.evaluate
    if evaluate is None:
        return
    yield from _counts("evaluate.tasks", evaluate.tasks)
    if evaluate.sampling.temperature == 0:
        if evaluate.greedy:
            yield (
                "evaluate.greedy: at evaluate.sampling.temperature=0 it would play everything a second time; "
                "set it to false"
            )
        if evaluate.seeds > 1:
            yield f"evaluate.seeds: {evaluate.seeds} episodes of a task are alike at temperature 0; use 1"
    made = made_stages(recipe)
    if "stages" in evaluate.model_fields_set:
        if not evaluate.stages:
            yield f"evaluate.stages: names none; this run makes {', '.join(made)}"
        for stage in evaluate.stages:
            if stage not in made:
                yield (
                    f"evaluate.stages: this run makes no '{stage}', only {', '.join(made)}; "
                    f"add a section '{stage}', or leave it out"
                )


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where one of ``known`` is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
