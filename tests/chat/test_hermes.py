"""Tool calls out of text: what is well-formed, what is malformed and why, and that nothing raises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.chat.dialects.hermes import HermesDialect
from turnwise.chat.thinking import split_thinking, without_thinking
from turnwise.types import Message, ToolCall

parse = HermesDialect().parse


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


GOOD = '{"name": "move", "arguments": {"direction": "left"}}'


def test_a_call_with_text_before_it() -> None:
    assert parse("I will look.\n" + call(GOOD)) == Message.assistant(
        "I will look.", ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
    )


def test_several_calls_are_numbered_in_order() -> None:
    second = '{"name": "look", "arguments": {}}'
    message = parse(call(GOOD) + "\n" + call(second))
    assert message.content == ""
    assert [(c.id, c.name, dict(c.arguments), c.error) for c in message.tool_calls] == [
        ("call_0", "move", {"direction": "left"}, None),
        ("call_1", "look", {}, None),
    ]


def test_no_call_is_text_to_the_letter() -> None:
    assert parse("  42\n") == Message.assistant("  42\n")


def test_text_between_and_after_calls_joins_the_content() -> None:
    message = parse("one\n" + call(GOOD) + "\ntwo\n" + call(GOOD) + "\n three ")
    assert message.content == "one\ntwo\nthree"
    assert len(message.tool_calls) == 2


def test_tight_json_and_missing_arguments_are_fine() -> None:
    message = parse('<tool_call>{"name":"look"}</tool_call>')
    assert message.tool_calls == (ToolCall(name="look", arguments={}, id="call_0"),)


def test_a_closing_tag_inside_an_argument_is_part_of_it() -> None:
    body = json.dumps({"name": "say", "arguments": {"text": "</tool_call> and <tool_call>"}})
    message = parse(call(body))
    assert message.tool_calls[0].arguments == {"text": "</tool_call> and <tool_call>"}
    assert message.content == ""


def test_raw_line_breaks_in_strings_are_read() -> None:
    message = parse('<tool_call>{"name": "run", "arguments": {"code": "a\nb"}}</tool_call>')
    assert message.tool_calls[0].arguments == {"code": "a\nb"}


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ('{"name": "move", "arguments": {', "move", "the call is not valid JSON: "),
        ("left", "", "the call is not valid JSON: Expecting value"),
        ('{"arguments": {}}', "", 'the call has no "name"'),
        ('{"name": "", "arguments": {}}', "", 'the call has no "name"'),
        ('{"name": 3, "arguments": {}}', "", 'the call has no "name"'),
        ('{"name": "move", "arguments": "left"}', "move", '"arguments" must be an object, not a string'),
        ('{"name": "move", "arguments": [1]}', "move", '"arguments" must be an object, not a list'),
        ('{"name": "move", "arguments": null}', "move", '"arguments" must be an object, not null'),
        (
            '{"name": "move", "parameters": {}}',
            "move",
            'must stand under "arguments", not under "parameters"',
        ),
        ('["move"]', "", "the call must be an object"),
        (GOOD + " go", "move", "there is text between the call and </tool_call>"),
        ('{"name": "move", "arguments": {"x": NaN}}', "move", "NaN is not a JSON value"),
        ('{"name": "move", "arguments": {"x": 1e999}}', "move", "1e999 is out of range"),
        ('{"name": "move", "arguments": {"x": "\\ud800"}}', "move", "unpaired surrogate"),
        ("[" * 100_000, "", "nested too deeply"),
        ('{"name": "move", "arguments": {"x": ' + "9" * 5000 + "}}", "move", "Exceeds the limit"),
    ],
)
def test_malformed_calls_say_what_is_wrong(body: str, name: str, error: str) -> None:
    message = parse("Well.\n" + call(body) + "\n" + call(GOOD))
    bad, good = message.tool_calls
    assert bad.name == name
    assert bad.error is not None and error in bad.error
    assert bad.raw == call(body)
    assert bad.id == "call_0"
    assert dict(bad.arguments) == {}
    assert good == ToolCall(name="move", arguments={"direction": "left"}, id="call_1")
    assert message.content == "Well."


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>\n" + GOOD, "</tool_call> is missing"),
        ("<tool_call>\n" + GOOD[:-5], "the call is not valid JSON"),
        ("<tool_call>", "the call is not valid JSON"),
        ("<tool_call>\n" + GOOD + " and so on", "</tool_call> is missing"),
    ],
)
def test_an_unclosed_call_is_malformed(text: str, error: str) -> None:
    (bad,) = parse(text).tool_calls
    assert bad.error is not None and bad.error.startswith(error)
    assert bad.error.endswith("</tool_call> is missing")
    assert bad.raw == text


def test_an_unclosed_call_does_not_swallow_the_next() -> None:
    bad, good = parse("<tool_call>\n" + GOOD + "\n" + call(GOOD)).tool_calls
    assert bad.error == "</tool_call> is missing" and bad.raw == "<tool_call>\n" + GOOD
    assert good.error is None


def test_thinking_is_kept_apart_and_calls_in_it_are_not_made() -> None:
    text = f"<think>\nShould I {call(GOOD)}?\n</think>\n\nYes.\n{call(GOOD)}"
    message = parse(text)
    assert message.reasoning == f"Should I {call(GOOD)}?"
    assert message.content == "Yes."
    assert len(message.tool_calls) == 1
    assert parse(text.removeprefix("<think>\n"), thinking=True) == message, "the prompt has opened it"


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\na\n</think>\n\nb", False, ("a", "b")),
        ("\n<think>a</think>b", False, ("a", "b")),
        ("<think>\n\n</think>\n\nb", False, (None, "b")),
        ("<think>\nnever clo", False, ("never clo", "")),
        ("a\n</think>\n\nb", True, ("a", "b")),
        ("still at it", True, ("still at it", "")),
        ("<think>\na\n</think>b", True, ("a", "b")),
        ("a</think>b", False, (None, "a</think>b")),
        ("b <think>a</think>", False, (None, "b <think>a</think>")),
    ],
)
def test_split_thinking(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_thinking(text, opened=opened) == expected


def test_without_thinking() -> None:
    assert without_thinking("a<think>\nx\n</think>\n\nb<think></think>c<think>d") == "abc<think>d"


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        GOOD,
        '{"name": "',
        '"}',
        "\n",
        "{",
        "}",
        "é",
        "\ud800",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join), st.booleans())
def test_parse_never_raises_and_numbers_its_calls(text: str, thinking: bool) -> None:
    message = parse(text, thinking=thinking)
    assert message.role == "assistant"
    assert [c.id for c in message.tool_calls] == [f"call_{i}" for i in range(len(message.tool_calls))]
    for made in message.tool_calls:
        assert (made.error is None) == (made.raw == "")


@pytest.mark.parametrize("levels", [65, 700])
def test_a_call_that_is_nested_too_deeply_is_malformed(levels: int) -> None:
    """Whoever stores a call recurses into it: a thousand brackets must not end the run."""
    text = '<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>'
    (made,) = parse(text % ("[" * levels + "]" * levels)).tool_calls
    assert made.name == "f" and made.arguments == {}
    assert made.error == "it is nested too deeply: 64 levels are allowed"
    (good,) = parse(text % ("[" * 63 + "]" * 63)).tool_calls
    assert good.error is None
