"""The dialect of Llama 3: a call is a whole reply, and an object may also be an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.llama3 import Llama3Dialect
from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.types import Message, ToolCall

DIALECT = Llama3Dialect()
FRAGMENTS = (
    "<|python_tag|>", '{"name": "run", "parameters": ', '{"name": "run"', "{", "}", "[", '"', ";", "\\",
    "<|eot_id|>", "Infinity", "[1, 2]",
)  # fmt: skip
GOOD = '{"name": "run", "parameters": {"text": "left"}}'
MADE = ToolCall(name="run", arguments={"text": "left"}, id="call_0")


def parse(text: str) -> Message:
    return DIALECT.parse(text, tools=[TOOL])


def llama(name: str) -> TemplateRenderer:
    specials = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    return load_renderer(tiny_tokenizer(trl_template(name), specials=specials, bos="<|begin_of_text|>"))


LLAMA = llama("llama3_1")


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = llama(name)
    assert renderer.dialect.name == "llama3" and renderer.tools_problem is None


@pytest.mark.parametrize("text", [GOOD, f"\n{GOOD}\n", f"<|python_tag|>{GOOD}", GOOD.replace(" ", "")])
def test_a_call_is_the_whole_reply(text: str) -> None:
    assert parse(text) == Message.assistant("", MADE)


def test_the_tag_may_follow_text() -> None:
    assert parse(f"I will look.\n<|python_tag|>{GOOD}") == Message.assistant("I will look.", MADE)


@pytest.mark.parametrize("between", ["; ", ";", "\n", "", " "])
@pytest.mark.parametrize("tag", ["", "<|python_tag|>"])
def test_several_calls_follow_each_other(between: str, tag: str) -> None:
    message = parse(tag + GOOD + between + GOOD)
    assert [(made.id, made.error) for made in message.tool_calls] == [("call_0", None), ("call_1", None)]
    assert message.content == ""


@pytest.mark.parametrize(
    "text",
    [
        "  42\n",
        f"I would say {GOOD}",
        f"First:\n{GOOD}",
        f"```json\n{GOOD}\n```",
        f"[{GOOD}]",
        '{"name": "run"}',
        '{"name": "Ada", "arguments": {}}',
        '{"name": "Ada", "age": 36',
        '{"name": 3, "parameters": {}}',
        '{"answer": {"name": "run", "parameters": {}}}',
        "{left",
        "",
    ],
)
def test_what_is_no_call_is_text_to_the_letter(text: str) -> None:
    assert parse(text) == Message.assistant(text)


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        (GOOD[:-1], "run", "the call is not valid JSON: Expecting ',' delimiter"),
        (GOOD[:-10], "run", "the call is not valid JSON: "),
        ('{"name": "run', "", "the call is not valid JSON: Unterminated string"),
        ('{"name": "ru', "", "the call is not valid JSON: Unterminated string"),
        ('{"name": "unknown", "parameters": {', "unknown", "the call is not valid JSON: "),
        ('{"type": "function", "name": "run", "parameters": {', "run", "the call is not valid JSON: "),
        ('{"name": "run", "parameters": [1]}', "run", '"parameters" must be an object, not a list'),
        ('{"name": "run", "arguments": {}}', "run", 'must stand under "parameters", not under "arguments"'),
        ('{"name": "", "parameters": {}}', "", 'the call has no "name"'),
        ('{"type": "function", "function": "run", "parameters": {}}', "", 'the call has no "name"'),
        ('{"type": "function", "function": {"name": "run", "parameters": {}}}', "run", 'has no "name"'),
        ('{"name": "run", "parameters": {"size": NaN}}', "run", "NaN is not a JSON value"),
        ('{"name": "run", "parameters": {"text": "\\ud800"}}', "run", "it holds an unpaired surrogate"),
        ('{"name": "run", "parameters": {"items": ' + "[" * 65 + "]" * 65 + "}}", "run", "nested too deeply"),
        ('{"name": "run", "parameters": ' + "[" * 100_000, "run", "nested too deeply"),
        (f"{GOOD}\nI hope this helps.", "run", "there is text after the calls"),
        (f"{GOOD}; {GOOD[:-1]}", "run", "the call is not valid JSON: "),
        ("<|python_tag|>", "", "the call is not valid JSON: Expecting value"),
        ('<|python_tag|>brave_search.call(query="x")', "", "the call is not valid JSON: Expecting value"),
        ("<|python_tag|>[1]", "", "the call must be an object"),
        (f"<|python_tag|>{GOOD} left", "run", "there is text after the calls"),
    ],
)
def test_malformed_calls_say_what_is_wrong(text: str, name: str, error: str) -> None:
    message = parse(text)
    (bad,) = message.tool_calls
    assert bad.name == name and bad.raw == text and bad.id == "call_0" and dict(bad.arguments) == {}
    assert bad.error is not None and error in bad.error
    assert message.content == ""


def test_a_call_that_was_cut_is_malformed_from_its_name_on() -> None:
    for length in range(len('{"name": "r'), len(GOOD)):
        (bad,) = parse(GOOD[:length]).tool_calls
        assert bad.error is not None and bad.raw == GOOD[:length].rstrip()


@settings(max_examples=100, deadline=None)
@given(calls(FRAGMENTS, most=1))
def test_what_is_rendered_is_read_back(made: tuple[ToolCall, ...]) -> None:
    message = Message.assistant("", *made)
    assert LLAMA.parse(LLAMA.reply(message, [TOOL]), [TOOL]) == message


@pytest.mark.parametrize("content", ["42", '{"name": "Ada"}', f"I would say {GOOD}", "{", '["run"]'])
def test_answers_that_look_like_calls_are_read_back(content: str) -> None:
    message = Message.assistant(content)
    assert LLAMA.parse(LLAMA.reply(message, [TOOL]), [TOOL]) == message


@settings(max_examples=200, deadline=None)
@given(any_text([*FRAGMENTS, GOOD]), st.booleans())
def test_any_text_is_read_as_something(text: str, thinking: bool) -> None:
    check_sound(DIALECT, text, thinking=thinking)


@given(calls(FRAGMENTS))
def test_format_is_read_back(made: tuple[ToolCall, ...]) -> None:
    assert parse("\n".join(map(DIALECT.format, made))).tool_calls == made


def test_objects_of_any_kind_are_answers_or_calls_and_never_lost() -> None:
    values: list[Any] = [{}, {"parameters": {}}, {"name": None}, {"name": "run", "x": 1}]
    for value in values:
        assert parse(json.dumps(value)) == Message.assistant(json.dumps(value))
