"""Arguments against schemas: exact messages, and the property that only what fits passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.validate import ArgumentsError, call_form, check_arguments, unchecked_keywords
from turnwise.types import ToolSchema

MOVE = ToolSchema(
    name="move",
    description="Move.",
    parameters={
        "type": "object",
        "properties": {
            "direction": {"type": "string", "enum": ["left", "right"]},
            "steps": {"type": "integer", "default": 1},
            "tag": {"type": "string", "nullable": True},
            "path": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["direction"],
    },
)


def problem(arguments: Any, schema: ToolSchema = MOVE) -> str:
    with pytest.raises(ArgumentsError) as caught:
        check_arguments(arguments, schema)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "up"}, 'move: direction: expected one of "left", "right"; found "up".'),
        ({"direction": 1}, 'move: direction: expected one of "left", "right"; found 1 (an integer).'),
        ({}, 'move: direction is missing; expected one of "left", "right".'),
        ({"direction": "left", "step": 2}, "move: step is no parameter; did you mean steps?"),
        ({"direction": "left", "steps": "2"}, 'move: steps: expected an integer; found "2" (a string).'),
        ({"direction": "left", "steps": 3.0}, "move: steps: expected an integer; found 3.0 (a number)."),
        ({"direction": "left", "steps": True}, "move: steps: expected an integer; found true."),
        ({"direction": "left", "steps": None}, "move: steps: expected an integer; found null."),
        ({"direction": "left", "tag": True}, "move: tag: expected a string or null; found true."),
        (
            {"direction": "left", "path": [1, "x"]},
            'move: path[1]: expected a number; found "x" (a string).',
        ),
        (
            {"direction": "left", "path": [math.nan]},
            "move: path[0]: expected a number; found NaN (a number).",
        ),
    ],
)
def test_message(arguments, message):
    assert problem(arguments) == message


def test_all_problems_are_told_at_once_with_the_form():
    told = problem({"steps": "2", "z": 1})
    assert told == (
        'move: steps: expected an integer; found "2" (a string); '
        "z is no parameter; allowed: direction, steps, tag, path; "
        'direction is missing; expected one of "left", "right". '
        f"The form is {call_form(MOVE)}."
    )


def test_arguments_that_are_no_object():
    assert problem([1]).startswith("move: arguments: expected an object with ")


def test_a_long_value_is_quoted_in_part():
    assert len(problem({"direction": "x" * 10_000})) < 200


def test_a_number_for_text_is_its_text_and_is_counted():
    checked = check_arguments({"direction": "left", "tag": 42}, MOVE)
    assert (checked.arguments, checked.coerced) == ({"direction": "left", "tag": "42"}, 1)
    assert check_arguments({"direction": "left", "tag": "42"}, MOVE).coerced == 0


def test_a_union_takes_what_fits_before_it_takes_text():
    schema = ToolSchema(
        name="f", description="", parameters={"properties": {"a": {"type": ["integer", "string"]}}}
    )
    assert check_arguments({"a": 1}, schema).arguments == {"a": 1}
    checked = check_arguments({"a": 1.5}, schema)
    assert (checked.arguments, checked.coerced) == ({"a": "1.5"}, 1)
    assert problem({"a": True}, schema) == "f: a: expected an integer or a string; found true."


def test_a_tool_without_parameters_takes_none():
    schema = ToolSchema(name="look", description="", parameters={"type": "object", "properties": {}})
    assert check_arguments({}, schema).arguments == {}
    assert problem({"a": 1}, schema) == "look: a is no parameter; it takes none."


def test_references_and_bounds():
    schema = ToolSchema(
        name="f",
        description="",
        parameters={
            "properties": {
                "p": {"$ref": "#/$defs/P"},
                "n": {"type": "integer", "minimum": 1, "maximum": 3},
                "s": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4},
                "l": {"type": "array", "minItems": 1},
                "o": {"allOf": [{"type": "integer"}, {"minimum": 2, "type": "integer"}]},
            },
            "$defs": {"P": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        },
    )
    assert check_arguments({"p": {"x": 1}, "n": 3, "s": "ab", "l": [1], "o": 2}, schema).coerced == 0
    assert problem({"p": {"x": "a"}}, schema) == 'f: p.x: expected an integer; found "a" (a string).'
    assert problem({"p": {"x": 1, "y": 2}}, schema) == "f: p.y is no known key; allowed: x."
    assert (
        problem({"n": 4}, schema) == "f: n: expected an integer at least 1 at most 3; found 4 (an integer)."
    )
    assert problem({"s": "A"}, schema) == 'f: s: expected text matching ^[a-z]+$; found "A" (a string).'
    assert problem({"s": "abcde"}, schema) == "f: s: expected at most 4 characters; found 5."
    assert problem({"l": []}, schema) == "f: l: expected at least 1 items; found 0."
    assert problem({"o": 1}, schema) == "f: o: expected an integer at least 2; found 1 (an integer)."


def test_form():
    assert call_form(MOVE) == (
        'move(direction: one of "left", "right"; steps: an integer, optional; '
        "tag: a string or null, optional; path: a list, each a number, optional)"
    )


def test_unchecked_keywords_are_found_at_any_depth():
    assert unchecked_keywords({"properties": {"a": {"items": {"not": {}}}}, "anyOf": [{"if": {}}]}) == {
        "not",
        "if",
    }


# ---------------------------------------------------------------------------------------------------
# Schemas drawn at random, each with values that fit and values that do not.

Drawn = tuple[dict[str, Any], st.SearchStrategy[Any], st.SearchStrategy[Any]]
text = st.text(max_size=5)
whole = st.integers(-9, 9)
real = st.floats(-9, 9, allow_nan=False)

LEAVES: list[Drawn] = [
    # A number is taken for text, so only what is neither is wrong.
    ({"type": "string"}, text, st.one_of(st.booleans(), st.none(), st.lists(text, max_size=2))),
    ({"type": "integer"}, whole, st.one_of(st.booleans(), real, text, st.none())),
    ({"type": "number"}, st.one_of(whole, real), st.one_of(st.booleans(), text, st.just(math.inf))),
    ({"type": "boolean"}, st.booleans(), st.one_of(whole, text, st.none())),
    (
        {"type": "string", "enum": ["a", "b"]},
        st.sampled_from(["a", "b"]),
        st.sampled_from(["c", 1, None, True]),
    ),
    ({"type": "integer", "enum": [0, 1]}, st.sampled_from([0, 1]), st.sampled_from([2, True, 1.0, "1"])),
    ({"type": "integer", "nullable": True}, st.one_of(whole, st.none()), st.one_of(text, st.booleans())),
]


def in_list(drawn: Drawn) -> Drawn:
    schema, right, wrong = drawn
    mixed = st.tuples(st.lists(right, max_size=2), wrong).map(lambda pair: [*pair[0], pair[1]])
    return {"type": "array", "items": schema}, st.lists(right, max_size=3), mixed


def in_object(drawn: Drawn) -> Drawn:
    schema, right, wrong = drawn
    whole_schema = {"type": "object", "properties": {"k": schema}, "required": ["k"]}
    broken = st.one_of(
        wrong.map(lambda value: {"k": value}), right.map(lambda value: {"k": value, "z": 0}), st.just({})
    )
    return whole_schema, right.map(lambda value: {"k": value}), broken


drawn_schemas = st.recursive(
    st.sampled_from(LEAVES), lambda inner: st.one_of(inner.map(in_list), inner.map(in_object)), max_leaves=3
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.dictionaries(st.sampled_from(["a", "b", "c"]), drawn_schemas, min_size=1))
def test_what_fits_passes_unchanged_and_what_does_not_never_passes(data, parts):
    schema = ToolSchema(
        name="f",
        description="",
        parameters={
            "type": "object",
            "properties": {name: part[0] for name, part in parts.items()},
            "required": list(parts),
        },
    )
    right = {name: data.draw(part[1], label=name) for name, part in parts.items()}
    checked = check_arguments(right, schema)
    assert checked.arguments == right
    assert checked.coerced == 0
    victim = data.draw(st.sampled_from(sorted(parts)), label="victim")
    wrong = data.draw(parts[victim][2], label="wrong")
    missing = {name: value for name, value in right.items() if name != victim}
    for mutated in ({**right, victim: wrong}, missing, {**right, "extra": 1}):
        with pytest.raises(ArgumentsError):
            check_arguments(mutated, schema)


def test_integers_that_no_float_can_hold_are_checked_like_others():
    tool = ToolSchema(
        name="f",
        description="F.",
        parameters={
            "type": "object",
            "properties": {
                "n": {"type": "integer", "maximum": 9},
                "free": {"type": "integer"},
                "half": {"type": "number", "multipleOf": 0.5},
            },
        },
    )
    huge = 10**400
    assert check_arguments({"free": huge}, tool).arguments == {"free": huge}
    with pytest.raises(ArgumentsError, match="n: expected an integer at most 9; found 1000"):
        check_arguments({"n": huge}, tool)
    with pytest.raises(ArgumentsError, match=r"half: expected a multiple of 0\.5"):
        check_arguments({"half": huge}, tool)


def test_what_is_checked_shares_nothing_with_what_was_said():
    tool = ToolSchema(
        name="f",
        description="F.",
        parameters={
            "type": "object",
            "properties": {"any": {}, "dict": {"type": "object"}, "union": {"anyOf": [{"type": "array"}]}},
        },
    )
    said = {"any": [[1]], "dict": {"list": [1]}, "union": [1]}
    checked = check_arguments(said, tool).arguments
    assert checked == said
    checked["any"][0].append(2)
    checked["dict"]["list"].append(2)
    checked["union"].append(2)
    assert said == {"any": [[1]], "dict": {"list": [1]}, "union": [1]}
