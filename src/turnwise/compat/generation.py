"""`generate_rollout_completions`: what a ``rollout_func`` samples with, on whichever engine the run has.

TRL's guides import a function of this name from TRL, which no longer has one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from turnwise.envs.opening import opening
from turnwise.errors import ContextOverflowError, PolicyError, RecipeError
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import Message, Sampling

OVERRIDES = {
    "max_tokens": "max_tokens", "max_new_tokens": "max_tokens", "max_completion_length": "max_tokens",
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
}  # fmt: skip
"""Keys of ``generation_overrides``, and the settings that they change."""


@dataclass(slots=True, eq=False)
class Source:
    """What `generate_rollout_completions` samples with while a ``rollout_func`` runs."""

    loop: asyncio.AbstractEventLoop
    policy: ModelPolicy
    sampling: Sampling
    call: str
    """Name of the call, the same when a run is resumed."""
    made: int = 0
    """Completions so far."""
    open: bool = True


SOURCES: WeakKeyDictionary[Any, Source] = WeakKeyDictionary()
"""By trainer."""


def generate_rollout_completions(
    trainer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    generation_overrides: Mapping[str, Any] | None = None,
    as_chat: bool | None = None,
) -> list[dict[str, Any]]:
    """One completion for each prompt, by the trainer's engine, in the present weights.

    May be called from any thread while ``rollout_func`` runs, but not on the event loop itself.

    Args:
        trainer: As the ``rollout_func`` got it.
        prompts: Conversations, or texts that are read as they are.
        generation_overrides: In place of the trainer's own: max_tokens, temperature, top_p, top_k, min_p,
            seed.
        as_chat: Take a text for a user's message; False refuses conversations.

    Returns:
        For each prompt a dictionary with ``prompt_ids``, ``completion_ids`` (the stop token included),
        ``logprobs`` (one for each of these, at the sampling temperature) and ``text`` (without special
        tokens).

    Raises:
        PolicyError: No ``rollout_func`` of this trainer runs, or this is the event loop's own thread.
        RecipeError: An override that is not known.
        ContextOverflowError: A prompt leaves no room for a reply.
    """
    source = SOURCES.get(trainer)
    if source is None or not source.open:
        raise PolicyError("generate_rollout_completions is for a rollout_func, while the trainer runs it")
    with suppress(RuntimeError):
        if asyncio.get_running_loop() is source.loop:
            raise PolicyError(
                "generate_rollout_completions would wait for the event loop that it runs on; in an async "
                "rollout_func: await asyncio.to_thread(generate_rollout_completions, trainer, prompts)"
            )
    sampling = _overridden(source.sampling, generation_overrides or {})
    seeded = "seed" not in (generation_overrides or {})
    work = _completions(source, list(prompts), sampling, as_chat, seeded=seeded)
    return asyncio.run_coroutine_threadsafe(work, source.loop).result()


async def _completions(
    source: Source, prompts: Sequence[Any], sampling: Sampling, as_chat: bool | None, *, seeded: bool
) -> list[dict[str, Any]]:
    first, source.made = source.made, source.made + len(prompts)
    rendered = [_rendered(source.policy, prompt, as_chat) for prompt in prompts]
    return list(
        await asyncio.gather(
            *(
                _completion(
                    source, ids, _seeded(sampling, f"{source.call}/{first + n}") if seeded else sampling
                )
                for n, ids in enumerate(rendered)
            )
        )
    )


async def _completion(source: Source, ids: list[int], sampling: Sampling) -> dict[str, Any]:
    engine, renderer = source.policy.engine, source.policy.renderer
    room = engine.max_context - len(ids)
    if room < 1:
        raise ContextOverflowError(len(ids), engine.max_context - 1, "the prompt")
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_ids=tuple(renderer.stop_ids))
    made = await engine.generate(ids, sampling)
    tokenizer = _tokenizer(source.policy)
    return {
        "prompt_ids": ids,
        "completion_ids": made.ids,
        "logprobs": made.logprobs,
        "text": tokenizer.decode(made.ids, skip_special_tokens=True),
    }


def _tokenizer(policy: ModelPolicy) -> Any:
    return policy.renderer.tokenizer  # type: ignore[attr-defined]  # every renderer of a run has one


def _rendered(policy: ModelPolicy, prompt: Any, as_chat: bool | None) -> list[int]:
    if isinstance(prompt, str) and not as_chat:
        tokenizer = _tokenizer(policy)
        # Who applied the chat template himself has its first token in the text already.
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])
    if as_chat is False:
        raise RecipeError("as_chat=False takes texts; found a conversation: leave as_chat out")
    messages = [Message.user(prompt)] if isinstance(prompt, str) else opening(prompt, None)
    assert isinstance(messages, list)
    return policy.renderer.prompt(messages).ids


def _overridden(sampling: Sampling, overrides: Mapping[str, Any]) -> Sampling:
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise RecipeError(
            f"generation_overrides: unknown {', '.join(unknown)}; known: {', '.join(OVERRIDES)}"
        )
    changes = {OVERRIDES[name]: value for name, value in overrides.items() if value is not None}
    if changes.get("top_k", 0) < 0:  # vLLM's way of keeping every token.
        changes["top_k"] = 0
    return replace(sampling, **changes)


def _seeded(sampling: Sampling, what: str) -> Sampling:
    text = f"{sampling.seed}/{what}"
    return replace(sampling, seed=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1)
