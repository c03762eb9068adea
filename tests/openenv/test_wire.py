"""Frames: what is read, what is written, what of numpy, NaN and models survives; messages and tasks."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import fractions
import ipaddress
import json
import math
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, HttpUrl, SecretStr, TypeAdapter

from turnwise import images
from turnwise.errors import ActionError, EnvError, EnvHungError
from turnwise.openenv import payload, wire
from turnwise.openenv.served import Answer
from turnwise.types import Message, TextBlock, ToolCall

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_json_crosses_as_it_is(value: Any) -> None:
    assert wire.load(wire.dump(value)) == value
    assert wire.load(json.dumps(value)) == value
    assert wire.load(json.dumps(value).encode()) == value


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**70), 10**30])
def test_whole_numbers_are_never_rounded(number: int) -> None:
    assert wire.request(f'{{"type": "reset", "data": {{"seed": {number}}}}}')[1] == {"seed": number}
    assert json.loads(wire.dump({"n": number})) == {"n": number}


def test_nan_is_read_as_python_reads_it_and_written_as_null() -> None:
    assert math.isnan(wire.load('{"x": NaN}')["x"])
    written = wire.dump(
        {"x": float("nan"), "y": [np.float32("inf")], "z": np.array([1.0, np.nan]), 3: 10**30}
    )
    assert json.loads(written) == {"x": None, "y": [None], "z": [1.0, None], "3": 10**30}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.int8(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (np.eye(4)[::2, ::2], [[1.0, 0.0], [0.0, 1.0]]),
        (np.array(["a"]), ["a"]),
        (np.array(2.5), 2.5),
        ((1, 2), [1, 2]),
    ],
)
def test_numpy_is_written(value: Any, plain: Any) -> None:
    assert json.loads(wire.dump({"v": value})) == {"v": plain}
    assert json.loads(wire.dump({"v": value, "big": 2**80})) == {"v": plain, "big": 2**80}


def test_models_are_written_with_all_their_fields() -> None:
    class Base(BaseModel):
        model_config = {"extra": "allow"}
        a: int = 1

    class More(Base):
        b: float = math.nan

    assert json.loads(wire.dump({"m": More(c="x")})) == {"m": {"a": 1, "b": None, "c": "x"}}  # type: ignore[call-arg]


class Colour(enum.Enum):
    RED = "red"
    TWO = 2


@dataclasses.dataclass
class Dated:
    at: datetime.datetime = datetime.datetime(2024, 1, 1)


NOON = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
ID = uuid.UUID(int=1)
HELD: dict[str, Any] = {
    "timedelta": datetime.timedelta(days=1, seconds=2),
    "date": datetime.date(2024, 1, 1),
    "time": datetime.time(1, 2, tzinfo=datetime.UTC),
    "datetime": datetime.datetime(2024, 1, 1, 2, 3, 4, 5),
    "datetime, UTC": NOON,
    "datetime, elsewhere": NOON.astimezone(datetime.timezone(datetime.timedelta(hours=2))),
    "decimal": Decimal("1.50"),
    "fraction": fractions.Fraction(1, 2),
    "complex": 1 + 2j,
    "enums": [Colour.RED, Colour.TWO],
    "deque": collections.deque([1, NOON]),
    "sets": [{"b"}, frozenset([1])],
    "named tuple": collections.namedtuple("Point", "x y")(1, 2),
    "counter": collections.Counter("aab"),
    "address": ipaddress.ip_address("1.2.3.4"),
    "network": ipaddress.ip_network("10.0.0.0/8"),
    "url": TypeAdapter(HttpUrl).validate_python("http://a.b/"),
    "secret": SecretStr("x"),
    "pattern": re.compile("a+"),
    "path": Path("/a/b"),
    "bytes": b"ab",
    "dataclass": Dated(),
    "floats": [float("nan"), float("inf"), 0.1],
    "a great number": 10**30,
    "keys, numbers": {2: "a", 1.5: "b", True: "c"},
    "keys, nothing": {None: 1},
    "keys, enums": {Colour.RED: 1, Colour.TWO: 2},
    "keys, tuples": {(0, 1): "x"},
    "keys, uuid": {ID: 1},
    "keys, dates": {NOON: 1, datetime.date(2024, 1, 1): 2},
    "numbers and a date": {1: datetime.datetime(2024, 1, 1)},
    "numbers and a uuid": {1: ID},
    "numbers and an enum": {1: Colour.RED},
    "numbers and a dataclass": {1: Dated()},
    "numbers and a set": {1: {2}, 2: collections.deque([math.nan])},
}


@pytest.mark.parametrize("name", HELD)
def test_what_observations_hold_is_sent_as_openenv_core_sends_it(name: str) -> None:
    from openenv.core.env_server.serialization import serialize_observation
    from openenv.core.env_server.types import Observation, WSObservationResponse

    class Holds(Observation):
        value: Any = None

    holds = Holds(value=HELD[name])
    theirs = WSObservationResponse(data=serialize_observation(holds)).model_dump_json()
    ours = wire.observation(Answer(observation=holds.model_dump(include={"value"})))
    assert json.loads(ours)["data"]["observation"] == json.loads(theirs)["data"]["observation"]
    # As it is, too: in what tools return no model stands around it.
    assert json.loads(wire.dump({"value": HELD[name]})) == json.loads(theirs)["data"]["observation"]


def test_models_beside_keys_that_are_no_text_are_written_whole() -> None:
    class Base(BaseModel):
        a: int = Field(1, serialization_alias="A")

    class More(Base):
        b: Any = None

    class Holds(BaseModel):
        one: Base

    value = {1: Holds(one=More(b=np.array([1.0, math.nan])))}
    assert json.loads(wire.dump(value)) == {"1": {"one": {"a": 1, "b": [1.0, None]}}}
    assert json.loads(wire.dump(list(value.values()))) == [{"one": {"a": 1, "b": [1.0, None]}}]


@pytest.mark.parametrize("value", [object(), b"\xff", {"k": {object(): 3}}, {1: np.array([object()])}])
def test_what_is_no_json_is_an_error(value: Any) -> None:
    with pytest.raises(EnvError, match="no JSON"):
        wire.observation(Answer(observation={"v": value}))


def test_an_observation_has_its_metadata_at_the_top() -> None:
    frame = json.loads(wire.observation(Answer(observation={"x": 1}, reward=0.5, metadata={"m": 2})))
    assert frame["type"] == "observation"
    assert frame["data"] == {"observation": {"x": 1}, "reward": 0.5, "done": False, "metadata": {"m": 2}}


def test_errors_say_their_kind() -> None:
    hung = json.loads(wire.failure(EnvHungError("it hangs")))["data"]
    assert hung == {"message": "it hangs", "code": "EXECUTION_ERROR", "kind": "EnvHungError"}
    wrong = json.loads(wire.failure(ActionError("no")))["data"]
    assert wrong["code"] == "VALIDATION_ERROR" and wrong["errors"][0]["msg"] == "no"


def test_an_action_that_a_model_refused_says_where() -> None:
    class Move(BaseModel):
        x: int

    def refused() -> ActionError:
        try:
            Move.model_validate({"x": "far"})
        except ValueError as cause:
            error = ActionError("no such move")
            error.__cause__ = cause
            return error
        raise AssertionError

    (one,) = json.loads(wire.failure(refused()))["data"]["errors"]
    assert (one["type"], one["loc"], one["input"]) == ("int_parsing", ["x"], "far")


def test_reset_needs_no_data() -> None:
    assert wire.request('{"type": "reset"}') == ("reset", {})
    assert wire.request('{"type": "state"}') == ("state", {})


MESSAGES = [
    Message.system("be brief"),
    Message.user("hello"),
    Message.assistant("", ToolCall(name="f", arguments={"x": [1, None]}, id="c1"), reasoning="hm"),
    Message.assistant("x", ToolCall(name="f", arguments={}, error="not JSON", raw="{")),
    Message.tool("42", call=ToolCall(name="f", arguments={}, id="c1")),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: one.role)
def test_messages_cross_whole(message: Message) -> None:
    assert payload.read_message(wire.load(wire.dump(payload.message(message)))) == message


def test_images_cross_in_messages_and_tasks() -> None:
    image = pytest.importorskip("PIL.Image")
    block = images.put(image.new("RGB", (4, 3), "red"))
    message = Message.user((TextBlock(text="look"), block))
    crossed = wire.load(wire.dump(payload.message(message)))
    assert crossed["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert payload.read_message(crossed) == message
    row = {"picture": images.as_json(image.new("L", (2, 2))), "deep": [{"n": 1}]}
    sent = wire.load(wire.dump(payload.task(row)))
    assert sent["picture"]["file"]
    assert payload.read_task(sent) == row


def test_an_image_arrives_where_it_was_not_known(tmp_path: Path) -> None:
    """In a process of its own, as on another machine."""
    import subprocess
    import sys

    image = pytest.importorskip("PIL.Image")
    block = images.put(image.new("RGB", (5, 3), "blue"))
    file = tmp_path / "message.json"
    row = {"p": images.as_json(image.new("RGB", (1, 9)))}
    file.write_bytes(wire.dump({"m": payload.message(Message.user((block,))), "t": payload.task(row)}))
    script = (
        "import sys, json; from turnwise import images; from turnwise.openenv import payload\n"
        f"data = json.load(open({str(file)!r})); (block,) = payload.read_message(data['m']).content\n"
        "row = payload.read_task(data['t'])\n"
        "print(block.sha256, images.load(block.sha256).size, images.revived(row)['p'].size)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{block.sha256} (5, 3) (1, 9)"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "robot", "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}]},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": 3},
    ],
)
def test_what_is_no_message_is_refused(message: Any) -> None:
    with pytest.raises(ActionError):
        payload.read_message(message)
