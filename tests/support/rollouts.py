"""Environments to play, and a policy on a real renderer whose engine says what a test wants it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.engines.scripted import ScriptedCall, ScriptedEngine
from turnwise.envs.base import Env, tool
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import EnvLostError
from turnwise.rollout.arena import Arena
from turnwise.rollout.episode import play_episode
from turnwise.rollout.policies import ModelPolicy
from turnwise.rollout.policy import Policy
from turnwise.rollout.record import EpisodeOrder
from turnwise.types import Message, Sampling, Step, Task, ToolCall, Trajectory


class Shop(Env):
    """Prices by a tool, an answer by a step; tools for everything that may go wrong."""

    inline = True
    opened: ClassVar[list[Shop]] = []

    def __init__(self) -> None:
        self.closed = False
        self.log: list[str] = []
        Shop.opened.append(self)

    def reset(self, task: Task) -> str:
        self.task, self.log = task, []
        return f"What does {task.get('item', 'tea')} cost?"

    @tool
    def price(self, item: str) -> int:
        """Look up a price."""
        self.log.append(item)
        return {"tea": 3, "jam": 4}[item]

    @tool
    def buy(self, item: str) -> Step:
        """Buy, which ends the episode."""
        self.log.append(f"buy {item}")
        return Step("bought", reward=1.0, terminated=True)

    @tool
    def tip(self, amount: float) -> Step:
        """Pay a little on the way."""
        return Step("thanks", reward=amount, info={"tip": amount, "note": "kind"})

    @tool
    def fuel(self) -> Step:
        """Run out of fuel."""
        return Step("empty", truncated=True)

    @tool
    def lose(self) -> str:
        """Lose the server."""
        raise EnvLostError("the server is gone")

    @tool
    async def wait(self, seconds: float) -> str:
        """Wait without blocking."""
        await asyncio.sleep(seconds)
        return "waited"

    def step(self, reply: str) -> Step:
        right = reply.strip() == "3"
        return Step("right" if right else "wrong", reward=float(right), terminated=right)

    def close(self) -> None:
        self.closed = True


class Blocking(Env):
    """A sync tool that the policy can make hang on a thread; its own reward at the end."""

    def reset(self, task: Task) -> str:
        return "Run something."

    @tool
    def run(self, seconds: float) -> Step:
        """Sleep that long."""
        time.sleep(seconds)
        return Step("done", reward=0.25)

    def reward(self) -> float:
        return 1.0


class Answer(Env):
    """No step: a reply without calls is the answer, scored by `reward`."""

    inline = True

    def reset(self, task: Task) -> str:
        self.task = task
        return "How much?"

    @tool
    def look(self) -> str:
        """Look it up."""
        return "3"

    def reward(self) -> float | dict[str, float]:
        own: Any = self.task.get("reward", 0.5)
        return own

    def teacher(self, messages: Sequence[Message]) -> str:
        return f"the answer after {len(messages)}"

    def state_key(self) -> str:
        return "only"


def arena(env_class: Any = Shop, *, name: str | None = None, **options: Any) -> Arena:
    """An arena; ``limits`` may be a dict of what to change."""
    spec = make(env_class, name=name or env_class.__name__.lower())
    limits = options.pop("limits", None)
    if isinstance(limits, dict):
        limits = Limits(**{"max_turns": spec.limits.max_turns, **limits})
    return Arena(spec.name, spec, limits=limits, **options)


def order(
    id: str = "t/0/s0", *, env: str = "shop", task: Task | None = None, seed: int = 7, sibling: int = 0
) -> EpisodeOrder:
    """An episode of the group ``t/0``."""
    return EpisodeOrder(
        id=id, group_id=id.rpartition("/")[0], env=env, task=task or {}, seed=seed, sibling=sibling
    )


def play(
    policy: Policy, where: Arena, *, task: Task | None = None, sampling: Sampling | None = None
) -> Trajectory:
    """One episode; asserts that the sink got it, once."""
    seen: list[Trajectory] = []

    async def run() -> Trajectory:
        try:
            return await play_episode(
                order(env=where.name, task=task),
                arena=where,
                policy=policy,
                sampling=sampling or Sampling(),
                sink=seen.append,
            )
        finally:
            await where.aclose()

    played = asyncio.run(run())
    assert [one is played for one in seen] == [True]
    return played


def call(name: str, **arguments: Any) -> ToolCall:
    """A well-formed call without an id."""
    return ToolCall(name=name, arguments=arguments)


def calls(*made: ToolCall) -> Message:
    """A reply of nothing but calls."""
    return Message.assistant("", *made)


@cache
def renderer() -> TemplateRenderer:
    """ChatML with Hermes tool calls on a tiny tokenizer."""
    from tests.support.tokenizers import tiny_tokenizer

    return load_renderer(tiny_tokenizer())


def said(*replies: Message | str) -> Callable[[ScriptedCall], list[int]]:
    """A script for `ScriptedEngine`: the tokens of each reply, by turn."""
    ids = [renderer().reply(Message.assistant(one) if isinstance(one, str) else one) for one in replies]
    return lambda made: ids[min(made.turn, len(ids) - 1)]


def model(*replies: Message | str, **options: Any) -> ModelPolicy:
    """A `ModelPolicy` that says these replies in each episode."""
    return ModelPolicy(ScriptedEngine(said(*replies), **options), renderer())
