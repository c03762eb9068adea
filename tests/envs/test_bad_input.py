"""What authors, tools and data can do wrong: each has a clear message, and harms nobody else."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from turnwise import Env, Message, Step, ToolCall, tool
from turnwise.envs import thread as threads
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import EnvError, EnvHungError, EnvLostError, ScoringError, TaskError

QUICK = Limits(call_seconds=0.5)


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


class Bad(Env):
    """Every tool is bad in its own way."""

    def __init__(self, release: threading.Event | None = None) -> None:
        self.release = release or threading.Event()
        self.closes: list[int] = []

    def reset(self, task):
        return "hi"

    @tool
    def fine(self) -> str:
        """Fine."""
        return "fine"

    @tool
    def raises(self) -> str:
        """Raise."""
        raise KeyError("tea")

    @tool
    def exits(self) -> str:
        """Exit."""
        raise SystemExit(2)

    @tool
    def stops(self) -> str:
        """Stop."""
        return next(iter([]))

    @tool
    def lost(self) -> str:
        """Lose."""
        raise EnvLostError("the server is gone")

    @tool
    def a_set(self) -> str:
        """Set."""
        return {"found": [1, {2}]}

    @tool
    def a_date(self) -> str:
        """Date."""
        return datetime.date(2020, 1, 1)

    @tool
    def a_nan(self) -> str:
        """NaN."""
        return {"x": float("nan")}

    @tool
    def a_picture(self) -> str:
        """Bytes."""
        return b"\x89PNG"

    @tool
    def circular(self) -> str:
        """Circle."""
        circle: list = []
        circle.append(circle)
        return circle

    @tool
    def big_text(self) -> str:
        """10 MB."""
        return "x" * 10_000_000

    @tool
    def big_json(self) -> list[int]:
        """10 MB."""
        return ["x" * 97] * 100_000

    @tool
    def big_error(self) -> str:
        """10 MB."""
        raise ValueError("x" * 10_000_000)

    @tool
    def nan_pay(self) -> Step:
        """Pay nothing sensible."""
        return Step("thanks", reward=float("nan"))

    @tool
    def both_ends(self) -> Step:
        """End twice."""
        return Step("over", terminated=True, truncated=True)

    @tool
    def bad_info(self) -> Step:
        """Say what cannot be stored."""
        return Step("over", info={"at": datetime.date(2020, 1, 1)})

    @tool
    def no_info(self) -> Step:
        """Say nothing where an object is due."""
        return Step("over", info=None)

    @tool
    def hangs(self) -> str:
        """Hang in a thread."""
        self.release.wait(30)
        return "late"

    @tool
    async def dozes(self) -> str:
        """Hang on the loop."""
        await asyncio.sleep(30)

    @tool
    async def clings(self) -> str:
        """Hang on the loop, whatever anyone says."""
        while not self.release.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    @tool
    async def async_exits(self) -> str:
        """Exit."""
        raise SystemExit(2)

    def close(self):
        self.closes.append(threading.get_ident())


class InlineBad(Bad):
    inline = True


RESULTS = {
    "raises": ("raised", "raises failed: KeyError: 'tea'"),
    "exits": ("raised", "exits failed: RuntimeError: it called sys.exit(2)"),
    "async_exits": ("raised", "async_exits failed: RuntimeError: it called sys.exit(2)"),
    "a_set": (
        "bad_result",
        "a_set failed: it returned a set at found[1], which is not JSON; return text, JSON values or a Step.",
    ),
    "a_date": (
        "bad_result",
        "a_date failed: it returned a datetime.date, which is not JSON; return text, JSON values or a Step.",
    ),
    "a_nan": (
        "bad_result",
        "a_nan failed: it returned nan at x, which is not JSON; return text, JSON values or a Step.",
    ),
    "dozes": ("timeout", "dozes did not finish within 0.5 s."),
}


@pytest.mark.parametrize("cls", [Bad, InlineBad])
def test_a_bad_tool_is_an_observation_and_the_episode_goes_on(cls):
    async def play():
        env = await make(cls).open(QUICK)
        await env.reset({}, 0)
        seen = {}
        for name in [*RESULTS, "stops", "a_picture", "circular"]:
            result = await env.call(call(name))
            seen[name] = (result.error, result.content)
            assert (await env.call(call("fine"))).content == "fine"
        await env.close()
        return seen

    seen = asyncio.run(play())
    assert {name: seen[name] for name in RESULTS} == RESULTS
    assert seen["stops"][0] == "raised" and "StopIteration" in seen["stops"][1]
    assert seen["a_picture"][0] == "bad_result" and "bytes, which is no result" in seen["a_picture"][1]
    assert seen["circular"][0] == "bad_result" and "more than 200 levels" in seen["circular"][1]


@pytest.mark.parametrize("name", ["big_text", "big_json", "big_error"])
def test_ten_megabytes_are_cut_and_quick(name):
    async def play():
        env = await make(Bad).open(Limits())
        await env.reset({}, 0)
        started = time.perf_counter()
        result = await env.call(call(name))
        seconds = time.perf_counter() - started
        await env.close()
        return result, seconds

    result, seconds = asyncio.run(play())
    assert len(result.content) < 65_536 + 100
    assert result.content.endswith("more characters cut off: the limit is 65536]")
    assert seconds < 10.0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("lost", EnvLostError, "the server is gone"),
        ("nan_pay", ScoringError, "tool nan_pay: reward: expected a finite number; found nan"),
        ("both_ends", EnvError, "both terminated and truncated; set one"),
        ("bad_info", EnvError, "info is not JSON: a datetime.date at at"),
        ("no_info", EnvError, "info is None; it must be a JSON object"),
    ],
)
@pytest.mark.parametrize("cls", [Bad, InlineBad])
def test_what_is_not_the_policys_doing_is_raised(cls, name, error, message):
    async def play():
        env = await make(cls).open(QUICK)
        await env.reset({}, 0)
        with pytest.raises(error, match=message):
            await env.call(call(name))
        await env.close()

    asyncio.run(play())


def abandoned() -> list[threads.EnvThread]:
    """Those that are counted: other tests' may be among them."""
    assert threads.abandoned_threads() == len(threads._abandoned)
    return threads._abandoned


def test_a_hung_thread_is_abandoned_counted_and_closed_when_it_returns():
    release = threading.Event()

    async def play():
        env, sibling = [await make(Bad, args={"release": release}).open(QUICK) for _ in range(2)]
        inner = env._env
        with pytest.raises(
            EnvHungError, match=r"tool hangs: it did not return within 0\.5 s and cannot be stopped"
        ):
            await env.call(call("hangs"))
        assert env._thread in abandoned()
        with pytest.raises(EnvHungError, match="tool fine: the environment hangs in an earlier call"):
            await env.call(call("fine"))
        assert (await sibling.call(call("fine"))).content == "fine"
        await env.close()
        assert inner.closes == []
        release.set()
        env._thread._thread.join(5)
        assert inner.closes == [env._thread._thread.ident]
        assert env._thread not in abandoned()
        await sibling.close()

    asyncio.run(play())


def test_a_coroutine_that_ignores_cancellation_is_a_hang_and_closed_when_it_returns():
    release = threading.Event()

    async def play():
        env = await make(InlineBad, args={"release": release}).open(QUICK)
        inner = env._env
        with pytest.raises(EnvHungError, match=r"tool clings: .* ignores cancellation"):
            await env.call(call("clings"))
        await env.close()
        assert inner.closes == []
        release.set()
        deadline = time.monotonic() + 10
        while not inner.closes and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert len(inner.closes) == 1

    asyncio.run(play())


def test_a_hung_reset_constructor_reward_and_close():
    released = threading.Event()

    class Hangs(Env):
        def __init__(self, where: str):
            self.where = where
            self.hang("constructor")

        def hang(self, where):
            if where == self.where:
                released.wait(30)

        def reset(self, task):
            self.hang("reset")
            return "hi"

        def reward(self):
            self.hang("reward")
            return 1.0

        def close(self):
            self.hang("close")

    async def play():
        limits = Limits(call_seconds=0.5)
        with pytest.raises(EnvHungError, match="environment Hangs: constructor: it did not return"):
            await make(Hangs, args={"where": "constructor"}).open(limits)
        env = await make(Hangs, args={"where": "reset"}).open(limits)
        with pytest.raises(EnvHungError, match="environment Hangs: reset: it did not return"):
            await env.reset({}, 0)
        await env.close()
        env = await make(Hangs, args={"where": "reward"}).open(limits)
        with pytest.raises(ScoringError, match="environment Hangs: reward: it did not return"):
            await env.reward()
        await env.close()
        env = await make(Hangs, args={"where": "close"}).open(limits)
        await env.close()

    asyncio.run(play())
    released.set()


def test_a_slow_async_reset_ends_only_its_episode():
    class Slow(Env):
        async def reset(self, task):
            await asyncio.sleep(task["seconds"])
            return "hi"

    async def play():
        env = await make(Slow).open(Limits(call_seconds=0.5))
        with pytest.raises(EnvError, match=r"environment Slow: reset: it did not finish within 0\.5 s"):
            await env.reset({"seconds": 60}, 0)
        assert await env.reset({"seconds": 0}, 0) == (Message.user("hi"),)
        await env.close()

    asyncio.run(play())


class BadStep(Env):
    inline = True

    def reset(self, task):
        return "hi"

    def step(self, reply):
        if reply == "raise":
            raise ValueError("no")
        return {"nan": Step(reward=float("nan")), "text": "text", "set": Step({1})}[reply]


def test_a_bad_step():
    async def play():
        env = await make(BadStep).open(QUICK)
        await env.reset({}, 0)
        seen = [await env.step(Message.assistant(reply)) for reply in ("raise", "text", "set")]
        with pytest.raises(ScoringError, match="environment BadStep: step: reward: expected a finite number"):
            await env.step(Message.assistant("nan"))
        return seen

    raised, text, a_set = asyncio.run(play())
    assert raised == Step("The environment failed: ValueError: no", info={"error": "raised"})
    assert text == Step(
        "The environment failed: it returned a str, not a Step.", info={"error": "bad_result"}
    )
    assert a_set.observation.startswith("The environment failed: it returned a set, which is not JSON")


class Rows(Env):
    """Its tasks are what the test puts here."""

    inline = True
    rows: object = ()
    closed = 0

    def tasks(self, split):
        if isinstance(Rows.rows, Exception):
            raise Rows.rows
        return Rows.rows

    def reset(self, task):
        return "hi"

    def close(self):
        Rows.closed += 1


def tasks(rows):
    Rows.rows = rows
    return list(make(Rows, name="rows").tasks("test"))


def test_tasks_are_as_they_will_be_read_back():
    before = Rows.closed
    assert tasks([{"a": (1, 2), "b": None}]) == [{"a": [1, 2], "b": None}]
    assert Rows.closed == before + 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, {"a": {1}}], r"rows: tasks\('test'\): row 1: .* must be JSON, .*: a set at a"),
        ([{"a": [float("inf")]}], r"row 0: .*: inf at a\[0\]"),
        ([{"a": {1: 2}}], "row 0: .*: a key that is an int at a"),
        (["text"], "row 0: a task is a JSON object; found a str"),
        ([], "no tasks; yield at least one row"),
        ("text", "expected rows; found str"),
        ({"a": 1}, "expected rows; found dict"),
        (KeyError("dev"), "KeyError: 'dev'"),
    ],
)
def test_tasks_that_are_not_json(rows, message):
    with pytest.raises(TaskError, match=message):
        tasks(rows)


def test_no_tasks_method_is_one_empty_row():
    assert list(make(Bad).tasks("train")) == [{}]


def test_a_hung_tool_does_not_keep_the_interpreter_alive(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "script.py"
    script.write_text(
        """
import asyncio, time
from turnwise import Env, ToolCall, tool
from turnwise.envs.registry import make
from turnwise.envs.session import Limits

class Hangs(Env):
    def reset(self, task): return "hi"
    @tool
    def hang(self) -> str:
        "Hang."
        time.sleep(60)

async def main():
    env = await make(Hangs).open(Limits(call_seconds=1))
    try:
        await env.call(ToolCall(name="hang", arguments={}))
    finally:
        await env.close()

asyncio.run(main())
"""
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert "EnvHungError: environment Hangs: tool hang: it did not return within 1 s" in done.stderr
    assert time.perf_counter() - started < 50  # The call itself would take 60 s.


@dataclass
class Positive:
    """Refuses what does not fit by an exception of any kind."""

    number: int

    def __post_init__(self):
        if self.number <= 0:
            raise LookupError("the number must be positive")


class Living(Env):
    """Hands out its own state, and goes on changing it."""

    inline = True

    def reset(self, task):
        self.board = [0]
        return "go"

    @tool
    def place(self, board: list[int]) -> Step:
        """Place."""
        self.board.append(1)
        return Step("placed", info={"board": self.board}, terminated=np.bool_(len(self.board) > 2))

    @tool
    def count(self, by: Positive) -> str:
        """Count."""
        return "counted"

    def teacher(self, messages):
        return Message.assistant("", ToolCall(name="place", arguments={"board": self.board}))


def test_what_was_said_does_not_change_with_the_environments_state():
    async def play():
        env = await make(Living).open(QUICK)
        await env.reset({}, 0)
        said, results = [], []
        for _ in range(2):
            message = await env.teacher([])
            said.append(message.tool_calls[0].arguments)
            results.append((await env.call(message.tool_calls[0])).step)
        await env.close()
        return said, results

    said, results = asyncio.run(play())
    assert said == [{"board": [0]}, {"board": [0, 1]}]
    assert [step.info for step in results] == [{"board": [0, 1]}, {"board": [0, 1, 1]}]
    assert [step.terminated for step in results] == [False, True]
    assert all(type(step.terminated) is bool for step in results)


def test_a_teachers_call_must_be_json():
    class Typed(Living):
        def teacher(self, messages):
            return Message.assistant("", ToolCall(name="place", arguments={"board": np.int64(3)}))

    async def play():
        env = await make(Typed).open(QUICK)
        await env.reset({}, 0)
        with pytest.raises(EnvError, match=r"its call of place are not JSON: a numpy\.int64 at board"):
            await env.teacher([])
        await env.close()

    asyncio.run(play())


def test_a_value_that_a_hints_own_code_refuses_is_told_whatever_it_raises():
    async def play():
        env = await make(Living).open(QUICK)
        await env.reset({}, 0)
        result = await env.call(call("count", by={"number": -1}))
        await env.close()
        return result

    result = asyncio.run(play())
    assert (result.error, result.content) == ("bad_arguments", "count: by: the number must be positive")
