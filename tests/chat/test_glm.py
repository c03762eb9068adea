"""The GLM dialect: keys and values between tags, with and without line breaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound, plain_text
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.glm import GlmDialect
from turnwise.chat.renderer import load_renderer
from turnwise.types import Message, ToolCall

DIALECT = GlmDialect()
TOKENIZER = tiny_tokenizer(trl_template("glm4moe"))
FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool_call>run", "<arg_key>", "<arg_key>x</arg_key>", "<arg_value>",
    "</arg_value>", "<think>", "</think>", "</arg_value>\n<arg_key>", "{", '"',
)  # fmt: skip


def parse(text: str) -> Message:
    return DIALECT.parse(text, tools=[TOOL])


def call(*pairs: tuple[str, str], gap: str = "\n") -> str:
    inner = "".join(
        f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}" for key, value in pairs
    )
    return f"<tool_call>run{gap}{inner}</tool_call>"


def only(message: Message) -> dict[str, Any]:
    (made,) = message.tool_calls
    assert made.error is None, made.error
    return dict(made.arguments)


GOOD = call(("text", "left"))


def test_the_published_template_is_known_by_what_it_writes() -> None:
    specials = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    renderer = load_renderer(tiny_tokenizer(trl_template("glm4moe"), specials=specials))
    assert renderer.dialect.name == "glm" and renderer.tools_problem is None


@pytest.mark.parametrize("gap", ["\n", ""])
def test_a_call_with_thinking_and_text_before_it(gap: str) -> None:
    text = "\n<think>Hm.</think>\nI will look.\n" + call(("text", "7"), ("count", "7"), gap=gap)
    assert parse(text) == Message.assistant(
        "I will look.",
        ToolCall(name="run", arguments={"text": "7", "count": 7}, id="call_0"),
        reasoning="Hm.",
    )
    assert only(parse(f"<tool_call>run{gap}</tool_call>")) == {}


def test_no_call_is_text_to_the_letter() -> None:
    assert parse("  42\n") == Message.assistant("  42\n")


@pytest.mark.parametrize(
    "value",
    [
        "", " left\n", "</arg_value>", "a </arg_value> b", "</tool_call>", "<tool_call>",
        "<arg_key>x</arg_key>", "<arg_key>x</arg_key>\n<arg_value>", "</arg_value></tool_call>",
        GOOD, GOOD + "\n" + GOOD,
        call(("text", "left"), ("more", "right")), call(("text", GOOD)), "<tool_call>run</tool_call>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gap", ["\n", ""])
def test_a_value_may_hold_any_tag(value: str, gap: str) -> None:
    for said in ([("text", value)], [("text", value), ("more", "x")], [("more", "x"), ("text", value)]):
        assert only(parse(call(*said, gap=gap))) == dict(said)
        both = parse(call(*said, gap=gap) + gap + GOOD)
        assert [dict(made.arguments) for made in both.tool_calls] == [dict(said), {"text": "left"}]
        assert both.content == ""


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ("", "", "expected the tool's name, found '</tool_call>"),
        ('\n{"name": "run", "arguments": {}}\n', "", "expected the tool's name, found '{\"name\""),
        ('run\n{"text": "left"}\n', "run", "expected <arg_key>NAME</arg_key><arg_value> or </tool_call>"),
        ("run\n<arg_key>text</arg_key>\n", "run", "expected <arg_key>NAME</arg_key><arg_value>"),
        ("run\n<arg_key>text</arg_key>\n<arg_value>left\n", "run", "'text' is not closed: </arg_value>"),
        (
            "run\n<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>text</arg_key><arg_value>b</arg_value>",
            "run",
            "the argument 'text' is given twice",
        ),
        (
            "run\n<arg_key>text</arg_key><arg_value>a<arg_key>more</arg_key><arg_value>b</arg_value>",
            "run",
            "'text' is not closed",
        ),
        (
            f"run\n<arg_key>items</arg_key>\n<arg_value>{'[' * 70}{']' * 70}</arg_value>\n",
            "run",
            "it is nested too deeply: 64 levels are allowed",
        ),
        ("run\n<arg_key>text</arg_key>\n<arg_value>\ud800</arg_value>\n", "run", "unpaired surrogate"),
    ],
)
def test_malformed_calls_say_what_is_wrong(body: str, name: str, error: str) -> None:
    raw = f"<tool_call>{body}</tool_call>"
    message = parse("Well.\n" + raw + "\n" + GOOD)
    bad, good = message.tool_calls
    assert bad.name == name and bad.raw == raw and bad.id == "call_0" and dict(bad.arguments) == {}
    assert bad.error is not None and error in bad.error
    assert good == ToolCall(name="run", arguments={"text": "left"}, id="call_1")
    assert message.content == "Well."


def test_a_reply_that_was_cut_is_malformed_wherever_it_was_cut() -> None:
    for length in range(len("<tool_call>"), len(GOOD)):
        (bad,) = parse(GOOD[:length]).tool_calls
        assert bad.error is not None and "</tool_call> is missing" in bad.error
        assert bad.raw == GOOD[:length].rstrip()


def test_an_unclosed_call_does_not_swallow_the_next() -> None:
    unclosed = GOOD.removesuffix("\n</tool_call>")
    bad, good = parse(unclosed + "\n" + GOOD).tool_calls
    assert bad.error == "</tool_call> is missing" and bad.raw == unclosed
    assert good.error is None


@settings(max_examples=100, deadline=None)
@given(plain_text, plain_text, calls(FRAGMENTS))
def test_what_the_template_writes_is_read_back(
    content: str, reasoning: str, made: tuple[ToolCall, ...]
) -> None:
    """The published template closes no reply, so its rendering is read here without a renderer."""
    content, reasoning = content.strip(), f"Hm. {reasoning}."
    rows: list[dict[str, Any]] = [
        {"function": {"name": c.name, "arguments": dict(c.arguments)}} for c in made
    ]
    asked = [{"role": "user", "content": "Hello."}]
    said = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": rows}
    prompt = TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = TOKENIZER.apply_chat_template([*asked, said], tokenize=False)
    assert whole.startswith(prompt)
    assert parse(whole.removeprefix(prompt)) == Message.assistant(content, *made, reasoning=reasoning)


@settings(max_examples=200, deadline=None)
@given(any_text([*FRAGMENTS, GOOD]), st.booleans())
def test_any_text_is_read_as_something(text: str, thinking: bool) -> None:
    check_sound(DIALECT, text, thinking=thinking)


@given(calls(FRAGMENTS))
def test_format_is_read_back(made: tuple[ToolCall, ...]) -> None:
    assert parse("\n".join(map(DIALECT.format, made))).tool_calls == made
