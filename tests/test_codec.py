"""A trajectory comes back from its line equal, whatever a model or an author can put into it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.trajectories import trajectory
from turnwise.codec import decode, decode_id, encode
from turnwise.errors import StoreError
from turnwise.types import (
    Failure,
    Finish,
    ImageBlock,
    Message,
    Reward,
    Sampling,
    Segment,
    Step,
    StopReason,
    TextBlock,
    ToolCall,
    ToolResult,
    ToolSchema,
    Trajectory,
    Turn,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=8) | st.text(alphabet=st.characters(), max_size=4)
"""Lone surrogates included: a model can write "\\ud800" into a call's arguments."""
leaf = st.none() | st.booleans() | st.integers() | finite | text
json_value = st.recursive(
    leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=5
)
json_object = st.dictionaries(text, json_value, max_size=3)


def made(cls: type, **fields: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(cls, **fields)


def some(item: st.SearchStrategy, most: int = 2) -> st.SearchStrategy:
    return st.lists(item, max_size=most).map(tuple)


def row(item: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | st.lists(item, max_size=4)


block = made(TextBlock, text=text) | made(ImageBlock, sha256=text)
content = text | some(block)
call = made(ToolCall, name=text, arguments=json_object, id=text, error=st.none() | text, raw=text)
message = made(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=content,
    reasoning=st.none() | text,
    tool_calls=some(call),
    tool_call_id=st.none() | text,
    name=st.none() | text,
)
step = st.builds(
    Step,
    content | st.lists(message, min_size=1, max_size=2),
    reward=st.none() | finite,
    terminated=st.booleans(),
    truncated=st.booleans(),
    info=json_object,
)
result = made(
    ToolResult,
    call=call,
    content=content,
    error=st.sampled_from(
        [None, "malformed", "unknown_tool", "bad_arguments", "raised", "timeout", "bad_result"]
    ),
    step=st.none() | step,
    coerced=st.integers(0, 9),
    seconds=finite,
)
turn = made(
    Turn,
    message=message,
    context_ids=row(st.integers(0, 2**31)),
    ids=row(st.integers(0, 2**31)),
    logprobs=row(st.floats(-1e30, 0)),
    versions=row(st.integers(0, 99)),
    kept_mass=row(st.floats(0, 1)),
    finish=st.sampled_from(Finish),
    tool_results=some(result),
    feedback=some(message),
    reward=st.none() | finite,
    state_key=st.none() | text,
    policy_seconds=st.floats(0, 1e9),
    env_seconds=st.floats(0, 1e9),
)
segment = made(Segment, prompt=some(message), turns=some(turn), images=some(text))
trajectories = made(
    Trajectory,
    id=text,
    group_id=text,
    env=text,
    task=json_object,
    seed=st.integers(0, 2**31),
    tools=some(made(ToolSchema, name=text, description=text, parameters=json_object)),
    segments=some(segment),
    rewards=st.dictionaries(text, made(Reward, value=st.none() | finite, weight=finite), max_size=2),
    stop_reason=st.sampled_from(StopReason),
    error=st.none() | made(Failure, kind=text, message=text, where=text, traceback=text),
    sampling=st.none() | made(Sampling, seed=st.none() | st.integers(), stop_ids=some(st.integers(0, 9))),
    policy=text,
    harness=text,
    metrics=st.dictionaries(text, finite, max_size=2),
    started=finite,
    seconds=finite,
)


@settings(max_examples=150, deadline=None)
@given(trajectories)
def test_round_trip(original: Trajectory) -> None:
    line = encode(original)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    restored = decode(line)
    assert restored == original
    assert encode(restored) == line
    assert decode_id(line) == original.id


def test_types_come_back() -> None:
    restored = decode(encode(trajectory(moves=("left",))))
    turn = restored.turns[0]
    assert restored.stop_reason is StopReason.TERMINATED and turn.finish is Finish.STOP
    assert type(restored.segments) is tuple and type(turn.tool_results) is tuple and type(turn.ids) is list
    assert turn.tool_results[0].step == Step("The ball is down.", reward=1.0, terminated=True)
    assert restored.sampling is not None and restored.sampling.stop_ids == (2,)


def test_floats_keep_every_bit() -> None:
    original = trajectory(reward=0.1 + 0.2)
    assert decode(encode(original)).reward == 0.30000000000000004
    rewarded = dataclasses.replace(original, rewards={"env": Reward(value=np.float32(0.1))})
    assert decode(encode(rewarded)).reward == float(np.float32(0.1)) != 0.1


@pytest.mark.parametrize(
    "arguments",
    [{"answer": 2**64}, {"answer": -(10**30)}, {"word": "\ud800"}, {"deep": None}, {"\udfff": [1, 2**70]}],
)
def test_what_a_model_can_write_but_orjson_cannot(arguments: dict[str, object]) -> None:
    if "deep" in arguments:
        for _ in range(400):
            arguments = {"deep": arguments}
    call = ToolCall(name="answer", arguments=arguments)
    original = dataclasses.replace(
        trajectory(), segments=(Segment(prompt=(), turns=(Turn(message=Message.assistant("", call)),)),)
    )
    assert decode(encode(original)) == original


def test_nan_in_free_json_is_null() -> None:
    assert decode(encode(trajectory(task={"x": math.nan, "y": (1, 2)}))).task == {"x": None, "y": [1, 2]}
    assert decode(encode(trajectory(task={"x": math.inf, "big": 2**80}))).task == {"x": None, "big": 2**80}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_training_needs_must_be_finite(bad: float) -> None:
    with pytest.raises(StoreError, match=r"trajectory rl/0/catch/0/s0: rewards.env.value is"):
        encode(trajectory(reward=bad))
    original = trajectory()
    turns = (dataclasses.replace(original.turns[0], logprobs=[-1.0, bad, -2.0]),)
    with pytest.raises(StoreError, match="turn 0: logprobs"):
        encode(dataclasses.replace(original, segments=(Segment(prompt=(), turns=turns),)))


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(StoreError, match=r"rl/0/catch/0/s0 holds what is not JSON.*set"):
        encode(trajectory(task={"x": {1, 2}}))


def edited(**changes: object) -> bytes:
    return orjson.dumps(orjson.loads(encode(trajectory())) | changes)


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(StoreError, match="schema 2 was written by a newer Turnwise; this one reads up to 1"):
        decode(edited(schema=2))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (edited(colour="red"), "Trajectory: unknown field 'colour'; known are id, group_id"),
        (edited(stop_reason="bored"), "StopReason: expected one of terminated, .*; found 'bored'"),
        (edited(seed="one"), "expected int, found 'one'"),
        (edited(seed=True), "expected int, found True"),
        (edited(schema=None), r'must name its schema \("schema": 1\), found None'),
        (b'{"schema":1,"id":"a"}', "Trajectory: field '.*' is missing"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"schema":1,', "not JSON"),
    ],
)
def test_what_encode_does_not_write_is_refused(line: bytes, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        decode(line)


def test_ids_are_read_from_lines_of_other_writers() -> None:
    record = orjson.loads(encode(trajectory(id="a")))
    assert decode_id(json.dumps({"env": "x", **record}).encode()) == "a"
    with pytest.raises(StoreError, match="id must be text, found 3"):
        decode_id(b'{"schema": 1, "id": 3}')


def test_a_field_added_later_may_be_missing() -> None:
    record = orjson.loads(encode(trajectory()))
    del record["harness"], record["metrics"]
    restored = decode(orjson.dumps(record))
    assert restored.harness == "" and restored.metrics == {}
