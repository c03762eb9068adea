"""`EndpointPolicy`: any OpenAI-compatible ``/chat/completions``, for collecting and evaluating, never for RL.

policy = EndpointPolicy("https://api.example.com/v1", "some-model", api_key_env="EXAMPLE_API_KEY")
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Mapping
from typing import Any

import httpx

from turnwise.chat.dialects.json_text import DEEPEST, too_deep
from turnwise.errors import ContextOverflowError, PolicyError, RecipeError, boundary
from turnwise.rollout.policy import Context
from turnwise.types import Finish, ImageBlock, Message, Reply, Sampling, ToolCall

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that another try may cure."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, at most, whatever the server asks for."""
SHOWN = 300
"""Characters of a server's error that are shown."""


class EndpointPolicy:
    """Asks a chat endpoint for each reply. Its replies have no ids, so they are demonstrations.

    Args:
        url: The API's base, such as ``http://localhost:8000/v1``.
        model: The model's name there.
        api_key_env: Environment variable that holds the key; no key is sent if None.
        seconds: Deadline of one request.
        retries: Further tries after a status that may pass, or a lost connection.
        backoff: Seconds before the second try; doubled for each further one, with some chance.
        extra: Further keys of the request body, such as ``{"reasoning_effort": "low"}``.
        connections: Requests at one time.

    Raises:
        RecipeError: ``api_key_env`` names a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        seconds: float = 300.0,
        retries: int = 5,
        backoff: float = 1.0,
        extra: Mapping[str, Any] | None = None,
        connections: int = 256,
    ) -> None:
        headers = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise RecipeError(f"the endpoint's key: environment variable {api_key_env} is not set")
            headers["Authorization"] = f"Bearer {key}"
        self.name = f"endpoint:{model}"
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.retries, self.backoff, self.extra = retries, backoff, dict(extra or {})
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # Waiting for a free connection is our own queue, so it has no deadline.
        timeout = httpx.Timeout(seconds, pool=None)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def act(self, context: Context) -> Reply:
        """Send the conversation, retry what may pass, read the answer."""
        body = {
            "model": self.model,
            "messages": [_as_json(message) for message in context.messages],
            **({"tools": [tool.as_function() for tool in context.tools]} if context.tools else {}),
            **_sampling(context.sampling),
            **self.extra,
        }
        answer = await self._ask(body)
        with boundary(PolicyError, f"{self.name}: the answer is no chat completion: {str(answer)[:SHOWN]}"):
            choice = answer["choices"][0]
            return Reply(
                message=_message(choice["message"]),
                finish=Finish.LENGTH if choice.get("finish_reason") == "length" else Finish.STOP,
            )

    async def release(self, session: str) -> None:
        """Nothing is held: each request has the whole conversation."""

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, body: Mapping[str, Any]) -> Any:
        problem = ""
        for attempt in range(self.retries + 1):
            asked_for: str | None = None
            try:
                response = await self._client.post(self.url, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    with boundary(PolicyError, f"{self.name}: {self.url} answered {response.text[:SHOWN]!r}"):
                        return response.json()
                problem = f"status {response.status_code}: {response.text[:SHOWN]}"
                if response.status_code not in RETRIED:
                    _raise_overflow(response.text)
                    raise PolicyError(f"{self.name}: {self.url}: {problem}")
                asked_for = response.headers.get("retry-after")
            if attempt < self.retries:
                await asyncio.sleep(self._wait(attempt, asked_for))
        raise PolicyError(f"{self.name}: {self.url}: {self.retries + 1} tries failed; the last: {problem}")

    def _wait(self, attempt: int, asked_for: str | None) -> float:
        """Seconds before the next try: what the server asks for, or doubling; spread by chance."""
        seconds: float = self.backoff * 2**attempt
        if asked_for is not None and re.fullmatch(r"\d+(\.\d+)?", asked_for):
            seconds = max(seconds, float(asked_for))
        return min(seconds, LONGEST_WAIT) * random.uniform(0.75, 1.25)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """What the OpenAI API knows; the rest only where it is set, for servers that know more."""
    body: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k > 0:
        body["top_k"] = sampling.top_k
    if sampling.min_p > 0:
        body["min_p"] = sampling.min_p
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return body


def _as_json(message: Message) -> dict[str, Any]:
    if not isinstance(message.content, str) and any(
        isinstance(block, ImageBlock) for block in message.content
    ):
        raise PolicyError("endpoints are sent text only so far; this conversation has images")
    out: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                # A malformed call goes back as it was written: the server reads strings.
                "function": {
                    "name": call.name,
                    "arguments": call.raw if call.error else json.dumps(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out


def _message(said: Mapping[str, Any]) -> Message:
    calls = [_call(one) for one in said.get("tool_calls") or ()]
    reasoning = said.get("reasoning_content") or said.get("reasoning")
    return Message.assistant(said.get("content") or "", *calls, reasoning=reasoning)


def _call(said: Mapping[str, Any]) -> ToolCall:
    function, call_id = said["function"], said.get("id") or ""
    name = function.get("name")
    written = function.get("arguments") or "{}"
    if not isinstance(written, str):  # Some servers send the object itself.
        written = json.dumps(written)
    try:
        arguments = json.loads(written)
    except ValueError as error:
        problem = f"arguments are not valid JSON: {error}"
    except RecursionError:
        problem = "arguments are nested too deeply"
    else:
        if not isinstance(name, str) or not name:
            problem = "the call has no name"
        elif not isinstance(arguments, dict):
            problem = f"arguments must be a JSON object; found {written[:80]}"
        elif too_deep(arguments):
            problem = f"arguments are nested too deeply: {DEEPEST} levels are allowed"
        else:
            return ToolCall(name=name, arguments=arguments, id=call_id)
    return ToolCall(
        name=name if isinstance(name, str) else "", arguments={}, id=call_id, error=problem, raw=written
    )


def _raise_overflow(text: str) -> None:
    """A context that does not fit is no fault of the server's: the policy wrote it."""
    if "context_length_exceeded" in text or "maximum context length" in text:
        numbers = [int(number) for number in re.findall(r"\d{3,}", text)]
        allowed = min(numbers, default=0)
        raise ContextOverflowError(max(numbers, default=0), allowed, "the conversation sent to the endpoint")
