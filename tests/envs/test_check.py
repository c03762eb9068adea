"""`check` finds each fault in an environment that has it, and none in those that have none."""

import asyncio
import itertools
import random
import time

import pytest

from turnwise.envs import Env, Message, Step, ToolCall, tool
from turnwise.envs.check import check
from turnwise.envs.play import Play
from turnwise.envs.probes import draw, garbage, legal_reply
from turnwise.envs.registry import make
from turnwise.envs.validate import fits
from turnwise.types import StopReason


class Sound(Env):
    """Add one. The base of the faulty ones."""

    inline = True
    max_turns = 4

    def tasks(self, split):
        return [{"n": n} for n in (range(4) if split == "train" else range(4, 6))]

    def reset(self, task):
        self.n = task["n"]
        return f"{self.n} + 1?"

    @tool
    def answer(self, number: int) -> Step:
        """Answer."""
        right = number == self.n + 1
        return Step("right" if right else "wrong", reward=float(right), terminated=True)

    def teacher(self, messages):
        return Message.assistant("", ToolCall(name="answer", arguments={"number": self.n + 1}))


def findings(env, level="error"):
    report = asyncio.run(check(make(env)))
    return [(finding.rule, finding.message) for finding in report.findings if finding.level == level]


def only(found):
    assert len(found) == 1, found
    return found[0]


def test_a_sound_environment_has_nothing_to_mend():
    report = asyncio.run(check(make(Sound)))
    assert report.ok and not report.warnings, report
    rules = [finding.rule for finding in report.findings]
    assert rules == ["tasks", "tools", "reset", "seed", "isolation", "reward", "teacher", "garbage", "time"]
    assert "4 train, 2 test" in report.findings[0].message
    assert set(report.seconds) == {"reset", "call", "reward"}


@pytest.mark.parametrize("name", ["catch", "guess_number", "echo", "reasoning_gym:chain_sum"])
def test_the_library_has_nothing_to_mend(name):
    report = asyncio.run(check(make(name)))
    assert report.ok and not report.warnings, report


def test_rows_that_are_not_json():
    class Sets(Sound):
        def tasks(self, split):
            return [{"n": {1, 2}}]

    rule, message = only(findings(Sets))
    assert rule == "tasks" and "row 0" in message and "a set at n" in message


def test_no_rows():
    class Empty(Sound):
        def tasks(self, split):
            return []

    assert {rule for rule, _ in findings(Empty)} == {"tasks"}


def test_no_test_rows_are_a_warning():
    class Untested(Sound):
        def tasks(self, split):
            return super().tasks(split) if split == "train" else []

    rule, message = only(findings(Untested, "warning"))
    assert rule == "tasks" and message.startswith("nothing can be evaluated")


def test_test_rows_that_are_trained_on_are_a_warning():
    class Leaky(Sound):
        def tasks(self, split):
            return [{"n": n} for n in (range(4) if split == "train" else range(2, 6))]

    rule, message = only(findings(Leaky, "warning"))
    assert rule == "tasks" and message.startswith("2 of 4 test rows are train rows too")


def test_a_reset_that_raises_and_one_that_shows_nothing():
    class Raises(Sound):
        def reset(self, task):
            raise KeyError("m")

    class Silent(Sound):
        def reset(self, task):
            super().reset(task)
            return ""

    assert "KeyError" in only(findings(Raises))[1]
    assert only(findings(Silent))[0] == "reset"


def test_chance_from_elsewhere_than_the_seed():
    dice = itertools.count()

    class Unseeded(Sound):
        def reset(self, task):
            return f"{super().reset(task)} roll {next(dice)}"

    found = findings(Unseeded)
    assert [rule for rule, _ in found] == ["seed", "isolation"]
    assert "roll 1" in found[0][1] and "Use self.rng" in found[0][1]


def test_seeded_chance_is_sound():
    class Seeded(Sound):
        def reset(self, task):
            return f"{super().reset(task)} roll {self.rng.randint(1, 6)}"

    assert findings(Seeded) == []


def test_state_that_survives_reset():
    class Sticky(Sound):
        tries = 0

        @tool
        def answer(self, number: int) -> Step:
            """Answer."""
            self.tries += 1
            return Step(f"try {self.tries}", reward=float(number == self.n + 1), terminated=True)

    rule, message = only(findings(Sticky))
    assert rule == "isolation" and "try" in message and "Set all state in reset" in message


def test_a_teacher_that_raises_and_one_that_earns_less_than_chance():
    class Raises(Sound):
        def teacher(self, messages):
            return {}["gone"]

    class Paid(Sound):
        @tool
        def answer(self, number: int) -> Step:
            """Answer."""
            return Step("ok", reward=0.0 if number == self.n + 1 else 1.0, terminated=True)

    assert "KeyError" in only(findings(Raises))[1]
    rules = {rule for rule, _ in findings(Paid)}
    assert "teacher" in rules


def test_a_teacher_that_errs_is_a_warning():
    class Errs(Sound):
        def teacher(self, messages):
            return Message.assistant("", ToolCall(name="answer", arguments={"number": max(self.n, 2)}))

    rule, message = only(findings(Errs, "warning"))
    assert rule == "teacher" and "does it err?" in message


def test_a_teacher_is_not_needed():
    class Alone(Sound):
        teacher = Env.teacher

    assert findings(Alone) == []


def test_nonsense_that_is_paid():
    class Gullible(Sound):
        def reward(self):
            return 5.0 if not self.said else 0.0

        def reset(self, task):
            self.said = False
            return super().reset(task)

        @tool
        def answer(self, number: int) -> Step:
            """Answer."""
            self.said = True
            return super().answer(number)

    found = findings(Gullible)
    assert found and {rule for rule, _ in found} == {"garbage"}
    assert any(message.startswith("an empty reply was paid 5, the best 1") for _, message in found)


def test_a_reward_that_is_no_number():
    class NotANumber(Sound):
        def reward(self):
            return float("nan")

    rule, message = only(findings(NotANumber))
    assert rule == "reward" and "nan" in message


def test_slow_and_blocking_calls_are_warnings():
    class Blocking(Sound):
        def reset(self, task):
            time.sleep(0.03)
            return super().reset(task)

    class Patient(Blocking):
        inline = False

    rule, message = only(findings(Blocking, "warning"))
    assert rule == "time" and "remove `inline = True`" in message
    assert findings(Patient, "warning") == []


def test_an_environment_that_never_ends_is_given_up():
    class Endless(Sound):
        max_turns = None

        @tool
        def answer(self, number: int) -> Step:
            """Answer."""
            return Step("go on")

    assert findings(Endless) == []


def test_all_instances_are_closed():
    alive = []

    class Counted(Sound):
        def __init__(self):
            alive.append(self)

        def close(self):
            alive.remove(self)

    assert findings(Counted) == []
    assert alive == []


def test_legal_replies_fit_their_schema_and_garbage_does_not():
    spec = make("catch")
    other = make(Sound)

    async def tools():
        sessions = [await each.open(each.limits) for each in (spec, other)]
        return [session.tools[0] for session in sessions]

    for schema in asyncio.run(tools()):
        rng = random.Random(0)
        for _ in range(20):
            call = legal_reply([schema], rng).tool_calls[0]
            assert fits(call.arguments, schema.parameters, schema.parameters)
        for name, message in garbage([schema]).items():
            for call in message.tool_calls:
                if call.name == schema.name:
                    assert not fits(call.arguments, schema.parameters, schema.parameters), name


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 3, "maximum": 4},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
        {"type": "number", "maximum": -7},
        {"type": "string", "minLength": 12, "maxLength": 13},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        {"anyOf": [{"type": "null"}, {"enum": [1, "a"]}]},
        {"$ref": "#/$defs/Point"},
    ],
)
def test_drawn_values_fit(schema):
    root = {
        "$defs": {
            "Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        }
    }
    rng = random.Random(0)
    for _ in range(50):
        assert fits(draw(schema, root, rng), schema, root)


def test_play_counts_turns_pays_and_stops_where_the_limits_say():
    async def one_turn():
        spec = make("catch", args={"rows": 6})
        session = await spec.open(spec.limits)
        play = Play(session, spec.limits)
        first = await play.start({"column": 2, "seed": 0}, 0)
        assert [message.text for message in first] == ["ball 2 paddle 2 rows 5"]
        stay = ToolCall(name="move", arguments={"direction": "stay"})
        told = await play.say(Message.assistant("", *[stay] * 7))
        reward = await play.reward()
        await session.close()
        return play, told, reward

    play, told, reward = asyncio.run(one_turn())
    assert reward == 1.0
    assert [message.text for message in told][-1] == "caught"
    assert len(told) == 5  # after the end no tool runs
    assert (play.stop, play.paid, play.turns, play.tool_calls) == (StopReason.TERMINATED, 1.0, 1, 5)
