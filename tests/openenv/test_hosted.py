"""Environments of ours behind the server: what is paid and when, ends, limits, tasks, what peers ask."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from turnwise.envs.base import Env, tool
from turnwise.errors import ActionError, EnvError, ScoringError
from turnwise.openenv import payload
from turnwise.openenv.hosted import hosted
from turnwise.openenv.hosted_session import HostedSession
from turnwise.openenv.served import Answer
from turnwise.types import Message, Step


class Shop(Env):
    """Buy what is asked for.

    More about it.
    """

    inline = True
    max_turns = 4
    max_tool_calls = 3
    system = "You buy."

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return [{"item": f"{split}{number}"} for number in range(3)]

    def reset(self, task: Mapping[str, Any]) -> str:
        self.item, self.asked = task["item"], 0
        return f"buy {self.item}"

    @tool
    def price(self, item: str) -> int:
        """Its price.

        Args:
            item: What to buy.
        """
        return len(item)

    @tool
    def pay(self, item: str) -> Step:
        """Buy it."""
        return Step("bought", reward=0.25, terminated=True, info={"paid": 3})

    def step(self, reply: str) -> Step:
        return Step(f"you said {reply}", reward=0.1)

    def reward(self) -> dict[str, float | None]:
        self.asked += 1
        if self.item == "broken":
            raise ValueError("no till")
        return {"right": 1.0, "asked": float(self.asked), "style": None}

    def teacher(self, messages: Sequence[Message]) -> str:
        return f"after {len(messages)}: {self.item}"

    def state_key(self) -> str:
        return self.item


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": name, "arguments": arguments}


def play(*steps: Any, spec: Any = Shop, reset: Mapping[str, Any] | None = None) -> list[Any]:
    """What a reset and steps are answered with; methods of a session may stand among them."""

    async def run() -> list[Any]:
        session = await hosted(spec).open()
        try:
            out: list[Any] = [await session.reset(reset or {})]
            for one in steps:
                answer = await (one(session) if callable(one) else session.step(one))
                out.append(answer)
            return out
        finally:
            await session.close()

    return asyncio.run(run())


def test_a_step_that_ends_pays_the_rewards_of_the_end_too() -> None:
    _, answer = play(call("pay", item="x"))
    assert (answer.reward, answer.done) == (0.25 + 1.0 + 1.0, True)
    assert answer.metadata["step_reward"] == 0.25
    assert answer.metadata["rewards"] == {"right": 1.0, "asked": 1.0, "style": None}
    assert answer.metadata["terminated"] and not answer.metadata["truncated"]
    assert answer.metadata["info"] == {"paid": 3}


def test_rewards_are_asked_for_once() -> None:
    async def ask(session: HostedSession) -> Any:
        return await session.ask("reward", {})

    _, answer, asked, again = play(call("pay", item="x"), ask, ask)
    assert asked == again == answer.metadata["rewards"]


def test_what_cannot_be_scored_has_no_reward_and_says_why() -> None:
    async def ask(session: HostedSession) -> Any:
        with pytest.raises(ScoringError, match="no till"):
            await session.ask("reward", {})

    _, answer, _ = play(call("pay", item="x"), ask, reset={"task": {"item": "broken"}})
    assert answer.done and answer.reward is None and answer.metadata["step_reward"] == 0.25
    assert "no till" in answer.metadata["scoring_error"]


def test_limits_truncate_who_does_not_count() -> None:
    *_, third, fourth = play(*({"text": "hm"},) * 4)
    assert (third.done, fourth.done) == (False, True)
    assert fourth.metadata["truncated"] and not fourth.metadata["terminated"]
    assert fourth.metadata["rewards"] is not None
    *_, second, third = play(*(call("price", item="x"),) * 3)
    assert (second.done, third.done) == (False, True)


def test_who_brings_the_task_counts() -> None:
    answers = play(*({"text": "hm"},) * 6, reset={"task": {"item": "tea"}})
    assert answers[0].observation["text"] == "buy tea"
    assert not any(answer.done for answer in answers)


def test_after_the_end_nothing_runs() -> None:
    async def late(session: HostedSession) -> Any:
        with pytest.raises(ActionError, match="over"):
            await session.step(call("pay", item="x"))
        assert (await session.call_tool("pay", {"item": "x"})).is_error
        return await session.state()

    *_, state = play(call("pay", item="x"), late)
    assert state["step_count"] == 1 and state["done"]


def test_before_a_reset_only_tools_are_listed() -> None:
    async def run() -> None:
        session = await hosted(Shop).open()
        listed: Answer = await session.step({"type": "list_tools"})
        assert [one["name"] for one in listed.observation["tools"]] == ["price", "pay"]
        assert listed.observation["tools"][0]["input_schema"]["required"] == ["item"]
        for refused in (session.step({"text": "hi"}), session.ask("reward", {})):
            with pytest.raises(ActionError, match="reset first"):
                await refused
        assert (await session.state())["episode_id"] is None
        await session.close()
        await session.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "action",
    [{"text": "hi"}, {"message": "hi"}, {"type": "reply", "text": "hi"}, {"text": "hi", "metadata": {}}],
)
def test_a_reply_in_all_its_forms(action: Mapping[str, Any]) -> None:
    _, answer = play(action)
    assert answer.observation["text"] == "you said hi"
    assert answer.observation["messages"] == [{"role": "user", "content": "you said hi"}]
    assert answer.reward == 0.1 and not answer.done


def test_a_reply_ends_an_episode_that_has_no_step() -> None:
    class Ask(Env):
        inline = True

        def reset(self, task: object) -> str:
            return "?"

        def reward(self) -> float:
            return 0.5

    _, answer = play({"text": "42"}, spec=Ask)
    assert (answer.done, answer.reward, answer.observation["messages"]) == (True, 0.5, [])


@pytest.mark.parametrize(
    "action",
    [
        {},
        {"type": "fly"},
        {"text": 3},
        {"text": "a", "message": "b"},
        {"type": "reply"},
        {"type": "reply", "text": "a", "more": 1},
        {"type": "call_tool"},
        {"type": "call_tool", "tool_name": 3},
        {"type": "call_tool", "tool_name": "price", "arguments": [1]},
        {"type": "call_tool", "tool_name": "price", "arguments": {}, "timeout": 1},
        {"type": "list_tools", "x": 1},
    ],
)
def test_what_is_no_action_leaves_the_environment_alone(action: Mapping[str, Any]) -> None:
    async def refused(session: HostedSession) -> Any:
        with pytest.raises(ActionError):
            await session.step(action)
        return await session.state()

    assert play(refused)[1]["step_count"] == 0


def test_a_failing_call_is_told_in_openenvs_words() -> None:
    _, unknown, wrong = play(call("steal"), call("price", item=[1]))
    assert unknown.observation["error"]["error_type"] == "tool_not_found"
    assert unknown.metadata["error"] == "unknown_tool"
    assert wrong.observation["error"]["error_type"] == "invalid_args"
    assert wrong.observation["result"] is None


def test_tasks_are_picked_by_split_and_index_or_by_seed() -> None:
    def first(**reset: Any) -> str:
        return str(play(reset=reset)[0].observation["text"])

    assert first(split="test", index=2) == "buy test2"
    assert first(seed=4) == "buy train1"
    assert first(seed=4, split="test") == "buy test1"
    assert first(task={"item": "own"}, seed=1) == "buy own"


@pytest.mark.parametrize(
    "reset",
    [
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"index": 3},
        {"index": -1},
        {"task": None},
        {"task": {}, "index": 0},
        {"episode_id": 3},
        {"episode_id": "x" * 256},
        {"sead": 1},
    ],
)
def test_what_no_reset_takes(reset: Mapping[str, Any]) -> None:
    with pytest.raises(ActionError):
        play(reset=reset)


def test_what_peers_ask() -> None:
    async def teacher(session: HostedSession) -> Any:
        told = payload.message(Message.user("hello"))
        return await session.ask("teacher", {"messages": [told, told]})

    async def key(session: HostedSession) -> Any:
        return await session.ask("state_key", {})

    _, said, found = play(teacher, key, reset={"task": {"item": "tea"}})
    assert said == {"role": "assistant", "content": "after 2: tea"}
    assert found == "tea"


def test_what_the_environment_says_of_itself() -> None:
    async def run() -> None:
        about = await hosted(Shop).metadata()
        assert (about["name"], about["description"]) == ("Shop", "Buy what is asked for.")
        ours = about["turnwise"]
        assert ours["system"] == "You buy." and ours["has_step"] and ours["teacher"]
        assert ours["limits"] == {"max_turns": 4, "max_tool_calls": 3}
        assert ours["splits"] == ["train", "test"]
        assert [one["name"] for one in ours["tools"]] == ["price", "pay"]

    asyncio.run(run())


def test_a_tool_by_a_name_that_openenv_keeps_is_refused() -> None:
    class Bad(Env):
        inline = True

        def reset(self, task: object) -> str:
            return ""

        @tool(name="state")
        def look(self) -> str:
            """Look."""
            return ""

    with pytest.raises(EnvError, match="rename state"):
        asyncio.run(hosted(Bad).metadata())


def test_a_clients_own_deadline() -> None:
    class Slow(Env):
        def reset(self, task: object) -> str:
            return "go"

        async def step(self, reply: str) -> Step:
            await asyncio.sleep(0.0 if reply == "quick" else 30.0)
            return Step(reply)

    async def late(session: HostedSession) -> Any:
        with pytest.raises(EnvError, match="no answer within"):
            await session.step({"text": "slow"}, seconds=0.05)
        return await session.step({"text": "quick"}, seconds=5.0)

    assert play(late, spec=Slow)[1].observation["text"] == "quick"


def test_images_cross_as_data_urls() -> None:
    image = pytest.importorskip("PIL.Image")

    class Look(Env):
        inline = True

        def reset(self, task: object) -> Any:
            return [image.new("RGB", (2, 2), "red"), "what is it?"]

        @tool
        def zoom(self) -> Any:
            """Zoom."""
            return image.new("RGB", (4, 4), "blue")

    async def mcp(session: HostedSession) -> Any:
        return await session.call_tool("zoom", {})

    first, zoomed, called = play(call("zoom"), mcp, spec=Look)
    assert first.observation["text"] == "what is it?"
    assert first.observation["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    assert zoomed.metadata["content"][0]["type"] == "image_url"
    assert called.content[0]["type"] == "image" and called.content[0]["mimeType"] == "image/png"
