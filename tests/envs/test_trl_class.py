"""TRL-style classes and AgentProtocol-like adapters, as their authors wrote them."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal

import numpy as np
import pytest

from turnwise import Message, Step, ToolCall
from turnwise.envs.registry import make
from turnwise.envs.spec import class_spec
from turnwise.envs.tools import function_tool
from turnwise.envs.trl_class import adapt, conversation
from turnwise.errors import EnvError, EnvSpecError, ScoringError
from turnwise.types import TextBlock


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


class Counter:
    """As in TRL's documentation: no base class, no decorator."""

    closed = 0

    def __init__(self):
        self.reward = 0.0

    def reset(self, target: int, **row) -> str | None:
        self.row = row
        self.target = target
        self.value = 0
        self.done = False
        return f" Target: {target}."

    def increment(self, step: int) -> str:
        """Add to the counter.

        Args:
            step: How much.
        """
        self.value += step
        self.done = self.value == self.target
        self.reward = float(self.done)
        return f"Counter is {self.value}"

    def _private(self):
        pass

    def close(self):
        Counter.closed += 1


class AsyncJudge:
    async def reset(self, prompt, question: str):
        self.question = question

    async def look(self, where: Literal["up", "down"]) -> str:
        """Look."""
        await asyncio.sleep(0)
        return [{"type": "text", "text": f"{self.question} {where}"}]

    async def get_reward(self) -> float:
        return 0.25


async def session(target, **args):
    spec = make(target, args=args)
    return await spec.open(spec.limits)


def test_attributes_end_and_reward_an_episode():
    async def play():
        env = await session(Counter)
        assert not env.has_step and env.system is None
        assert [schema.name for schema in env.tools] == ["increment"]
        assert env.tools[0].parameters["properties"] == {
            "step": {"type": "integer", "description": "How much."}
        }
        row = {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Count."}],
            "target": 2,
        }
        for _ in range(2):  # An instance is reset again and again.
            assert await env.reset(row, 0) == (Message.system("S"), Message.user("Count. Target: 2."))
            result = await env.call(call("increment", step=1))
            assert (result.content, result.step) == ("Counter is 1", None)
            assert await env.reward() == {"reward": 0.0}
            result = await env.call(call("increment", step=1))
            assert result.step == Step("Counter is 2", terminated=True)
            assert await env.reward() == {"reward": 1.0}
        assert env._env.inner.row == {"prompt": row["prompt"]}
        before = Counter.closed
        await env.close()
        assert Counter.closed == before + 1

    asyncio.run(play())


def test_the_same_tools_in_the_same_order_as_trl_would_show():
    from transformers.utils import get_json_schema

    class Two:
        def reset(self):
            return "go"

        def zoom(self, factor: float) -> str:
            """Zoom.

            Args:
                factor: How far.
            """

        def area(self, width: int, height: int | None = None) -> str:
            """Area.

            Args:
                width: Of the box.
                height: Of the box.
            """

    tools = [tool.schema for tool in make(Two).env_class.toolset()]
    theirs = [get_json_schema(method)["function"] for method in (Two.area, Two.zoom)]
    assert [tool.name for tool in tools] == ["area", "zoom"]
    assert [tool.parameters for tool in tools] == [their["parameters"] for their in theirs]
    assert [tool.description for tool in tools] == [their["description"] for their in theirs]


def test_async_methods_and_get_reward():
    async def play():
        env = await session(AsyncJudge)
        row = {"prompt": "Where?", "question": "Is it", "answer": "never passed"}
        assert await env.reset(row, 0) == (Message.user("Where?"),)
        result = await env.call(call("look", where="up"))
        assert result.content == (TextBlock(text="Is it up"),)
        assert (await env.call(call("look", where="left"))).error == "bad_arguments"
        assert await env.reward() == {"reward": 0.25}
        await env.close()

    asyncio.run(play())


def test_a_row_without_a_prompt_and_a_reset_without_words():
    class Silent:
        def reset(self):
            return None

    class Loud:
        def reset(self):
            return "Hello."

    async def play():
        assert await (await session(Loud)).reset({}, 0) == (Message.user("Hello."),)
        env = await session(Silent)
        assert await env.reset({"prompt": "Hi."}, 0) == (Message.user("Hi."),)
        with pytest.raises(EnvError, match="reset returned None and the row has no 'prompt'"):
            await env.reset({}, 0)
        for prompt, message in [
            ([], "is an empty list"),
            ([{"role": "robot", "content": "x"}], "with a role among system, user, assistant, tool"),
            ([{"role": "user", "content": [{"type": "image"}]}], "has 0 images, and its 'prompt' has 1"),
            ([{"role": "user", "content": [{"type": "sound"}]}], "neither text nor text blocks"),
        ]:
            with pytest.raises(EnvError, match=message):
                await env.reset({"prompt": prompt}, 0)
        assert await env.reward() == {}

    asyncio.run(play())


def test_blocks_are_joined():
    class Blocks:
        def reset(self):
            return [{"type": "text", "text": "b"}]

    async def play():
        env = await session(Blocks)
        assert await env.reset({"prompt": "a"}, 0) == (
            Message.user((TextBlock(text="a"), TextBlock(text="b"))),
        )

    asyncio.run(play())


def test_a_reward_of_none_does_not_apply_and_an_error_where_it_is_nan():
    class Judge:
        def reset(self, value):
            self.value = value
            return "hi"

        def get_reward(self):
            return self.value

    async def play():
        env = await session(Judge)
        await env.reset({"value": None}, 0)
        assert await env.reward() == {"reward": None}
        await env.reset({"value": float("nan")}, 0)
        with pytest.raises(ScoringError):
            await env.reward()

    asyncio.run(play())


def test_a_factory_and_its_arguments():
    class Sized:
        def __init__(self, size: int = 1):
            self.size = size

        def reset(self):
            return str(self.size)

    async def play(target, **args):
        return (await (await session(target, **args)).reset({}, 0))[0].content

    assert asyncio.run(play(Sized, size=3)) == "3"
    assert asyncio.run(play(lambda: Sized(4))) == "4"
    with pytest.raises(EnvSpecError, match="environment Sized: unknown argument 'rows'; allowed: size"):
        make(Sized, args={"rows": 1})


class Shop:
    """Its author knows nothing of Turnwise: ``done``, ``close``, ``max_turns`` and the rest are his own."""

    max_turns = 1
    isolation = "docker"
    forfeit = "yes"

    def reset(self):
        self.opened = []
        return "Shop."

    def buy(self, item: str) -> str:
        """Buy something.

        Args:
            item: What.
        """
        return f"bought {item}"

    def close(self, till: str) -> str:
        """Close a till.

        Args:
            till: Which.
        """
        return f"closed {till}"

    def done(self) -> str:
        """Leave."""
        return "left"


def test_methods_and_attributes_that_are_the_authors_own():
    async def play():
        spec = make(Shop)
        assert spec.limits.max_turns is None and spec.forfeit == 0.0
        assert spec.env_class.isolation == "thread"
        env = await spec.open(spec.limits)
        assert [schema.name for schema in env.tools] == ["buy", "close", "done"]
        await env.reset({}, 0)
        for one, told in (
            (call("buy", item="tea"), "bought tea"),
            (call("close", till="2"), "closed 2"),
            (call("done"), "left"),
        ):
            result = await env.call(one)
            assert (result.content, result.step, result.error) == (told, None, None)
        await env.close()  # Which is no call of `close`, that wants a till.

    asyncio.run(play())


@pytest.mark.parametrize(
    ("done", "ends"), [(True, True), (np.True_, True), (np.False_, False), ([1], False), ("no", False)]
)
def test_only_true_is_done(done, ends):
    class Tick:
        def reset(self):
            self.done = False
            return "go"

        def tick(self) -> str:
            """Tick."""
            self.done = done
            return "ok"

    async def play():
        env = await session(Tick)
        await env.reset({}, 0)
        assert ((await env.call(call("tick"))).step is not None) is ends
        await env.close()

    asyncio.run(play())


def test_knobs_stand_in_a_mapping_of_their_own():
    class Knobs(Shop):
        turnwise: ClassVar = {"max_turns": 5, "forfeit": -1.0, "inline": True}

    spec = make(Knobs)
    assert (spec.limits.max_turns, spec.forfeit, spec.env_class.inline) == (5, -1.0, True)
    Knobs.turnwise = {"max_turn": 5}
    with pytest.raises(
        EnvSpecError, match=r"Knobs\.turnwise: unknown key 'max_turn'; did you mean 'max_turns'"
    ):
        make(Knobs)
    Knobs.turnwise = 5
    with pytest.raises(EnvSpecError, match=r"Knobs\.turnwise is a int; it is a mapping of max_turns"):
        make(Knobs)


@pytest.mark.parametrize(
    "value", [{"a": 1, "b": None}, None, 1.5, True, [1, "a"], ("a", 2), {3}, b"x"], ids=lambda one: str(one)
)
def test_what_is_neither_text_nor_blocks_is_told_as_trl_tells_it(value):
    class Returns:
        def reset(self):
            return "go"

        def sync(self):
            """Return it."""
            return value

        async def later(self):
            """Return it later."""
            return value

    def given():
        """Return it."""
        return value

    async def play():
        for env_class in (adapt(Returns, tools=[function_tool(given)]), conversation([function_tool(given)])):
            spec = class_spec(env_class, name="returns")
            env = await spec.open(spec.limits)
            await env.reset({"prompt": "go"}, 0)
            for tool in env.tools:
                assert (await env.call(call(tool.name))).content == str(value)
            await env.close()

    asyncio.run(play())


def test_class_methods_are_no_tools_and_it_is_said(caplog):
    class Half(Shop):
        @classmethod
        def price(cls, item: str) -> str:
            """Price."""
            return "1"

    assert "price" not in [tool.schema.name for tool in make(Half).env_class.toolset()]
    assert "Half: class methods are no tools, as in TRL: price;" in caplog.text


def test_classes_that_cannot_work():
    class NoHint:
        def reset(self):
            return "x"

        def go(self, where) -> str:
            """Go."""

    with pytest.raises(EnvSpecError, match=r"tool NoHint\.go: parameter 'where' has no type hint"):
        make(NoHint)
    with pytest.raises(EnvSpecError, match="int is no environment"):
        make(lambda: 3)


# ---------------------------------------------------------------------------------------------------

TOOLS = """
- name: buy
  description: Buy.
  parameters:
    type: object
    properties:
      item: {type: string, enum: [tea, jam]}
    required: [item]
- type: function
  function: {name: leave, description: Leave.}
"""


class Benchmark:
    tools = (
        {"name": "buy", "parameters": {"properties": {"item": {"type": "string"}}, "required": ["item"]}},
    )

    def reset(self, task):
        return f"Buy {task['item']}."

    def step(self, tool_call):
        item = tool_call.arguments["item"]
        if item == "nothing":
            return "no tuple"
        return {"bought": item}, 1.0 if item == "tea" else None, item == "tea"


class AsyncBenchmark(Benchmark):
    async def step(self, tool_call):
        return super().step(tool_call)


@pytest.mark.parametrize("cls", [Benchmark, AsyncBenchmark])
def test_an_agent_protocol(cls):
    async def play():
        env = await session(cls)
        assert await env.reset({"item": "tea"}, 0) == (Message.user("Buy tea."),)
        assert not env.has_step
        result = await env.call(call("buy", item="jam"))
        assert (result.content, result.step.reward, result.step.terminated) == (
            '{"bought":"jam"}',
            None,
            False,
        )
        result = await env.call(call("buy", item="tea"))
        assert (result.step.reward, result.step.terminated) == (1.0, True)
        assert (await env.call(call("buy"))).error == "bad_arguments"
        result = await env.call(call("buy", item="nothing"))
        assert result.error == "bad_result"
        assert "str from step; expected (result, reward, done)" in result.content
        assert await env.reward() == {}
        await env.close()

    asyncio.run(play())


def test_tools_from_a_yaml_file(tmp_path):
    (tmp_path / "tools.yaml").write_text(TOOLS)
    module = tmp_path / "shop.py"
    module.write_text(
        "class Shop:\n"
        "    tools = 'tools.yaml'\n"
        "    max_turns = 7\n"
        "    def reset(self, task): return 'hi'\n"
        "    def step(self, call): return call.name, 0, call.name == 'leave'\n"
        "    def tasks(self, split): return [{'split': split}]\n"
    )
    spec = make(f"{module}:Shop")
    assert [tool.schema.name for tool in spec.env_class.toolset()] == ["buy", "leave"]
    assert list(spec.tasks("test")) == [{"split": "test"}]
    assert spec.limits.max_turns == 7
    (tmp_path / "tools.yaml").write_text("a: 1\n")
    with pytest.raises(EnvSpecError, match=r"Shop\.tools: expected a list of tools"):
        make(f"{module}:Shop")
    (tmp_path / "tools.yaml").unlink()
    with pytest.raises(EnvSpecError, match=r"Shop: tools from .*tools\.yaml: FileNotFoundError"):
        make(f"{module}:Shop")
