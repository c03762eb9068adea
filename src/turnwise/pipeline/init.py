"""Init: a model from scratch, with a tokenizer fitted to what the environments' teachers say and hear.

teacher episodes ──> rendered text ──> tokenizer ──> random model ──> checkpoints/init-model-0
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from turnwise.chat.renderer import builtin_template
from turnwise.errors import RecipeError, StoreError, boundary
from turnwise.learn.scratch import blank_tokenizer, fit_tokenizer, write_model
from turnwise.pipeline.context import Run, final
from turnwise.rollout.play import play_all
from turnwise.rollout.policies import TeacherPolicy
from turnwise.rollout.record import EpisodeOrder
from turnwise.types import Sampling, ToolSchema, Trajectory

STAGE = "init"
DEFAULT_CONTEXT = 1024
"""Longest context that a from-scratch model is made for where ``engine.max_context`` does not say."""


async def init(run: Run) -> None:
    """Make the model that ``model.scratch`` describes."""
    config = run.recipe.model.scratch
    assert config is not None
    template = builtin_template("tiny")
    with run.stage(STAGE, total=1, unit="models") as info:
        episodes = await _teach(run, config.episodes)
        texts = list(await asyncio.to_thread(_render, episodes, template))
        tokenizer = fit_tokenizer(
            texts,
            vocab_size=config.vocab_size,
            keep_apart=sorted({word for one in episodes for word in _choices(one.tools)}),
            chat_template=template,
        )
        with run.directory.checkpoint(final(STAGE), 0) as path, boundary(StoreError, f"writing {path}"):
            write_model(
                config,
                tokenizer,
                path,
                max_context=run.recipe.engine.max_context or DEFAULT_CONTEXT,
                seed=run.recipe.seed,
            )
        info["vocabulary"] = len(tokenizer)


async def _teach(run: Run, count: int) -> list[Trajectory]:
    """Some teacher episodes of each environment; they are not kept."""
    orders = []
    for env in run.specs:
        stream = run.tasks(env, "train", STAGE)
        for i in range(count):
            group = f"init/{env}/{i}"
            orders.append(
                EpisodeOrder(id=f"{group}/s0", group_id=group, env=env, task=stream[i], seed=stream.seed(i))
            )
    played = play_all(
        orders,
        arenas=run.arenas(),
        policy=TeacherPolicy(),
        sampling=Sampling(seed=run.recipe.seed),
        sink=lambda _: None,
        concurrency=64,
    )
    # In the order of the orders, not of the finish: the tokenizer must come out the same every time.
    by_id = {one.id: one async for one in played}
    episodes = [by_id[order.id] for order in orders if not by_id[order.id].stop_reason.failed]
    if not episodes:
        raise RecipeError("model.scratch needs environments with teachers: none of their episodes succeeded")
    return episodes


def _render(episodes: list[Trajectory], template: str) -> Iterator[str]:
    """The conversations as the model will read them."""
    tokenizer = blank_tokenizer(template)
    for episode in episodes:
        messages = [message.as_dict() for segment in episode.segments for message in segment.messages]
        tools = [tool.as_function() for tool in episode.tools]
        yield tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)


def _choices(tools: tuple[ToolSchema, ...]) -> Iterator[str]:
    """The words that a policy chooses between: the values of every enum in the tools' parameters."""
    for tool in tools:
        for parameter in tool.parameters.get("properties", {}).values():
            yield from (str(value) for value in parameter.get("enum", ()))
