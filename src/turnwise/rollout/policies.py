"""The policies that need no network: an engine with a renderer, a teacher, a script, a person, a baseline.

    policy = ModelPolicy(engine, renderer)                  # for RL: replies carry ids, logprobs and versions
    policy = TeacherPolicy()                                # what the environment's own demonstrator says
    policy = ScriptedPolicy(["Paris"])                      # for tests

Endpoints are in `turnwise.rollout.endpoint`.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from turnwise.chat.base import Renderer
from turnwise.engines.base import Engine
from turnwise.errors import ContextOverflowError, PolicyError, boundary
from turnwise.rollout.policy import Context
from turnwise.types import Message, Rendered, Reply

Answer = Reply | Message | str
"""What a script or a person may say; text is a message without tool calls."""


class ModelPolicy:
    """An engine that reads and speaks through a renderer. The only policy whose replies RL can learn from.

    The held tokens are extended by a bridge and never rendered again. Where the template cannot be bridged,
    the conversation is rendered anew and the reply starts a new segment.
    """

    name = "engine"

    def __init__(self, engine: Engine, renderer: Renderer) -> None:
        self.engine, self.renderer = engine, renderer

    async def act(self, context: Context) -> Reply:
        """Render what is new, sample, parse."""
        rendered, held, new_segment = self._render(context)
        prompt_ids = [*held, *rendered.ids]
        allowed = self.engine.max_context
        if context.max_context is not None:
            allowed = min(allowed, context.max_context)
        room = allowed - len(prompt_ids)
        if room < 1:
            raise ContextOverflowError(len(prompt_ids), allowed - 1, f"the context at turn {context.turn}")
        images = rendered.images if not held else (*context.held_images, *rendered.images)
        sampling = context.sampling
        completion = await self.engine.generate(
            prompt_ids,
            replace(
                sampling,
                max_tokens=min(sampling.max_tokens, room),
                stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *self.renderer.stop_ids))),
            ),
            session=context.session,
            images=images,
        )
        message = self.renderer.parse(completion.ids, context.tools, prompt_ids)
        # A parser numbers the calls of its one reply; these names are unique in the episode. What the policy
        # itself called a call (Mistral's do) stays at the end: its result has to answer to that.
        calls = [
            replace(call, id=f"t{context.turn}c{i}" + ("" if call.id == f"call_{i}" else f"-{call.id}"))
            for i, call in enumerate(message.tool_calls)
        ]
        return Reply(
            message=replace(message, tool_calls=tuple(calls)),
            context_ids=rendered.ids,
            new_segment=new_segment,
            ids=completion.ids,
            logprobs=completion.logprobs,
            versions=completion.versions,
            kept_mass=completion.kept_mass,
            finish=completion.finish,
            images=rendered.images,
            cached_tokens=completion.cached_tokens,
        )

    async def release(self, session: str) -> None:
        """Let the engine forget the episode's KV."""
        await self.engine.release(session)

    def _render(self, context: Context) -> tuple[Rendered, Sequence[int], bool]:
        """What to append, to which held tokens, and whether that starts a new segment."""
        if context.held_ids is not None:
            bridge = self.renderer.bridge(context.held_ids, context.new_messages, context.tools)
            if bridge is not None:
                return bridge, context.held_ids, False
        return self.renderer.prompt(context.messages, context.tools), (), context.held_ids is not None


class TeacherPolicy:
    """Passes on what the environment's own demonstrator says."""

    name = "teacher"

    async def act(self, context: Context) -> Reply:
        """Ask the environment's ``teacher``."""
        if context.teacher is None:
            raise PolicyError("a teacher was asked outside of an episode; play it with `play_episode`")
        return Reply(message=await context.teacher(context.messages))

    async def release(self, session: str) -> None:
        """Nothing is held."""


class ScriptedPolicy:
    """Says what it was told to.

    Args:
        script: The replies of every episode, in order; or a function of the context, sync or async.
        name: Stored on the trajectories.
    """

    def __init__(
        self,
        script: Sequence[Answer] | Callable[[Context], Answer | Awaitable[Answer]],
        *,
        name: str = "script",
    ) -> None:
        self.script, self.name = script, name

    async def act(self, context: Context) -> Reply:
        """The script's next reply."""
        if not callable(self.script):
            if context.turn >= len(self.script):
                raise PolicyError(f"the script ended after {len(self.script)} replies; one more was needed")
            return as_reply(self.script[context.turn])
        answer = self.script(context)
        return as_reply(await answer if inspect.isawaitable(answer) else answer)

    async def release(self, session: str) -> None:
        """Nothing is held."""


class PersonPolicy:
    """Asks a person.

    Args:
        ask: Shows the context and returns the answer. A sync function runs on a thread of its own, so that
            waiting at a prompt holds up nobody else.
    """

    name = "person"

    def __init__(self, ask: Callable[[Context], Answer | Awaitable[Answer]]) -> None:
        self.ask = ask

    async def act(self, context: Context) -> Reply:
        """Wait for the answer."""
        with boundary(PolicyError, "the person's prompt"):
            if inspect.iscoroutinefunction(self.ask):
                return as_reply(await self.ask(context))
            answer = await asyncio.to_thread(self.ask, context)
            return as_reply(await answer if inspect.isawaitable(answer) else answer)

    async def release(self, session: str) -> None:
        """Nothing is held."""


class BaselinePolicy:
    """What stands beside a policy in every table: play by chance, or the same reply every time.

    Args:
        kind: ``random`` or ``constant``.
        reply: From a generator to a reply, as `turnwise.envs.baselines.baselines` finds them.
    """

    def __init__(self, kind: str, reply: Callable[[random.Random], Message]) -> None:
        self.name, self.reply = f"baseline:{kind}", reply

    async def act(self, context: Context) -> Reply:
        """A reply without a look at the conversation; the generator is seeded for this turn."""
        return Reply(message=self.reply(random.Random(context.sampling.seed)))

    async def release(self, session: str) -> None:
        """Nothing is held."""


def as_reply(answer: Answer) -> Reply:
    """Text or a message as a demonstrated reply; a reply as it is."""
    if isinstance(answer, Reply):
        return answer
    return Reply(message=Message.assistant(answer) if isinstance(answer, str) else answer)
