"""Environments and tools as TRL's scripts hand them over, played to the end."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from functools import partial
from typing import Any, ClassVar

import pytest

from tests.compat.playing import ROW, arena_of, play
from tests.support.rollouts import call, calls, model, renderer
from turnwise.compat.environments import (
    PLACEHOLDER,
    environments,
    need_a_reward,
    rows_by_environment,
    scored_by,
)
from turnwise.compat.rewards import Board, reward_functions
from turnwise.envs.base import Env
from turnwise.errors import EnvSpecError, RecipeError, TaskError
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.types import Message, StopReason, ToolCall

BEGIN = {"prompt": [{"role": "user", "content": "Begin."}]}


class Counter:
    """Counts up to a target, and says itself what that is worth."""

    made: ClassVar[list[Counter]] = []

    def __init__(self) -> None:
        self.resets, self.closed = 0, 0
        Counter.made.append(self)

    def reset(self, **row: Any) -> str | None:
        self.row, self.value, self.ran, self.done = row, 0, [], False
        self.resets += 1
        return row.get("say")

    def add(self, n: int) -> str:
        """Add to the counter.

        Args:
            n: How much.
        """
        self.ran.append(n)
        self.value += n
        self.done = self.value >= 10
        return str(self.value)

    async def slow(self) -> str:
        """Never answer."""
        await asyncio.sleep(60)
        return "late"

    def get_reward(self) -> float | None:
        return self.value / 10

    def close(self) -> None:
        self.closed += 1


class Game:
    def reset(self, level: int = 0, **row: Any) -> list[dict[str, str]]:
        assert "environment" not in row
        return [{"type": "text", "text": f" Level {level}."}]

    def jump(self) -> str:
        """Jump."""
        return "high"

    async def get_reward(self) -> float:
        return 0.5


def search(query: str) -> str:
    """Look something up.

    Args:
        query: What to look up.
    """
    return f"sync {query}"


async def fetch(url: str) -> str:
    """Fetch a page.

    Args:
        url: Its address.
    """
    await asyncio.sleep(0)
    return f"async {url}"


@pytest.fixture(autouse=True)
def _nobody_yet():
    Counter.made = []


def opened(trajectory) -> list[tuple[str, Any]]:
    return [(one.role, one.content) for one in trajectory.segments[0].prompt]


def told(trajectory) -> list[str]:
    return [one.text for turn in trajectory.turns for one in turn.feedback]


# -- what they are called, and what they show ----------------------------------------------------------


def test_names_and_tools_are_those_of_trl():
    assert {name: len(spec.env_class.toolset()) for name, spec in environments().items()} == {"prompts": 0}
    [(name, tools)] = environments(tools=[search, fetch]).items()
    assert name == "tools" and [one.schema.name for one in tools.env_class.toolset()] == ["search", "fetch"]
    [(name, both)] = environments(Counter, [search]).items()
    # TRL's order: the functions, then the methods as `inspect.getmembers` lists them.
    assert name == "Counter"
    assert [one.schema.name for one in both.env_class.toolset()] == ["search", "add", "slow"]
    many = environments({"count": lambda: Counter(), "game": Game})
    assert list(many) == ["count", "game"] and many["count"].name == "count"
    assert scored_by(many) == {"count": "Counter", "game": "Game"}
    assert scored_by(environments()) == {}
    assert Counter.made[-1].closed == 1, "the one that was only looked at is not left open"


def test_schemas_are_those_that_transformers_makes_of_the_functions():
    from transformers.utils import get_json_schema

    [spec] = environments(tools=[search, fetch]).values()
    for tool, function in zip(spec.env_class.toolset(), (search, fetch), strict=True):
        assert tool.schema.as_function() == get_json_schema(function)


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        (BEGIN, [("user", "Begin.")]),
        ({**BEGIN, "say": " Now."}, [("user", "Begin. Now.")]),
        ({"prompt": "Begin.", "say": "!"}, [("user", "Begin.!")]),
        ({"say": "From reset."}, [("user", "From reset.")]),
        ({**PLACEHOLDER, "say": "From reset."}, [("user", "From reset.")]),
        (
            {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "say": "x"},
            [("system", "S"), ("user", "Ux")],
        ),
    ],
)
def test_a_prompt_and_what_reset_returns_become_the_first_messages(row, seen):
    [group] = play(arena_of(Counter), model("done"), [row], size=1)
    assert opened(group.trajectories[0]) == seen
    assert Counter.made[0].row == row, "reset is given every column, the prompt too"


def test_content_blocks_join_a_texts_end():
    [group] = play(arena_of(Game), model("done"), [{**BEGIN, "level": 2}], size=1)
    [message] = group.trajectories[0].segments[0].prompt
    assert [block.text for block in message.content] == ["Begin.", " Level 2."]
    assert group.trajectories[0].rewards["Game"].value == 0.5


def test_rows_find_their_environment_by_the_column_which_reset_does_not_see():
    known = environments({"count": Counter, "game": Game})
    rows = [{"environment": "game", "level": 1}, {"environment": "count"}, {"environment": "game"}]
    assert rows_by_environment(rows, known, routed=True) == {
        "count": [{}],
        "game": [{"level": 1}, {}],
    }
    with pytest.raises(TaskError, match=r"row 1 has environment='gmae'.*count, game"):
        rows_by_environment([rows[0], {"environment": "gmae"}], known, routed=True)
    # With one environment it is a column like any other.
    one = environments(Counter)
    assert rows_by_environment([{"environment": "x"}], one, routed=False) == {
        "Counter": [{"environment": "x"}]
    }
    [group] = play(arena_of({"game": Game}, name="game"), model("done"), [{"level": 1, **BEGIN}], size=1)
    assert group.trajectories[0].rewards["Game"].value == 0.5


def test_get_reward_pays_under_the_class_name_once_beside_the_functions():
    class Both(Counter):
        reward = 100.0  # TRL's trainer never looks at it; its users' functions do.

    def bonus(environments, **_):
        return [1.0] * len(environments)

    [group] = play(arena_of(Both, bonus), model(calls(call("add", n=4)), "done"), [BEGIN])
    for one in group.trajectories:
        assert {name: (part.value, part.weight) for name, part in one.rewards.items()} == {
            "Both": (0.4, 1.0), "bonus": (1.0, 1.0),
        }  # fmt: skip


def test_get_reward_of_none_does_not_apply():
    class Unsure(Counter):
        def get_reward(self) -> None:
            return None

    [group] = play(arena_of(Unsure), model("done"), [BEGIN])
    assert [one.rewards["Unsure"].value for one in group.trajectories] == [None, None]
    assert [one.reward for one in group.trajectories] == [None, None]
    assert {one.stop_reason for one in group.trajectories} == {StopReason.ANSWERED}


# -- instances ----------------------------------------------------------------------------------------


def test_instances_are_made_once_reset_often_and_closed_at_the_end():
    where = arena_of(Counter, lambda environments, **_: [one.value for one in environments])
    asyncio.run(_rounds(where, 3))
    assert len(Counter.made) == 4, "as many as play at one time"
    assert [one.resets for one in Counter.made] == [3] * 4
    assert [one.closed for one in Counter.made] == [1] * 4


async def _rounds(where, count: int) -> None:
    from turnwise.rollout.group import GroupOrder, play_group
    from turnwise.types import Sampling

    for number in range(count):
        order = GroupOrder(id=f"t/{number}", env=where.name, task=BEGIN, seed=0, size=4)
        await play_group(order, arena=where, policy=model("done"), sampling=Sampling(), sink=lambda _: None)
    await where.aclose()


def test_factories_need_no_class():
    [group] = play(arena_of(partial(Counter)), model("done"), [BEGIN])
    assert group.env == "Counter" and len(Counter.made) == 3, "one was looked at"
    assert all(one.closed == 1 for one in Counter.made)


def test_an_instance_that_closes_by_a_coroutine_is_closed_also_where_a_loop_runs():
    closed = []

    class Later(Counter):
        async def close(self) -> None:
            await asyncio.sleep(0)
            closed.append(self)

    async def notebook():
        return environments(lambda: Later())

    asyncio.run(notebook())
    assert len(closed) == 1


def test_siblings_that_start_differently_are_told_of(caplog):
    class Moody(Counter):
        def reset(self, **row: Any) -> str:
            super().reset(**row)
            return f" {len(Counter.made)} {id(self)}"

    play(arena_of(Moody), model("done"), [BEGIN])
    assert "siblings of one task and seed saw different first messages" in caplog.text


# -- tools --------------------------------------------------------------------------------------------


def test_tools_without_an_environment_and_without_either():
    reply = calls(call("search", query="tea"), call("fetch", url="x"))
    [group] = play(arena_of(None, tools=[search, fetch]), model(reply, "done"), [BEGIN], size=1)
    assert told(group.trajectories[0]) == ["sync tea", "async x"]
    [group] = play(arena_of(), model("done"), [BEGIN], size=1)
    assert opened(group.trajectories[0]) == [("user", "Begin.")]
    assert group.trajectories[0].stop_reason is StopReason.ANSWERED


def test_mixed_sync_and_async_tools_answer_in_the_order_of_their_calls():
    """TRL runs the sync ones first and so swaps the answers (`_tool_call_loop`)."""
    reply = calls(call("fetch", url="1"), call("search", query="2"), call("fetch", url="3"))
    [group] = play(arena_of(None, tools=[search, fetch]), model(reply, "done"), [BEGIN], size=1)
    [turn, _] = group.trajectories[0].turns
    assert [one.text for one in turn.feedback] == ["async 1", "sync 2", "async 3"]
    assert [one.name for one in turn.feedback] == ["fetch", "search", "fetch"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>', "1"),
        ('<tool_call>\n{"name": "add", "n": 1}\n</tool_call>', "n is missing; expected an integer"),
        ('<tool_call>\n{"name": "add", "arguments": {"n": 1}\n</tool_call>', "could not be read"),
        ('<tool_call>\n{"name": "ad", "arguments": {"n": 1}}\n</tool_call>', "There is no tool 'ad'"),
        ('<tool_call>\n{"name": "add", "arguments": {"n": "x"}}\n</tool_call>', "add"),
    ],
    ids=["flat", "arguments outside", "cut off", "unknown", "wrong type"],
)
def test_calls_are_answered_whatever_their_form(text, answer):
    """A flat call raises in TRL, and a malformed one ends the rollout without a word."""
    from turnwise.engines.scripted import ScriptedEngine
    from turnwise.rollout.policies import ModelPolicy

    said = [renderer().tokenizer(one)["input_ids"] + [renderer().stop_ids[0]] for one in (text, "done")]
    policy = ModelPolicy(ScriptedEngine(lambda made: said[min(made.turn, 1)]), renderer())
    [group] = play(arena_of(Counter), policy, [BEGIN], size=1)
    [trajectory] = group.trajectories
    [message] = [one for turn in trajectory.turns for one in turn.feedback]
    assert message.role == "tool" and answer in message.text
    assert trajectory.stop_reason is StopReason.ANSWERED and len(trajectory.turns) == 2


def test_no_tool_runs_after_the_end():
    reply = calls(call("add", n=4), call("add", n=6), call("add", n=5))
    [group] = play(arena_of(Counter), model(reply, "done"), [BEGIN], size=1)
    [trajectory] = group.trajectories
    assert Counter.made[0].ran == [4, 6] and told(trajectory) == ["4", "10"]
    assert trajectory.stop_reason is StopReason.TERMINATED and trajectory.metrics["skipped_calls"] == 1
    assert trajectory.rewards["Counter"].value == 1.0


def test_a_tool_has_a_deadline_which_the_model_is_told_of():
    began = time.perf_counter()
    [group] = play(
        arena_of(Counter, limits={"call_seconds": 3.0}), model(calls(call("slow")), "done"), [BEGIN], size=1
    )
    assert time.perf_counter() - began < 30
    assert told(group.trajectories[0]) == ["slow did not finish within 3 s."]
    assert group.trajectories[0].stop_reason is StopReason.ANSWERED


def test_a_budget_that_ran_out_after_a_tool_call_is_truncation():
    """In TRL such a completion ends in a stop token, and counts as finished."""
    reply = calls(call("add", n=1))
    budget = len(renderer().reply(reply)) + 1
    [group] = play(
        arena_of(Counter, limits={"max_completion": budget}), model(reply, "done"), [BEGIN], size=1
    )
    [trajectory] = group.trajectories
    assert trajectory.stop_reason is StopReason.MAX_TOKENS and trajectory.stop_reason.truncated
    assert Counter.made[0].ran == [1] and trajectory.rewards["Counter"].value == 0.1, "scored and kept"
    # The cap on turns, TRL's max_tool_calling_iterations, likewise.
    [group] = play(arena_of(Counter, limits={"max_turns": 2}), model(reply), [BEGIN], size=1)
    assert group.trajectories[0].stop_reason is StopReason.MAX_TURNS


def test_tools_of_siblings_run_at_the_same_time():
    met = threading.Barrier(4)
    together = []

    def wait() -> str:
        """Wait for the others."""
        together.append(met.wait(20))
        return "ok"

    where = arena_of(None, tools=[wait], limits={"call_seconds": 30.0})
    play(where, model(calls(call("wait")), "done"), [BEGIN], size=4)
    assert sorted(together) == [0, 1, 2, 3]


def test_an_instance_stays_on_its_thread():
    class Sql(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.base = sqlite3.connect(":memory:")  # Refuses every thread but the one that made it.

        def count(self) -> str:
            """Count."""
            return str(self.base.execute("select 7").fetchone()[0])

        def close(self) -> None:
            self.base.close()
            super().close()

    [group] = play(arena_of(Sql), model(calls(call("count")), "done"), [BEGIN])
    assert [told(one) for one in group.trajectories] == [["7"], ["7"]]
    assert [one.closed for one in Counter.made] == [1, 1]


# -- the harness and mistakes --------------------------------------------------------------------------


def test_the_fingerprint_changes_with_a_tools_source():
    def look() -> str:
        """Look."""
        return "here"

    def same() -> str:
        """Look."""
        return "there"

    same.__name__ = "look"
    [one], [other] = (environments(tools=[made]).values() for made in (look, same))
    [again] = environments(tools=[look]).values()
    assert one.fingerprint == again.fingerprint != other.fingerprint


class Native(Env):
    def reset(self, task):
        return "Hello."


def untyped(x):
    """No hint."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Counter(),), EnvSpecError, "looks like an instance"),
        ((lambda size: Counter(),), EnvSpecError, "is called without arguments and needs size"),
        ((dict,), EnvSpecError, "has no reset"),
        (({},), RecipeError, "empty mapping"),
        ((None, [untyped]), EnvSpecError, "has no type hint"),
        ((None, [search, search]), EnvSpecError, "two tools named search"),
        ((Native, [search]), EnvSpecError, "has its tools itself"),
        ((None, ["search"]), EnvSpecError, "found str"),
    ],
)
def test_what_cannot_work_is_said_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        environments(*arguments)


def test_a_rollout_func_stands_alone():
    with pytest.raises(RecipeError, match="do nothing beside it"):
        environments(None, [search], rollout_func=print)
    assert list(environments(rollout_func=print)) == ["prompts"]


def test_something_has_to_say_what_a_completion_is_worth():
    class Silent(Game):
        get_reward = None

    for known in (environments(), environments(tools=[search]), environments(Silent)):
        with pytest.raises(RecipeError, match=r"pass reward_funcs, or an environment_factory.*get_reward"):
            need_a_reward(known, ())
    for known in (environments(Game), environments({"a": Silent, "b": Game}), environments(Native)):
        need_a_reward(known, ())
    need_a_reward(environments(), reward_functions(len_of, weights=None, board=Board()))


def len_of(completions, **_):
    return [0.0] * len(completions)


def test_envs_of_our_own_are_taken_as_they_are():
    [(name, spec)] = environments(Native).items()
    assert name == "Native" and spec.env_class is Native


def test_a_row_without_a_prompt_where_nobody_gives_one():
    [group] = play(arena_of(), ScriptedPolicy(["x"]), [{"question": "?"}], size=1)
    assert "the row has no 'prompt'" in group.trajectories[0].error.message


def test_a_message_of_the_row_keeps_its_calls():
    row = {
        "prompt": [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}],
            },
            {"role": "tool", "name": "add", "content": "1"},
        ]
    }
    [group] = play(arena_of(Counter), model("done"), [row], size=1)
    assert group.trajectories[0].segments[0].prompt == (
        Message.user("?"),
        Message.assistant("", ToolCall(name="add", arguments={"n": 1}, id="p0")),
        Message(role="tool", name="add", content="1"),
    )
    assert ROW["target"] == 3
