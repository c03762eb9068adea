"""A live environment: where its methods run, what their results become, when it is closed."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from turnwise import Env, Message, Step, ToolCall, tool
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import EnvError, EnvLostError, ScoringError
from turnwise.types import ImageBlock, TextBlock


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments, id="c1")


async def session(cls, limits: Limits | None = None, **args):
    spec = make(cls, args=args)
    return await spec.open(limits or spec.limits)


def threads_of(name: str) -> int:
    return sum(thread.name.startswith(f"env-{name}-") for thread in threading.enumerate())


class Shop(Env):
    max_turns = 5
    system = "You are a shopper."

    def __init__(self, tax: float = 0.0) -> None:
        self.tax = tax

    def reset(self, task):
        self.task = task
        return f"Buy {task['item']}. Lucky number {self.rng.randrange(1000)}."

    @tool
    def price(self, item: str) -> int:
        """Look up a price."""
        return {"tea": 3, "jam": 4}[item]

    @tool
    def answer(self, value: str) -> Step:
        """Answer."""
        return Step("Thanks.", reward=value == "3", terminated=True)

    def step(self, reply):
        return Step("Use the tool.", reward=-0.1, info={"n": len(reply)})

    def reward(self):
        return {"bonus": 1, "tax": -self.tax}

    def teacher(self, messages):
        return "three"

    def state_key(self):
        return self.task["item"]


class InlineShop(Shop):
    inline = True


class AsyncShop(Shop):
    async def reset(self, task):
        await asyncio.sleep(0)
        return super().reset(task)

    @tool
    async def price(self, item: str) -> int:
        """Look up a price."""
        await asyncio.sleep(0)
        return {"tea": 3, "jam": 4}[item]

    async def step(self, reply):
        return super().step(reply)

    async def reward(self):
        return super().reward()

    async def teacher(self, messages):
        return Message.assistant("three")

    async def state_key(self):
        return super().state_key()


@pytest.mark.parametrize("cls", [Shop, InlineShop, AsyncShop])
def test_an_episode(cls):
    async def play():
        spec = make(cls, args={"tax": 0.5})
        assert (spec.name, spec.limits.max_turns) == (cls.__name__, 5)
        env = await spec.open(spec.limits)
        assert env.system == "You are a shopper."
        assert env.has_step
        assert [schema.name for schema in env.tools] == ["price", "answer"]
        first = await env.reset({"item": "tea"}, 7)
        assert first == (Message.user("Buy tea. Lucky number 331."),)
        assert await env.state_key() == "tea"
        assert await env.teacher(first) == Message.assistant("three")
        result = await env.call(call("price", item="tea"))
        assert (result.content, result.error, result.step, result.call.id) == ("3", None, None, "c1")
        assert await env.step(Message.assistant("hm")) == Step("Use the tool.", reward=-0.1, info={"n": 2})
        result = await env.call(call("answer", value=3))
        assert (result.content, result.coerced) == ("Thanks.", 1)
        assert result.step == Step("Thanks.", reward=1.0, terminated=True)
        assert await env.reward() == {"bonus": 1.0, "tax": -0.5}
        assert await env.reset({"item": "tea"}, 7) == first
        await env.close()
        await env.close()
        with pytest.raises(EnvLostError, match="is closed"):
            await env.call(call("price", item="tea"))

    asyncio.run(play())


def test_what_is_not_defined_is_said():
    class Bare(Env):
        inline = True

        def reset(self, task):
            return "hi"

    async def play():
        env = await session(Bare)
        await env.reset({}, 0)
        assert not env.has_step
        assert await env.reward() == {}
        assert await env.state_key() is None
        assert (await env.call(call("x"))).content == "There is no tool 'x': this task has none."
        with pytest.raises(EnvError, match="environment Bare has no teacher"):
            await env.teacher([])

    asyncio.run(play())


class Threads(Env):
    """Remembers which thread ran what."""

    seen: list[tuple[str, int]]

    def __init__(self):
        self.seen = [("init", threading.get_ident())]
        self.busy = 0

    def note(self, what):
        self.seen.append((what, threading.get_ident()))

    def reset(self, task):
        self.note("reset")
        return "hi"

    @tool
    def work(self) -> int:
        """Work."""
        self.busy += 1
        time.sleep(0.02)
        self.note("work")
        self.busy -= 1
        return self.busy

    @tool
    async def idle(self) -> int:
        """Idle."""
        self.busy += 1
        await asyncio.sleep(0.02)
        self.note("idle")
        self.busy -= 1
        return self.busy

    def step(self, reply):
        self.note("step")
        return Step()

    def reward(self):
        self.note("reward")
        return 1.0

    def close(self):
        self.note("close")


def test_sync_methods_have_one_thread_for_life_and_async_ones_the_loop():
    async def play():
        env = await session(Threads)
        inner = env._env
        await env.reset({}, 0)
        await env.call(call("work"))
        await env.call(call("idle"))
        await env.step(Message.assistant("x"))
        await env.reward()
        await env.close()
        return inner.seen

    seen = asyncio.run(play())
    here = threading.get_ident()
    assert [what for what, _ in seen] == ["init", "reset", "work", "idle", "step", "reward", "close"]
    idents = {ident for what, ident in seen if what != "idle"}
    assert len(idents) == 1 and here not in idents
    assert dict(seen)["idle"] == here


def test_tools_of_one_environment_never_overlap():
    async def play():
        env = await session(Threads)
        results = await asyncio.gather(*(env.call(call(name)) for name in ["work", "idle", "work", "idle"]))
        await env.close()
        return [result.content for result in results]

    assert asyncio.run(play()) == ["0", "0", "0", "0"]


def test_environments_do_not_wait_for_each_other():
    met = threading.Barrier(20)

    class Slow(Env):
        def reset(self, task):
            met.wait(60)  # For all the others.
            return "hi"

    async def play():
        envs = await asyncio.gather(*(session(Slow) for _ in range(20)))
        found = await asyncio.gather(*(env.reset({}, 0) for env in envs))
        await asyncio.gather(*(env.close() for env in envs))
        return found

    assert asyncio.run(play()) == [(Message.user("hi"),)] * 20


def test_an_environment_of_coroutines_has_no_thread():
    class Quick(Env):
        async def reset(self, task):
            return "hi"

        @tool
        async def go(self) -> str:
            """Go."""
            return "gone"

    async def play():
        env = await make(Quick, name="threadless").open(Limits())
        await env.reset({}, 0)
        assert (await env.call(call("go"))).content == "gone"
        assert threads_of("threadless") == 0
        await env.close()

    asyncio.run(play())


def test_threads_end_with_their_environment():
    async def play():
        env = await make(Shop, name="ending").open(Limits())
        assert threads_of("ending") == 1
        await env.close()
        env._thread._thread.join(10)
        assert threads_of("ending") == 0

    asyncio.run(play())


def test_a_task_cannot_be_changed_for_the_siblings():
    class Greedy(Env):
        inline = True

        def reset(self, task):
            task["list"].append(1)
            return str(task["list"])

    async def play():
        env = await session(Greedy)
        task = {"list": []}
        assert (await env.reset(task, 0))[0].content == "[1]"
        assert (await env.reset(task, 0))[0].content == "[1]"
        assert task == {"list": []}

    asyncio.run(play())


class Returns(Env):
    """Tools and reset return what the test puts here."""

    inline = True
    value: object = None

    def reset(self, task):
        return Returns.value

    @tool
    def get(self) -> str:
        """Get."""
        return Returns.value

    def step(self, reply):
        return Returns.value

    def reward(self):
        return Returns.value


async def returned(value):
    Returns.value = value
    env = await session(Returns, Limits(max_observation=20))
    return env


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
        ((1, 2), "[1,2]"),
        ("x" * 25, "x" * 20 + "\n[5 more characters cut off: the limit is 20]"),
        ("a\ud800b", "a?b"),
        (TextBlock(text="t"), (TextBlock(text="t"),)),
        ([TextBlock(text="t"), ImageBlock(sha256="00")], (TextBlock(text="t"), ImageBlock(sha256="00"))),
    ],
    ids=repr,
)
def test_a_result_becomes_an_observation(value, content):
    async def play():
        result = await (await returned(value)).call(call("get"))
        assert (result.content, result.error) == (content, None)

    asyncio.run(play())


def test_reset_may_return_text_blocks_or_messages():
    async def first(value):
        return await (await returned(value)).reset({}, 0)

    few_shot = [Message.system("s"), Message.user("q"), Message.assistant("a"), Message.user("q2")]
    assert asyncio.run(first("hi")) == (Message.user("hi"),)
    assert asyncio.run(first([TextBlock(text="t")])) == (Message.user((TextBlock(text="t"),)),)
    assert asyncio.run(first(few_shot)) == tuple(few_shot)
    long = "x" * 100
    assert asyncio.run(first(long)) == (Message.user(long),)  # A task is not cut: the token budget decides.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None; return text, content blocks or a list of Message"),
        ([], "returned an empty list"),
        (3, "returned an int"),
        ([Message.assistant("a")], "ended with an assistant message"),
    ],
)
def test_reset_must_say_something(value, message):
    async def play():
        with pytest.raises(EnvError, match=f"environment Returns: reset {message}"):
            await (await returned(value)).reset({}, 0)

    asyncio.run(play())


def test_one_system_message_only():
    class Two(Env):
        inline = True
        system = "one"

        def reset(self, task):
            return [Message.system("two"), Message.user("hi")]

    async def play():
        with pytest.raises(EnvError, match="keep one"):
            await (await session(Two)).reset({}, 0)

    asyncio.run(play())


def test_steps_answer_with_text_or_messages():
    async def play():
        env = await returned(Step("x" * 30))
        assert (await env.step(Message.assistant(""))).observation.startswith("x" * 20 + "\n[10 more")
        messages = [Message.user("a"), Message.user("b")]
        env = await returned(Step(messages))
        assert (await env.step(Message.assistant(""))).observation == messages
        roomy = await make(Returns).open(Limits())
        result = await roomy.call(call("get"))
        assert result.error == "bad_result"
        assert result.content == (
            "get failed: it returned a Step with messages: a tool's Step holds text or content blocks."
        )

    asyncio.run(play())


@pytest.mark.parametrize(
    ("value", "rewards"), [(1, {"reward": 1.0}), ({"a": True, "b": 0.5}, {"a": 1.0, "b": 0.5}), ({}, {})]
)
def test_rewards(value, rewards):
    async def play():
        assert await (await returned(value)).reward() == rewards

    asyncio.run(play())


def test_step_and_reward_of_numpy():
    import numpy as np

    async def play():
        assert await (await returned(np.float32(0.5))).reward() == {"reward": 0.5}
        step = await (await returned(Step(reward=np.bool_(True)))).step(Message.assistant(""))
        assert step.reward == 1.0

    asyncio.run(play())


@pytest.mark.parametrize("value", [None, "1", [1.0], float("nan"), {"a": float("inf")}])
def test_no_reward(value):
    async def play():
        with pytest.raises(ScoringError, match="environment Returns: reward"):
            await (await returned(value)).reward()

    asyncio.run(play())


def test_unknown_and_malformed_calls():
    async def play():
        env = await session(InlineShop)
        await env.reset({"item": "tea"}, 0)
        result = await env.call(call("anwser", value="3"))
        assert result.error == "unknown_tool"
        assert result.content == "There is no tool 'anwser'. Available: answer, price."
        broken = ToolCall(name="price", arguments={}, error="arguments are not valid JSON")
        result = await env.call(broken)
        assert result.error == "malformed"
        assert result.content == (
            "The tool call could not be read: arguments are not valid JSON. "
            "The form is price(item: a string)."
        )
        result = await env.call(call("price", itme="tea"))
        assert result.error == "bad_arguments"
        assert "itme is no parameter; did you mean item?" in result.content
        await env.close()

    asyncio.run(play())


class Closing(Env):
    """Tells of its closes."""

    entered, left = threading.Event(), threading.Event()
    """A call has begun; it may return."""

    def __init__(self, log: list[str], fails: bool = False) -> None:
        self.log = log
        if fails:
            raise OSError("no such game")

    def reset(self, task):
        raise ValueError("bad task")

    @tool
    def wait(self) -> str:
        """Wait."""
        self.entered.set()
        self.left.wait(60)
        return "done"

    @tool
    async def nap(self) -> str:
        """Nap."""
        self.entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.log.append("nap ended")

    def close(self):
        self.log.append("closed")
        raise RuntimeError("cannot close")


class AsyncClosing(Closing):
    async def close(self):
        await asyncio.sleep(0)
        self.log.append("closed")


@pytest.mark.parametrize("cls", [Closing, AsyncClosing])
def test_close_after_a_failed_reset_never_raises(cls):
    async def play(log):
        env = await session(cls, log=log)
        with pytest.raises(EnvError, match=r"environment .*Closing: reset: ValueError: bad task"):
            await env.reset({}, 0)
        await env.close()
        await env.close()

    log = []
    asyncio.run(play(log))
    assert log == ["closed"]


def test_a_failing_constructor_is_an_env_error():
    async def play():
        spec = make(Closing, name="failing", args={"log": [], "fails": True})
        with pytest.raises(EnvError, match="environment failing: constructor: OSError: no such game"):
            await spec.open(spec.limits)
        deadline = time.monotonic() + 10
        while threads_of("failing") and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert threads_of("failing") == 0

    asyncio.run(play())


@pytest.mark.parametrize(("name", "ended"), [("wait", ["closed"]), ("nap", ["nap ended", "closed"])])
def test_cancelling_a_call_and_closing(name, ended, monkeypatch):
    monkeypatch.setattr("turnwise.envs.host.GRACE_SECONDS", 30.0)
    monkeypatch.setattr("turnwise.envs.contain.CANCEL_SECONDS", 30.0)
    Closing.entered.clear()
    Closing.left.clear()

    async def play(log):
        env = await session(Closing, log=log)
        running = asyncio.create_task(env.call(call(name)))
        async with asyncio.timeout(30):
            while not Closing.entered.is_set():
                await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        threading.Timer(0.2, Closing.left.set).start()
        await env.close()

    log = []
    asyncio.run(play(log))
    assert log == ended


def test_closing_does_not_wait_for_a_call_that_was_cancelled_and_goes_on():
    entered, free = threading.Event(), threading.Event()

    class Sleeper(Env):
        def __init__(self, log):
            self.log = log

        def reset(self, task):
            entered.set()
            free.wait(60)
            self.log.append("reset ended")
            return "late"

        async def close(self):
            self.log.append("closed")

    async def play(log):
        env = await session(Sleeper, log=log)
        running = asyncio.create_task(env.reset({}, 0))
        async with asyncio.timeout(30):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        began = time.monotonic()
        await env.close()
        assert time.monotonic() - began < 30 and log == []
        free.set()
        while "closed" not in log and time.monotonic() - began < 50:
            await asyncio.sleep(0.01)
        assert log == ["reset ended", "closed"]

    asyncio.run(play([]))


def test_an_inline_call_costs_microseconds():
    async def play():
        env = await session(InlineShop)
        await env.reset({"item": "tea"}, 0)
        best = 1.0
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(50):
                await env.call(call("price", item="tea"))
            best = min(best, (time.perf_counter() - started) / 50)
        await env.close()
        return best

    assert asyncio.run(play()) < 200e-6
