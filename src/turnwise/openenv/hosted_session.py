"""`HostedSession`: a live environment of ours behind the server; see `turnwise.openenv.hosted`."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from turnwise.envs.session import Session
from turnwise.errors import ActionError, EnvError, ScoringError
from turnwise.openenv import faults, payload
from turnwise.openenv.served import Answer, CallAnswer
from turnwise.types import Content, ImageBlock, Message, Step, TextBlock, ToolCall, ToolResult

if TYPE_CHECKING:
    from turnwise.openenv.hosted import HostedSpec

_RESET_KEYS = ("seed", "episode_id", "split", "index", "task")
_ERROR_TYPES = {
    "malformed": "invalid_args",
    "unknown_tool": "tool_not_found",
    "bad_arguments": "invalid_args",
    "raised": "execution_error",
    "timeout": "timeout",
    "bad_result": "execution_error",
}
"""Our kinds of tool errors as OpenEnv names them."""


class HostedSession:
    """A `turnwise.openenv.served.ServedSession` over a session of `turnwise.envs`."""

    __slots__ = (
        "_counts", "_done", "_episode_id", "_limits", "_place", "_rewards", "_seed", "_served", "_session",
        "_steps", "_tool_calls",
    )  # fmt: skip

    def __init__(self, served: HostedSpec, session: Session) -> None:
        self._served = served
        self._session = session
        self._limits = served.spec.limits
        self._episode_id: str | None = None
        self._seed: int | None = None
        self._place: Mapping[str, Any] = {}
        self._steps = self._tool_calls = 0
        self._counts = True
        """Whether the environment's limits are ours to keep."""
        self._done = True
        self._rewards: dict[str, float | None] | ScoringError | None = None
        """Of this episode; None until it was scored."""

    async def reset(self, data: Mapping[str, Any]) -> Answer:
        """Start an episode."""
        unknown = [key for key in data if key not in _RESET_KEYS]
        if unknown:
            raise ActionError(f"reset takes {', '.join(_RESET_KEYS)}; found {', '.join(unknown)[:200]}")
        seed, episode_id = _checked_reset(data)
        if seed is None:
            seed = random.getrandbits(32)
        task, place = (
            (payload.read_task(data["task"]), {}) if "task" in data else await self._served.row(data, seed)
        )
        self._done = True
        with faults.telling():
            messages = await self._session.reset(task, seed)
        self._episode_id = episode_id or uuid.uuid4().hex
        self._seed, self._place, self._counts = seed, place, "task" not in data
        self._steps = self._tool_calls = 0
        self._rewards, self._done = None, False
        return Answer(observation=_seen(messages))

    def step(self, action: Mapping[str, Any], *, seconds: float | None = None) -> Coroutine[Any, Any, Answer]:
        """Act: call a tool, reply, or list the tools."""
        return self._step(action) if seconds is None else self._step_within(action, seconds)

    async def _step_within(self, action: Mapping[str, Any], seconds: float) -> Answer:
        try:
            async with asyncio.timeout(seconds):
                return await self._step(action)
        except TimeoutError:
            raise EnvError(
                f"environment {self._served.name}: no answer within timeout_s={seconds:g}"
            ) from None

    async def state(self) -> Mapping[str, Any]:
        """The episode's place; what the environment knows itself stays with it."""
        return {
            "episode_id": self._episode_id,
            "step_count": self._steps,
            "seed": self._seed,
            "done": self._done and self._episode_id is not None,
            **self._place,
        }

    async def list_tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools as OpenEnv writes them."""
        return [
            {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
            for tool in self._session.tools
        ]

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> CallAnswer:
        """One call of an agent; it may end the episode, as `step` may, and is told so in the next call.

        Agents cannot reset: where nobody has, the first call begins the episode. Each call is a turn.
        """
        if self._episode_id is None:
            await self.reset({})
        if self._done:
            return CallAnswer(content=[{"type": "text", "text": self._over()}], is_error=True)
        result, _ = await self._call(name, arguments)
        self._done = self._done or self._spent()
        return CallAnswer(
            content=_mcp_content(result.content),
            data=result.content if isinstance(result.content, str) else None,
            is_error=result.error is not None,
        )

    async def ask(self, method: str, data: Mapping[str, Any]) -> Any:
        """``reward``, ``teacher`` and ``state_key``; ``begin`` is the first an agent at ``/mcp`` is told."""
        if method == "begin":
            told = (await self.reset({})).observation["text"] if self._episode_id is None else ""
            return "\n\n".join(part for part in (self._session.system, told) if part)
        if method == "reward":
            return await self._scored()
        if method == "teacher":
            told = data.get("messages")
            if not isinstance(told, list):
                raise ActionError('teacher needs {"messages": […]}')
            messages = [payload.read_message(one) for one in told]
            with faults.telling():
                return payload.message(await self._session.teacher(messages))
        if method == "state_key":
            with faults.telling():
                return await self._session.state_key()
        raise ActionError(f"no such method: {method[:80]}; there are reward, teacher and state_key")

    async def metadata(self) -> Mapping[str, Any]:
        """What the class says: its instances say nothing of their own."""
        return await self._served.metadata()

    async def close(self) -> None:
        """Close the environment."""
        await self._session.close()

    # ------------------------------------------------------------------------------------------------

    async def _step(self, action: Mapping[str, Any]) -> Answer:
        kind = action.get("type")
        if kind == "call_tool":
            name, arguments = action.get("tool_name"), action.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ActionError('call_tool needs "tool_name", text, and "arguments", a JSON object')
            _only(action, "type", "tool_name", "arguments", "metadata")
            self._playing()
            result, step = await self._call(name, arguments)
            failed = result.error
            seen: dict[str, Any] = {
                "tool_name": name,
                "result": None if failed else payload.content(result.content),
                "error": {"error_type": _ERROR_TYPES[failed], "message": _text(result.content)}
                if failed
                else None,
            }
            return await self._answer(
                seen, step, error=failed, coerced=result.coerced, content=_blocks(result.content)
            )
        if kind == "list_tools":
            _only(action, "type", "metadata")
            return Answer(observation={"tools": await self.list_tools()}, done=False)
        text = _reply(action)
        self._playing()
        if not self._session.has_step:
            self._steps += 1
            return await self._answer({"text": "", "messages": []}, _ANSWERED)
        step = await self._session.step(Message.assistant(text))
        self._count_step(step)
        return await self._answer(_told(step.observation), step, error=step.info.get("error"))

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> tuple[ToolResult, Step | None]:
        result = await self._session.call(ToolCall(name=name, arguments=arguments))
        self._tool_calls += 1
        self._count_step(result.step)
        return result, result.step

    def _count_step(self, step: Step | None) -> None:
        self._steps += 1
        if step is not None and (step.terminated or step.truncated):
            self._done = True

    async def _answer(
        self,
        seen: Mapping[str, Any],
        step: Step | None,
        *,
        error: str | None = None,
        coerced: int = 0,
        content: list[dict[str, Any]] | None = None,
    ) -> Answer:
        paid, terminated, truncated, info = (
            (step.reward, step.terminated, step.truncated, step.info) if step else (None, False, False, {})
        )
        if not terminated and not truncated:
            truncated = self._spent()
        metadata: dict[str, Any] = {
            "terminated": terminated,
            "truncated": truncated,
            "step_reward": paid,
            "error": error,
            "coerced": coerced,
            "info": info,
        }
        if content is not None:
            metadata["content"] = content
        reward = paid
        if terminated or truncated:
            self._done = True
            try:
                own = await self._scored()
            except ScoringError as wrong:
                # The step itself is well, so its answer is sent; a sum without this part would be wrong.
                reward, metadata["rewards"], metadata["scoring_error"] = None, None, str(wrong)
            else:
                metadata["rewards"] = own
                parts = [part for part in (paid, *own.values()) if part is not None]
                reward = sum(parts) if parts else None
        return Answer(observation=seen, reward=reward, done=terminated or truncated, metadata=metadata)

    async def _scored(self) -> dict[str, float | None]:
        """The environment's own rewards, asked for once in an episode."""
        if self._episode_id is None:
            raise ActionError("there is no episode yet: reset first")
        self._done = True
        if self._rewards is None:
            try:
                with faults.telling():
                    self._rewards = await self._session.reward()
            except ScoringError as wrong:
                self._rewards = wrong
        if isinstance(self._rewards, ScoringError):
            raise self._rewards
        return self._rewards

    def _playing(self) -> None:
        if self._done:
            raise ActionError(self._over())

    def _over(self) -> str:
        if self._episode_id is None:
            return "there is no episode yet: reset first"
        if not self._spent():
            return "the episode is over: reset"
        turns, calls = self._limits.max_turns, self._limits.max_tool_calls
        reached = [f"max_turns={turns}"] if _reached(self._steps, turns) else []
        reached += [f"max_tool_calls={calls}"] if _reached(self._tool_calls, calls) else []
        return f"the episode is over, as it has reached {' and '.join(reached)}: reset"

    def _spent(self) -> bool:
        """Whether a limit is reached that is ours to keep."""
        return self._counts and (
            _reached(self._steps, self._limits.max_turns)
            or _reached(self._tool_calls, self._limits.max_tool_calls)
        )


_ANSWERED = Step(terminated=True)
"""How a reply ends an episode of an environment that answers none."""


def _checked_reset(data: Mapping[str, Any]) -> tuple[int | None, str | None]:
    for key, kind in (("seed", int), ("index", int), ("episode_id", str), ("split", str), ("task", dict)):
        value = data.get(key)
        if value is None and key != "task":
            continue
        if key in data and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ActionError(f"reset({key}=…) takes {kind.__name__}; found {type(value).__name__}")
    if (data.get("seed") or 0) < 0:
        raise ActionError(f"reset(seed={data['seed']}): a seed is 0 or more")
    if len(data.get("episode_id") or "") > 255:
        raise ActionError("reset(episode_id=…): at most 255 characters")
    if "task" in data and (data.get("split") is not None or data.get("index") is not None):
        raise ActionError("reset takes a task, or a split and an index; not both")
    return data.get("seed"), data.get("episode_id")


def _only(action: Mapping[str, Any], *allowed: str) -> None:
    if len(action) > len(allowed) or not action.keys() <= set(allowed):
        extra = ", ".join(str(key)[:40] for key in action if key not in allowed)
        raise ActionError(f"a '{action.get('type')}' action has no such fields: {extra}")


def _reply(action: Mapping[str, Any]) -> str:
    if len(action) == 2 and action.get("type") == "reply" and type(action.get("text")) is str:
        return cast(str, action["text"])  # As nearly all are.
    fields = {key: value for key, value in action.items() if key not in ("type", "metadata")}
    if action.get("type", "reply") == "reply" and len(fields) == 1:
        ((key, text),) = fields.items()
        if key in ("text", "message") and isinstance(text, str):
            return text
    raise ActionError(
        'an action is {"type": "call_tool", "tool_name": …, "arguments": {…}}, {"type": "list_tools"} or '
        f'{{"type": "reply", "text": …}}; found {str(dict(action))[:200]}'
    )


def _seen(messages: Sequence[Message]) -> dict[str, Any]:
    text = messages[0].text if len(messages) == 1 else "\n\n".join(one.text for one in messages)
    return {"text": text, "messages": [payload.message(one) for one in messages]}


def _told(observation: Content | list[Message]) -> dict[str, Any]:
    if isinstance(observation, str):  # As nearly all are: what `_seen` makes of a user message.
        return {
            "text": observation,
            "messages": [{"role": "user", "content": observation}][: bool(observation)],
        }
    if isinstance(observation, list):
        return _seen(observation)
    return _seen([Message.user(observation)] if observation else [])


def _blocks(content: Content) -> list[dict[str, Any]] | None:
    found = None if isinstance(content, str) else payload.content(content)
    return found if isinstance(found, list) else None


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))


def _mcp_content(content: Content) -> list[dict[str, Any]]:
    blocks = (TextBlock(text=content),) if isinstance(content, str) else content
    return [
        {"type": "image", "data": payload.data_url(block).partition(",")[2], "mimeType": block.media_type}
        if isinstance(block, ImageBlock)
        else {"type": "text", "text": block.text}
        for block in blocks
    ]


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit
