"""`PeerSession`: an environment on a Turnwise server; an episode there is what it would be here.

Beside OpenEnv's messages a Turnwise server says how an episode ended, what its own rewards are by name, which
kind of error a tool had; and it answers for the teacher and for the key of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from turnwise.envs import observe
from turnwise.envs.session import Limits
from turnwise.errors import ActionError, EnvError, ImageError, ScoringError
from turnwise.openenv import payload
from turnwise.openenv.client.session import Remote, RemoteSession, failure
from turnwise.types import Content, Message, Step, Task

T = TypeVar("T")

CUT_THERE = Limits().max_observation
"""What a server keeps of an observation: more is cut there, and cutting it here again would be wrong."""


class PeerSession(RemoteSession):
    """See `RemoteSession`."""

    margin = 3.0
    """The server ends a call at its own deadline, a second or two late where a process has to be killed."""

    def __init__(self, remote: Remote, limits: Limits) -> None:
        super().__init__(remote, limits)
        self._rewards: dict[str, float | None] | None = None
        self._scoring_error: str | None = None
        self._keyed = True

    async def step(self, reply: Message) -> Step:
        """Answer a reply."""
        what = self._what("step")
        data = await self._answered({"type": "reply", "text": reply.text}, what)
        return self._step(self._observation(data, what), data["metadata"])

    async def reward(self) -> dict[str, float | None]:
        """The environment's own rewards: those that came with the end, else asked for."""
        try:
            if self._scoring_error is not None:
                raise ScoringError(self._scoring_error)
            if self._rewards is None:
                self._rewards = dict(await self._asked("reward"))
            return self._rewards
        finally:
            self._remote.servers.rest(self)

    async def teacher(self, messages: Sequence[Message]) -> Message:
        """What the environment's demonstrator says."""
        said = await self._asked("teacher", messages=[payload.message(one) for one in messages])
        return _read(lambda: payload.read_message(said), self._what("teacher"))

    async def state_key(self) -> str | None:
        """The key of the present state; an environment that defines none is asked once."""
        if not self._keyed:
            return None
        key: str | None = await self._asked("state_key")
        self._keyed = key is not None
        return key

    # ------------------------------------------------------------------------------------------------

    def _reset_data(self, task: Task, seed: int) -> dict[str, Any]:
        row = self._row(task)
        self._rewards = self._scoring_error = None
        # A row that says nothing, where there are rows: the server takes its own, by the seed.
        return (
            {"seed": seed}
            if not row and self._remote.about.splits
            else {"seed": seed, "task": payload.task(row)}
        )

    async def _begun(self, data: Mapping[str, Any], what: str) -> tuple[Message, ...]:
        return self._messages(data, what)

    async def _called(
        self, name: str, arguments: Mapping[str, Any], what: str
    ) -> tuple[Content, str | None, Step | None]:
        data = await self._answered(
            {"type": "call_tool", "tool_name": name, "arguments": dict(arguments)}, what
        )
        observation, metadata = data["observation"], data["metadata"]
        error = metadata["error"]
        if error is not None:
            return observation["error"]["message"], error, None
        content = self._limited(_read(lambda: payload.read_content(observation["result"]), what))
        step = self._step(content, metadata)
        bare = step.reward is None and not (step.terminated or step.truncated or step.info)
        return content, None, None if bare else step

    async def _answered(self, action: Mapping[str, Any], what: str) -> Mapping[str, Any]:
        reply = await self._ask("step", action)
        if reply["type"] == "error":
            raise failure(reply, what)
        data: Mapping[str, Any] = reply["data"]
        if data["done"]:
            self._rewards = data["metadata"].get("rewards")
            self._scoring_error = data["metadata"].get("scoring_error")
        return data

    async def _asked(self, method: str, **more: Any) -> Any:
        reply = await self._ask("turnwise", {"method": method, **more})
        if reply["type"] == "error":
            raise failure(reply, self._what(method))
        return reply["data"]

    def _observation(self, data: Mapping[str, Any], what: str) -> Content | list[Message]:
        """What the environment's own step returned: text and blocks came as one user message."""
        text = data["observation"]["text"]
        plain = [{"role": "user", "content": text}]
        if isinstance(text, str) and text and data["observation"]["messages"] == plain:
            return text  # As nearly always.
        told = self._messages(data, what)
        if len(told) == 1 and told[0] == Message.user(told[0].content):
            return told[0].content
        return list(told) or ""

    def _messages(self, data: Mapping[str, Any], what: str) -> tuple[Message, ...]:
        told = data["observation"]["messages"]
        return tuple(_read(lambda: [payload.read_message(one) for one in told], what))

    def _step(self, observation: Content | list[Message], metadata: Mapping[str, Any]) -> Step:
        return Step(
            observation,
            reward=metadata["step_reward"],
            terminated=metadata["terminated"],
            truncated=metadata["truncated"],
            info=metadata["info"],
        )

    def _limited(self, content: Content) -> Content:
        limit = self._limits.max_observation
        return content if limit >= CUT_THERE else observe.observation(content, limit)


def _read(read: Callable[[], T], what: str) -> T:
    try:
        return read()
    except (ActionError, ImageError) as cause:
        raise EnvError(f"{what}: the server sent {cause}") from cause
