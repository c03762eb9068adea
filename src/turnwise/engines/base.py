"""The engine protocol: token ids in, sampled token ids out. Nothing here knows of messages or tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from turnwise.types import Completion, Sampling, WeightSource


class Engine(Protocol):
    """Samples from a model whose weights change between versions.

    Every method may be called from one event loop, concurrently. Cancelling the task that awaits `generate`
    frees what the request held.
    """

    max_context: int
    """The most tokens, prompt and reply together, that one request may reach."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        session: str | None = None,
        images: Sequence[str] = (),
    ) -> Completion:
        """Sample a reply to ``prompt_ids``.

        Args:
            prompt_ids: The whole context, also when a session holds its beginning.
            sampling: How to draw; ``stop_ids`` end the reply.
            session: Keeps the KV of prompt and reply for the next call under the same name, which prefills
                only what the context grew by. A session's calls must not overlap. None keeps nothing.
            images: Hashes of the images that ``prompt_ids`` holds placeholders for.

        Raises:
            ContextOverflowError: The prompt leaves no room for a single token.
            EngineError: The engine is closed, or failed while serving this request.
        """
        ...

    async def release(self, session: str) -> None:
        """Forget a session's KV. An unknown session is not an error: an engine may have evicted it."""
        ...

    async def pause(self) -> None:
        """Finish the running step and hold everything in flight where it is. Requests may still be queued."""
        ...

    async def resume(self) -> None:
        """Go on where `pause` held."""
        ...

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Replace the weights; KV computed under older weights is never used to sample under the new ones.

        A request in flight goes on under the new weights after its context was prefilled again; its
        completion says which version drew each token.
        """
        ...

    async def aclose(self) -> None:
        """Fail what is in flight with `EngineError` and free everything. May be called twice."""
        ...
