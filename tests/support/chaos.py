"""A chaos environment, and what should become of each of its episodes.

An episode's plan follows from its id alone: what the policy does turn by turn, and with a chance of 30% one
fault: what breaks, where, when. `Plan.expected` works out how such an episode must end. Siblings have plans
of their own, so a fault that touched a sibling would show as a difference.

    Inline, Threaded, Apart     the environment on the loop, on threads, in processes
    ChaosPool                   tells each environment which episode it plays (a session is never told)
    actor                       the policy: does what the plan says
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from zlib import crc32

from turnwise.envs.base import Env, tool
from turnwise.envs.session import Session
from turnwise.errors import EngineError, EnvLostError
from turnwise.rollout.policy import Context
from turnwise.rollout.sessions import SessionPool
from turnwise.types import Finish, Message, Reply, Step, StopReason, ToolCall, Trajectory

FAULTY = 0.3
MAX_TURNS = 6
CALL_SECONDS = 12.0
HANG = 20.0
"""Seconds: a thread cannot be killed, so a hang ends by itself, well past the deadline."""
OWN_REWARD = 2.0

ACTIONS = {
    "fine": 40, "pay": 15, "say": 12, "many": 8, "unknown": 5, "malformed": 5,
    "win": 8, "fuel": 4, "goodbye": 3,
}  # fmt: skip
"""What a policy does where nothing breaks, by weight."""
PAYS = {"pay": 0.25, "win": 1.0, "say": 0.125, "goodbye": 0.5}
ENDS = {"win": StopReason.TERMINATED, "goodbye": StopReason.TERMINATED, "fuel": StopReason.ENV_TRUNCATED}
ERRORS = {"unknown": 1, "malformed": 1}


class OddError(BaseException):
    """What no `except Exception` catches."""


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


def _raises(error: BaseException) -> Callable[[], Any]:
    def raising() -> None:
        raise error

    return raising


def _endless(depth: int = 0) -> int:
    return _endless(depth + 1) + 1


def _cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _nested() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


async def _nothing() -> None:
    pass


def _forgotten() -> list[Any]:
    never_awaited = _nothing()
    never_awaited.close()
    return [never_awaited]


def _scribble() -> None:
    """Write to whatever is open, the wire among it."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\x00\x00\x00\x05junk!")
        except OSError:
            continue


RAISING: dict[str, Callable[[], Any]] = {
    "value_error": _raises(ValueError("not like this")),
    "long_message": _raises(ValueError("x" * 3_000_000)),
    "surrogate_message": _raises(ValueError("\ud800")),
    "unprintable": _raises(UnprintableError()),
    "exit": partial(sys.exit, 3),
    "keyboard": _raises(KeyboardInterrupt()),
    "cancelled": _raises(asyncio.CancelledError()),
    "generator_exit": _raises(GeneratorExit()),
    "stop_iteration": _raises(StopIteration("over")),
    "odd": _raises(OddError()),
    "timeout_error": _raises(TimeoutError()),
    "memory": _raises(MemoryError()),
    "recursion": _endless,
}
GARBAGE: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"\xff\x00",
    "set": lambda: {1, 2},
    "object": object,
    "error": lambda: ValueError("returned and not raised"),
    "cycle": _cycle,
    "nested": _nested,
    "generator": lambda: (n for n in range(3)),
    "forgotten": _forgotten,
    "nan": lambda: [float("nan")],
    "keys": lambda: {(1, 2): 3},
    "class": lambda: Env,
}
DYING: dict[str, Callable[[], Any]] = {
    "os_exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "close_fds": lambda: os.closerange(3, 256),
    "scribble": _scribble,
}
BAD_STEPS: dict[str, Callable[[], Any]] = {
    "nan_reward": lambda: Step("x", reward=float("nan")),
    "inf_reward": lambda: Step("x", reward=float("inf"), terminated=True),
    "text_reward": lambda: Step("x", reward="much"),
    "ends_twice": lambda: Step("x", terminated=True, truncated=True),
    "bad_info": lambda: Step("x", info={"x": object()}),
    "nan_info": lambda: Step("x", info={"x": float("nan")}),
    "odd_messages": lambda: Step([Message(role="banana", content="x")]),
}
BAD_STARTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "number": lambda: 7,
    "empty": list,
    "mapping": lambda: {"role": "user", "content": "x"},
    "banana": lambda: [Message(role="banana", content="x")],
    "odd_name": lambda: [Message(role="user", content="x", name=5)],
    "odd_call": lambda: [Message(role="user", content="x", tool_calls=("x",))],
    "assistant": lambda: [Message.assistant("I go first")],
}
BAD_REWARDS: dict[str, Callable[[], Any]] = {
    "nan": lambda: float("nan"),
    "named_inf": lambda: {"a": float("inf")},
    "text": lambda: "much",
    "none": lambda: None,
    "huge": lambda: 10**400,
    "list": lambda: [1.0],
    "generator": lambda: (n for n in range(3)),
    "our_name": lambda: {"steps": 1.0},
}
BAD_KEYS: dict[str, Callable[[], Any]] = {"no_key": lambda: None, "number_key": lambda: 7}
HARMLESS = (
    "slow", "large", "surrogate", "huge_info", "print", "leak_thread", "leak_file", "leak_memory", "mutate",
)  # fmt: skip
HARMLESS_APART = ("leak_child", "chdir", "environ", "reseed", "flood")
"""What only an environment in a process of its own may do."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks."""

    phase: str
    """``init``, ``reset``, ``state_key``, ``tool``, ``step``, ``reward``, ``close``, ``policy``."""
    kind: str
    end: StopReason | None = None
    """What it ends the episode in, once the policy has spoken; None lets it go on."""
    error: bool = False
    """It counts as a tool error."""
    weight: float = 1.0


def faults(form: str) -> list[Fault]:
    """All that can break in an environment that runs inline, on a thread, or apart."""
    failed, forfeited = StopReason.ENV_FAILED, StopReason.FORFEITED
    can_hang, apart = form != "inline", form == "apart"
    found = [Fault("policy", "engine", StopReason.POLICY_FAILED, weight=8)]
    for phase in ("init", "reset"):
        kinds = [*RAISING, "lost", *(DYING if apart else ()), *(BAD_STARTS if phase == "reset" else ())]
        found += [Fault(phase, kind, failed) for kind in kinds]
    if can_hang:
        found.append(Fault("reset", "hang", failed, weight=0.5))
    for phase in ("tool", "step"):
        found += [Fault(phase, kind, error=phase == "tool") for kind in RAISING]
        found += [Fault(phase, kind, error=phase == "tool") for kind in GARBAGE]
        found += [
            Fault(phase, kind, forfeited) for kind in BAD_STEPS if phase == "step" or kind != "odd_messages"
        ]
        found += [Fault(phase, kind) for kind in (*HARMLESS, *(HARMLESS_APART if apart else ()))]
        found += [Fault(phase, kind, forfeited) for kind in (DYING if apart else ())]
        found.append(Fault(phase, "lost", failed, weight=4))
        if can_hang:
            found.append(Fault(phase, "hang", StopReason.TIME_LIMIT, weight=0.5))
    if not can_hang:
        found.append(Fault("tool", "hang", error=True, weight=0.5))  # A coroutine: it can be stopped.
    for phase, garbage in (("state_key", BAD_KEYS), ("reward", BAD_REWARDS)):
        kinds = [*RAISING, *garbage, *(DYING if apart else ())]
        found += [Fault(phase, kind, forfeited) for kind in kinds]
        found.append(Fault(phase, "lost", failed, weight=2))
        if can_hang:
            found.append(Fault(phase, "hang", forfeited, weight=0.3))
    found += [Fault("close", kind) for kind in (*RAISING, "lost", *(DYING if apart else ()))]
    if can_hang:
        found.append(Fault("close", "hang", weight=0.3))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What becomes of an episode."""

    stop: StopReason
    reward: float | None
    turns: int
    tool_errors: int

    @classmethod
    def of(cls, one: Trajectory) -> Outcome:
        """What became of one."""
        errors = one.metrics["tool_errors"] + one.metrics["malformed_calls"]
        return cls(stop=one.stop_reason, reward=one.reward, turns=len(one.turns), tool_errors=int(errors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens in one episode."""

    actions: tuple[str, ...]
    """The policy's, by turn; ``boom`` makes a tool or the step break."""
    fault: Fault | None = None
    turn: int = 0
    """At which the fault happens."""

    def expected(self) -> Outcome:
        """How the episode must end."""
        fault, paid, errors = self.fault, 0.0, 0

        def ended(stop: StopReason, turns: int, own: float | None = OWN_REWARD) -> Outcome:
            if fault is not None and fault.phase == "reward" and own is not None:
                assert fault.end is not None
                stop, own = fault.end, 0.0
            if stop in (StopReason.FORFEITED, StopReason.TIME_LIMIT):
                own = 0.0
            reward = None if stop.failed or own is None else paid + own
            return Outcome(stop=stop, reward=reward, turns=turns, tool_errors=errors)

        if fault is not None and fault.phase in ("init", "reset"):
            return ended(StopReason.ENV_FAILED, 0, None)
        for turn, action in enumerate(self.actions):
            here = fault if fault is not None and turn == self.turn else None
            if here is not None and here.phase in ("state_key", "policy"):
                assert here.end is not None
                blamed = here.end if turn or here.phase == "policy" else StopReason.ENV_FAILED
                return ended(blamed, turn, None if blamed.failed else 0.0)
            if here is not None and here.phase in ("tool", "step"):
                errors += here.error
                if here.end is not None:
                    return ended(here.end, turn + 1, None if here.end.failed else 0.0)
                continue
            paid += PAYS.get(action, 0.0)
            errors += ERRORS.get(action, 0)
            if action in ENDS:
                return ended(ENDS[action], turn + 1)
        return ended(StopReason.MAX_TURNS, len(self.actions))


@lru_cache(maxsize=65536)
def plan_of(episode: str, form: str, calm: bool = False) -> Plan:
    """The plan of an episode; a calm one has the same actions and no fault."""
    rng = random.Random(f"{episode}/{form}")
    actions = rng.choices(list(ACTIONS), list(ACTIONS.values()), k=MAX_TURNS)
    if rng.random() >= FAULTY or calm:
        return Plan(actions=tuple(actions))
    choices = _faults_of(form)
    fault = rng.choices(choices, [one.weight for one in choices])[0]
    length = next((n for n, action in enumerate(actions, 1) if action in ENDS), MAX_TURNS)
    turn = rng.randrange(length)
    if fault.phase in ("tool", "step"):
        actions[turn] = f"boom_{fault.phase}"
    return Plan(actions=tuple(actions), fault=fault, turn=turn)


_faults_of = lru_cache(faults)


# ---------------------------------------------------------------------------------------------------


class Chaos:
    """What the three environments share; mixed in before `Env`."""

    max_turns = MAX_TURNS
    form = "inline"
    rng: random.Random

    def __init__(self, fault: str | None = None) -> None:
        self.leaks: list[Any] = []
        self.closing: str | None = None
        self.over = threading.Event()
        if fault is not None:
            self.break_down(fault)

    def reset(self, task: Mapping[str, Any]) -> Any:
        self.plan = plan_of(task["episode"], self.form, task["calm"])
        self.turn = self.number = 0
        self.task = task
        fault = self.plan.fault
        if fault is not None and fault.phase == "close":
            self.closing = fault.kind
        if fault is not None and fault.phase == "reset":
            return self.break_down(fault.kind)
        return f"Go {self.rng.randrange(1000)}."

    def state_key(self) -> Any:
        fault, turn = self.plan.fault, self.turn
        self.turn += 1
        if fault is not None and fault.phase == "state_key" and turn == self.plan.turn:
            return self.break_down(fault.kind)
        return f"{self.number}"

    def do(self, what: str) -> Any:
        if what.startswith("boom"):
            assert self.plan.fault is not None
            return self.break_down(self.plan.fault.kind)
        self.number += 1
        return Step(
            f"{what} {self.number} {self.rng.randrange(1000)}",
            reward=PAYS.get(what),
            terminated=ENDS.get(what) is StopReason.TERMINATED,
            truncated=ENDS.get(what) is StopReason.ENV_TRUNCATED,
            info={"number": self.number},
        )

    def step(self, reply: str) -> Any:
        return self.do(reply)

    def reward(self) -> Any:
        fault = self.plan.fault
        if fault is not None and fault.phase == "reward":
            return (BAD_REWARDS.get(fault.kind) or partial(self.break_down, fault.kind))()
        return OWN_REWARD

    def close(self) -> None:
        self.over.set()
        for leak in self.leaks:
            if hasattr(leak, "close"):
                leak.close()
        self.leaks.clear()
        if self.closing is not None:
            self.break_down(self.closing)

    def break_down(self, kind: str) -> Any:
        """Raise, hang, die, return nonsense, or do what should not be done."""
        for table in (RAISING, GARBAGE, DYING, BAD_STEPS, BAD_STARTS, BAD_KEYS):
            if kind in table:
                return table[kind]()
        if kind == "lost":
            raise EnvLostError("the server is gone")
        if kind == "hang":
            time.sleep(HANG)
        return Step(self.misbehave(kind) or "ok", info={"kind": 10**400 if kind == "huge_info" else 1})

    def misbehave(self, kind: str) -> str | None:
        """Do what does no harm to anybody else, and should not be done."""
        match kind:
            case "slow":
                time.sleep(0.002 if self.form == "inline" else 0.05)
            case "large":
                return "x" * 50_000_000 if self.form == "threaded" else "x" * 1_000_000
            case "surrogate":
                return "\ud800 and \x00"
            case "print":
                print("\x00\x00\x00\x05not the wire's affair", flush=True)
            case "leak_thread":
                threading.Thread(target=self.over.wait, daemon=True).start()
            case "leak_file":
                self.leaks.append(open("/dev/null"))  # noqa: SIM115
            case "leak_memory":
                self.leaks.append(bytearray(100_000))
            case "mutate":
                self.task["nested"].clear()
                self.task["nested"].append("spoilt")
            case "leak_child":
                subprocess.Popen(["sleep", "60"])
            case "chdir":
                os.chdir("/")
            case "environ":
                os.environ.clear()
            case "reseed":
                random.seed(0)
            case "flood":
                sys.stdout.write("x" * 100_000)
        return None


class Threaded(Chaos, Env):
    """Sync methods, on a thread for each environment."""

    form = "threaded"

    @tool
    def act(self, what: str) -> Any:
        """Do something."""
        return self.do(what)


class Inline(Chaos, Env):
    """On the event loop; the tool is a coroutine."""

    form = "inline"
    inline = True

    @tool
    async def act(self, what: str) -> Any:
        """Do something."""
        await asyncio.sleep(0)
        if what.startswith("boom") and self.plan.fault is not None and self.plan.fault.kind == "hang":
            await asyncio.sleep(60)
        return self.do(what)


class Apart(Threaded):
    """In a process of its own."""

    form = "apart"
    isolation = "process"


FORMS: dict[str, type[Env]] = {"inline": Inline, "threaded": Threaded, "apart": Apart}


# ---------------------------------------------------------------------------------------------------


class ChaosPool(SessionPool):
    """Hands each episode's id to its environment, which no session is told, and its constructor its fault."""

    async def acquire(self) -> Session:
        episode, task = playing()
        plan = plan_of(episode, self.spec.env_class.form, task["calm"])
        if plan.fault is not None and plan.fault.phase == "init":
            return await replace(self.spec, args={"fault": plan.fault.kind}).open(self.limits)
        session = await super().acquire()

        async def reset(task: Any, seed: int) -> Any:
            return await type(session).reset(session, {**task, "episode": episode}, seed)

        session.reset = reset
        return session


def playing() -> tuple[str, Mapping[str, Any]]:
    """Id and task of the episode that this task plays, off its frame: `play_siblings` gives each its own."""
    task = asyncio.current_task()
    assert task is not None
    episode = task.get_coro().cr_frame.f_locals["episode"]
    return episode.id, episode.task


def actor(context: Context, calm: bool = False) -> Reply:
    """Does what the plan says; its tokens are made from the messages, so that these show in the ids."""
    plan = plan_of(context.session, context.session.partition("/")[0], calm)
    if plan.fault is not None and plan.fault.phase == "policy" and context.turn == plan.turn:
        raise EngineError("worker died")
    message = said(plan.actions[context.turn])
    told = [f"{one.role} {one.text}".encode("utf-8", "replace") for one in context.new_messages]
    return Reply(
        message=message,
        context_ids=[crc32(one) for one in told],
        ids=[crc32(str(message).encode()), 2],
        logprobs=[-0.5, -0.25],
        versions=[0, 0],
        finish=Finish.STOP,
    )


def said(action: str) -> Message:
    """A reply that does it."""
    act = partial(ToolCall, name="act")
    match action:
        case "say" | "goodbye" | "boom_step":
            return Message.assistant(action)
        case "many":
            return Message.assistant("", act(arguments={"what": "fine"}), act(arguments={"what": "fine"}))
        case "unknown":
            return Message.assistant("", ToolCall(name="fly", arguments={}))
        case "malformed":
            return Message.assistant("", act(arguments={}, error="not JSON", raw="{"))
    return Message.assistant("", act(arguments={"what": action}))
