"""Bare text to typed values, by the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.calls import json_values, plain_text

from turnwise.chat.dialects.arguments import accepts, known_arguments, read_argument, write_argument

STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (STRING, "7", "7"),
        (STRING, "null", "null"),
        (STRING, " left\n", " left\n"),
        (STRING, '"left"', '"left"'),
        (STRING, "", ""),
        (INTEGER, "7", 7),
        (INTEGER, " 7\n", 7),
        (INTEGER, "-0", 0),
        ({"type": "number"}, "7", 7),
        ({"type": "number"}, "1e+22", 1e22),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        (NULL, "None", None),
        ({"type": "array"}, "[1, [2]]", [1, [2]]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": ["integer", "string"]}, "7", 7),
        ({"type": ["integer", "string"]}, "seven", "seven"),
        ({"anyOf": [STRING, NULL]}, "null", None),
        ({"anyOf": [STRING, NULL]}, "7", "7"),
        ({"oneOf": [INTEGER, NULL]}, "None", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": 3}, "3", 3),
        ({"allOf": [STRING, {"maxLength": 3}]}, "7", "7"),
        ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/Side"}, "7", "7"),
        ({"$ref": "#/$defs/Nowhere"}, "7", 7),
        # Nothing is known: a value where it reads as one, but text between quotes stays as it was written.
        ({}, "7", 7),
        ({}, "left", "left"),
        ({}, '"left"', '"left"'),
        ({}, "{'a': 1}", "{'a': 1}"),
        # What Python writes for lists and objects, where no string is meant.
        ({"type": "array"}, "['a', None, True]", ["a", None, True]),
        ({"type": "object"}, "{'a': {'b': 1.5}}", {"a": {"b": 1.5}}),
    ],
)  # fmt: skip
def test_the_schema_says_what_a_text_means(schema: dict[str, Any], text: str, value: Any) -> None:
    parameters = {"properties": {"x": schema}, "$defs": {"Side": STRING}}
    read = read_argument(text, "x", parameters)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (INTEGER, "seven", "seven"),
        (INTEGER, "3.0", 3.0),
        (INTEGER, "NaN", "NaN"),
        (INTEGER, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "1", 1),
        ({"type": "boolean"}, "TRUE", "TRUE"),
        ({"type": "array"}, "[1, NaN]", "[1, NaN]"),
        ({"type": "array"}, "[1e999,]", "[1e999,]"),
        ({"type": "array"}, "[(1, 2)]", "[(1, 2)]"),
        ({"type": "array"}, "[f()]", "[f()]"),
        ({"type": "object"}, "{1: 2}", "{1: 2}"),
        ({"type": "object"}, "{1, 2}", "{1, 2}"),
        ({"type": "object"}, "[1]", [1]),
        ({"type": "array"}, "[1] [2]", "[1] [2]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_never_made_to(schema: dict[str, Any], text: str, value: Any) -> None:
    read = read_argument(text, "x", {"properties": {"x": schema}})
    assert read == value and type(read) is type(value)


def test_arguments_that_the_schema_does_not_name() -> None:
    assert read_argument("7", "y", {"properties": {"x": STRING}}) == 7
    assert read_argument("7", "y", {"additionalProperties": STRING}) == "7"
    assert read_argument("7", "y", {"additionalProperties": False}) == 7
    assert read_argument("7", "y", {}) == 7
    assert known_arguments({"properties": {"x": STRING}}) == {"x"}
    assert known_arguments({}) == frozenset()


def test_nesting_past_what_python_reads_is_not_taken_for_text() -> None:
    with pytest.raises(RecursionError):
        read_argument("[" * 100_000, "x", {"properties": {"x": {"type": "array"}}})


def test_a_schema_that_refers_to_itself_ends() -> None:
    with pytest.raises(RecursionError):
        accepts(1, {"$ref": "#/properties/x"}, {"properties": {"x": {"$ref": "#/properties/x"}}})


@given(json_values(plain_text).filter(lambda value: not isinstance(value, str)))
def test_values_that_are_no_strings_are_read_back(value: Any) -> None:
    text = write_argument(value)
    typed = {"properties": {"x": {"type": ["null", "boolean", "number", "array", "object"]}}}
    assert read_argument(text, "x", {}) == read_argument(text, "x", typed) == value


@given(st.text())
def test_strings_are_read_back_whatever_they_hold(text: str) -> None:
    assert read_argument(write_argument(text), "x", {"properties": {"x": STRING}}) == text
