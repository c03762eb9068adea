"""Environments in a child process: the same session, and a kill for what hangs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from turnwise import Env, Message, Step, ToolCall
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import EnvCrashedError, EnvError, EnvHungError, EnvLostError, EnvSpecError, ScoringError

HERE = Path(__file__).parent / "process_envs.py"


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments, id="c1")


async def opened(cls: str = "Child", limits: Limits | None = None, **args):
    spec = make(f"{HERE}:{cls}", args=args)
    return await spec.open(limits or spec.limits)


@pytest.mark.parametrize("cls", ["Child", "AsyncChild"])
def test_an_episode(cls, tmp_path):
    log = tmp_path / "log"

    async def play():
        env = await opened(cls, log=str(log))
        assert env.system == "You are in a child."
        assert env.has_step
        assert env.tools[0].name == "pid"
        first = await env.reset({"reward": 2}, 7)
        assert first[1] == Message.user("331")
        child = int(first[0].content.removeprefix("pid "))
        assert child != os.getpid()
        result = await env.call(call("pid"))
        assert (result.content, result.error, result.call) == (str(child), None, call("pid"))
        result = await env.call(call("say", text=10**30))
        assert (result.content, result.coerced) == (str(10**30), 1)
        assert result.step == Step(str(10**30), reward=0.5, terminated=True, info={"n": 31})
        assert await env.step(Message.assistant("ü")) == Step([Message.user("you said ü")])
        assert await env.teacher(first) == Message.assistant("2 messages", reasoning="counted")
        assert await env.state_key() == "s"
        assert await env.reward() == {"reward": 2.0}
        await env.close()
        await env.close()
        with pytest.raises(EnvLostError, match="is closed"):
            await env.reward()
        return child

    child = asyncio.run(play())
    assert log.read_text() == "closed\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_what_goes_wrong_in_a_tool_is_data_and_the_child_lives_on():
    async def play():
        env = await opened(limits=Limits(call_seconds=1.5, max_observation=100))
        await env.reset({"reward": float("nan")}, 0)
        seen = {}
        for name in ("fail", "doze", "leave", "nothing", "big"):
            result = await env.call(call(name))
            seen[name] = (result.error, result.content)
        with pytest.raises(EnvLostError, match="the server is gone"):
            await env.call(call("lose"))
        with pytest.raises(ScoringError, match="expected a finite number; found nan"):
            await env.reward()
        assert (await env.call(call("pid"))).error is None
        await env.close()
        return seen

    seen = asyncio.run(play())
    assert seen["fail"] == ("raised", "fail failed: KeyError: 'tea'")
    assert seen["doze"] == ("timeout", "doze did not finish within 1.5 s.")
    assert seen["leave"] == ("raised", "leave failed: RuntimeError: it called sys.exit(3)")
    assert seen["nothing"][0] == "unknown_tool"
    assert seen["big"] == (None, "x" * 100 + "\n[9999900 more characters cut off: the limit is 100]")


def test_a_hung_child_is_killed_with_all_that_it_started(tmp_path):
    mark = str(tmp_path / "mark")

    async def play():
        env = await opened(log=mark, limits=Limits(call_seconds=1))
        await env.reset({}, 0)
        started = time.perf_counter()
        with pytest.raises(EnvHungError, match=r"tool hang: it did not return within 1 s and was killed"):
            await env.call(call("hang"))
        assert time.perf_counter() - started < 30  # The call itself would take 60 s.
        with pytest.raises(EnvHungError):
            await env.call(call("pid"))
        await env.close()

    def runs() -> bool:
        return mark in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout

    asyncio.run(play())
    deadline = time.monotonic() + 10  # What it had started sleeps for 60 s.
    while runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs()


def test_a_dead_child_is_a_crashed_environment():
    async def play():
        env = await opened()
        await env.reset({}, 0)
        assert env.alive
        with pytest.raises(EnvCrashedError, match=r"tool die: its process died \(killed by SIGSEGV\)"):
            await env.call(call("die"))
        assert not env.alive
        await env.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("tool", "said"), [("scribble", "what its process sent cannot be read"), ("shut", "its process died")]
)
def test_a_wire_that_is_written_to_or_closed_is_a_crash_and_nothing_hangs(tool, said):
    async def play():
        env = await opened()
        await env.reset({}, 0)
        with pytest.raises(EnvCrashedError, match=f"tool {tool}: {said}"):
            await env.call(call(tool))
        await env.close()

    started = time.perf_counter()
    asyncio.run(play())
    assert time.perf_counter() - started < 30


def test_a_call_cancelled_in_the_middle_of_its_answer_leaves_the_wire_in_order():
    async def play():
        env = await opened()
        await env.reset({}, 0)
        size_read = asyncio.Event()
        readexactly = env._reader.readexactly

        async def slowly(count):
            if count > 4:
                size_read.set()
                await asyncio.sleep(0.2)
            return await readexactly(count)

        env._reader.readexactly = slowly
        running = asyncio.create_task(env.call(call("pid")))
        await size_read.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        env._reader.readexactly = readexactly
        assert (await env.call(call("say", text="after"))).content == "after"
        await env.close()

    asyncio.run(play())


def test_a_constructor_that_raises_leaves_a_quiet_child(capfd):
    async def play():
        with pytest.raises(EnvError, match="must be non-negative"):
            await opened(slow=-1.0)

    asyncio.run(play())
    assert "Traceback" not in capfd.readouterr().err


def test_closing_in_the_middle_of_a_call_leaves_nothing_behind():
    async def play():
        env = await opened(limits=Limits(call_seconds=20))
        first = await env.reset({}, 0)
        running = asyncio.create_task(env.call(call("hang")))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await env.close()
        return int(first[0].content.removeprefix("pid "))

    child = asyncio.run(play())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_trl_class_may_live_in_a_process():
    async def play():
        env = await opened("TrlChild")
        assert await env.reset({}, 0) == (Message.user("go"),)
        assert int((await env.call(call("pid"))).content) != os.getpid()
        await env.close()

    asyncio.run(play())


def test_a_class_that_a_child_cannot_import_is_refused():
    class Local(Env):
        isolation = "process"

        def reset(self, task):
            return "hi"

    with pytest.raises(EnvSpecError, match="is defined inside a function: move it to the top of a module"):
        make(Local)


def test_arguments_that_cannot_travel_are_refused():
    with pytest.raises(EnvSpecError, match="arguments of a process must be JSON: a set at log"):
        make(f"{HERE}:Child", args={"log": {1}})
