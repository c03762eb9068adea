"""An engine without a model, for tests and dry runs: replies come from a script, at once or after a delay.

    engine = ScriptedEngine([[5, 6, 2], [7, 2]])  # the first and the second turn of every session
    engine = ScriptedEngine(lambda call: [call.prompt_ids[-1], 2])
    engine = ScriptedEngine(script, delay=0.01, fault=lambda call: call.number == 3 and "server lost")

It keeps the protocol's promises: contexts overflow, limits cut, stop ids end, pause holds, versions are per
token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Completion, Finish, Sampling, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedCall:
    """One call of `ScriptedEngine.generate`, as a script sees it."""

    number: int
    """Of all calls, from 0."""
    turn: int
    """Of the session's calls, from 0; always 0 without a session."""
    session: str | None
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    version: int
    """Of the weights when the call began."""


Script = Callable[[ScriptedCall], Sequence[int]] | Sequence[Sequence[int]]
"""The reply to each call; or the replies of a session, turn by turn (the last one again where it is too
short)."""
Fault = Callable[[ScriptedCall], str | BaseException | bool | None]
"""What goes wrong with a call: an error, or the message of an `EngineError`; nothing where it is falsy."""


class ScriptedEngine:
    """Replies by script.

    Args:
        script: The replies.
        max_context: Most tokens of prompt and reply together.
        delay: Seconds before a reply; or a function of the call.
        fault: Which calls fail, and how.
        logprob: Of every token: a draw from a uniform distribution over two tokens unless said otherwise.
    """

    def __init__(
        self,
        script: Script,
        *,
        max_context: int = 4096,
        delay: float | Callable[[ScriptedCall], float] = 0.0,
        fault: Fault | None = None,
        logprob: float = -math.log(2),
    ) -> None:
        self.max_context = max_context
        self.version = 0
        self.calls: list[ScriptedCall] = []
        """Every call so far, failed ones included."""
        self.released: list[str] = []
        """Sessions that were released, in order."""
        self.running = 0
        """Calls under way."""
        self.most_running = 0
        """The most calls that were ever under way at once."""
        self._script = script
        self._delay = delay
        self._fault = fault
        self._logprob = logprob
        self._held: dict[str, int] = {}
        self._turns: dict[str, int] = {}
        self._busy: set[str] = set()
        self._going = asyncio.Event()
        self._going.set()
        self._closed = asyncio.Event()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        session: str | None = None,
        images: Sequence[str] = (),
    ) -> Completion:
        """The scripted reply, cut at a stop id or where a limit is; see `turnwise.engines.base.Engine`."""
        self._refuse_closed()
        if len(prompt_ids) >= self.max_context:
            raise ContextOverflowError(len(prompt_ids), self.max_context - 1, "the prompt")
        if session is not None and session in self._busy:
            raise EngineError(
                f"session '{session}' has a request under way; a session's calls must not overlap"
            )
        call = ScriptedCall(
            number=len(self.calls),
            turn=self._turns.get(session, 0) if session is not None else 0,
            session=session,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            version=self.version,
        )
        self.calls.append(call)
        if session is not None:
            self._busy.add(session)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._wait(self._delay(call) if callable(self._delay) else self._delay)
            return self._reply(call)
        finally:
            self.running -= 1
            if session is not None:
                self._busy.discard(session)

    async def release(self, session: str) -> None:
        """Forget a session: its next call is turn 0 again."""
        self.released.append(session)
        self._turns.pop(session, None)
        self._held.pop(session, None)

    async def pause(self) -> None:
        """Hold every reply back."""
        self._refuse_closed()
        self._going.clear()

    async def resume(self) -> None:
        """Let replies go."""
        self._refuse_closed()
        self._going.set()

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Read the source to its end, as a real engine would, and take the version."""
        self._refuse_closed()
        for _ in source.tensors():
            pass
        self.version = version
        self._held.clear()

    async def aclose(self) -> None:
        """Fail what is in flight; may be called twice."""
        self._closed.set()

    # -----------------------------------------------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._closed.is_set():
            raise EngineError("the engine is closed")

    async def _wait(self, seconds: float) -> None:
        """Sleep, then wait while paused; closing the engine ends both."""

        async def held() -> None:
            await asyncio.sleep(seconds)
            await self._going.wait()

        waits = {asyncio.ensure_future(held()), asyncio.ensure_future(self._closed.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._refuse_closed()

    def _reply(self, call: ScriptedCall) -> Completion:
        problem = self._fault(call) if self._fault is not None else None
        if isinstance(problem, BaseException):
            raise problem
        if problem:
            raise EngineError(problem if isinstance(problem, str) else f"call {call.number} fails by script")
        script = self._script
        ids = list(script(call) if callable(script) else script[min(call.turn, len(script) - 1)])
        if not ids:
            raise EngineError(f"the script has no tokens for call {call.number} (turn {call.turn})")
        stop = next((n for n, token in enumerate(ids) if token in call.sampling.stop_ids), None)
        finish = Finish.LENGTH if stop is None else Finish.STOP
        ids = ids if stop is None else ids[: stop + 1]
        limit = min(call.sampling.max_tokens, self.max_context - len(call.prompt_ids))
        if len(ids) > limit:
            ids, finish = ids[:limit], Finish.LENGTH
        cached = 0
        if call.session is not None:
            self._turns[call.session] = call.turn + 1
            cached = min(self._held.get(call.session, 0), len(call.prompt_ids) - 1)
            self._held[call.session] = len(call.prompt_ids) + len(ids) - 1
        return Completion(
            ids=ids,
            logprobs=[self._logprob] * len(ids),
            versions=[self.version] * len(ids),
            finish=finish,
            kept_mass=[1.0] * len(ids) if call.sampling.truncates else None,
            cached_tokens=cached,
        )
