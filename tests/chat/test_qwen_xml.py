"""The XML of Qwen3-Coder, Qwen3.5 and Nemotron 3: bare text that may hold tags, its types, and faults."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound, plain_text
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.qwen_xml import QwenXmlDialect
from turnwise.chat.renderer import load_renderer
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall

DIALECT = QwenXmlDialect()
THINKS = load_renderer(tiny_tokenizer(trl_template("qwen3_5_think")))
NEMOTRON = load_renderer(tiny_tokenizer(trl_template("nemotron_3_nano")))

FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<function=run>", "</function>", "<parameter=text>", "<parameter=x>",
    "</parameter>", "<think>", "</think>", "</parameter>\n</function>", "\n</parameter>\n", "True", "{", '"',
)  # fmt: skip


def parse(text: str) -> Message:
    return DIALECT.parse(text, tools=[TOOL])


def call(*parameters: tuple[str, str], name: str = "run") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def only(message: Message) -> dict[str, Any]:
    (made,) = message.tool_calls
    assert made.error is None, made.error
    return dict(made.arguments)


_OPENS_TEXT = re.compile(r"(^|'|\\n)<parameter=text>")

GOOD = call(("text", "left"))


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5_think", "qwen3_5_nothink", "qwen3_5_think_training", "qwen3_6", "qwen3_8", "nemotron_3_nano",
        "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning",
    ],
)  # fmt: skip
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = load_renderer(tiny_tokenizer(trl_template(name)))
    assert renderer.dialect.name == "qwen_xml" and renderer.tools_problem is None
    assert renderer.reports[True].bridges and renderer.reports[True].parallel_calls


def test_a_call_with_text_before_it() -> None:
    for gap in ("\n", "\n\n"):
        assert parse("I will look." + gap + call(("text", "left"), ("count", "2"))) == Message.assistant(
            "I will look.", ToolCall(name="run", arguments={"text": "left", "count": 2}, id="call_0")
        )


def test_no_call_is_text_to_the_letter() -> None:
    assert parse("  42\n") == Message.assistant("  42\n")


def test_one_line_break_at_each_end_belongs_to_the_form() -> None:
    assert only(parse(call(("text", "\n left \n\n"))))["text"] == "\n left \n\n"
    tight = "<tool_call><function=run><parameter=text>left</parameter></function></tool_call>"
    assert only(parse(tight)) == {"text": "left"}
    assert only(parse(tight.replace("left", "\n"))) == {"text": ""}


def test_types_come_from_the_schema() -> None:
    written = call(
        ("text", "7"),
        ("count", "7"),
        ("fast", "True"),
        ("items", "[1, null]"),
        ("limit", "None"),
        ("new", "7"),
    )
    assert only(parse(written)) == {
        "text": "7", "count": 7, "fast": True, "items": [1, None], "limit": None, "new": 7,
    }  # fmt: skip
    assert only(DIALECT.parse(call(("text", "7")))) == {"text": 7}


@pytest.mark.parametrize(
    "value",
    [
        "</parameter>", "a </parameter> b", "</function>", "</tool_call>", "<tool_call>", "<parameter=x>",
        "</parameter><parameter=x>", "</parameter>\n</function>", "x<parameter=more>",
        "if a:\n    </parameter>\n</function>\nelse", "</parameter>\n</function>\n</tool_call>",
        GOOD, call(("text", "left"), ("more", "right")), GOOD + "\n" + GOOD, call(("text", GOOD)),
        "<parameter=x>\n1\n</parameter>\n<parameter=y>\n2\n</parameter>",
    ],
)  # fmt: skip
def test_a_value_may_hold_any_tag(value: str) -> None:
    for said in ([("text", value)], [("text", value), ("more", "x")], [("more", "x"), ("text", value)]):
        assert only(parse(call(*said))) == dict(said)
        both = parse(call(*said) + "\n" + GOOD)
        assert [dict(made.arguments) for made in both.tool_calls] == [dict(said), {"text": "left"}]
        assert both.content == ""


def test_what_is_ambiguous_is_not_demonstrated() -> None:
    value = "1\n</parameter>\n<parameter=more>\n2"
    assert only(parse(call(("text", value)))) == {"text": "1", "more": "2"}
    message = Message.assistant("", ToolCall(name="run", arguments={"text": value}, id="call_0"))
    with pytest.raises(TemplateError, match="would be read back differently"):
        THINKS.reply(message, [TOOL])


def test_an_argument_that_models_invent_is_read_as_one() -> None:
    assert only(parse(call(("text", "left"), ("speed", "3")))) == {"text": "left", "speed": 3}


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ("", "", "expected <function=NAME>, found '</tool_call>"),
        ('{"name": "run", "arguments": {}}', "", 'expected <function=NAME>, found \'{"name": "run"'),
        ("<function=>\n</function>", "", "expected <function=NAME>"),
        ("<function=run>\nleft\n</function>", "run", "expected <parameter=NAME> or </function>, found 'left"),
        ("<function=run>\n<parameter=text>\nleft\n</function>", "run", "'text' is not closed: </parameter>"),
        (
            "<function=run>\n<parameter=text>\na\n<parameter=more>\nb\n</parameter>\n</function>",
            "run",
            "'text' is not closed: </parameter> is missing",
        ),
        (
            "<function=run>\n<parameter=text>\nleft\n</parameter>",
            "run",
            "or </function>, found '</tool_call>",
        ),
        ("<function=run>\n</function>\nnow", "run", "there is text between the call and </tool_call>"),
        (
            "<function=run>\n<parameter=text>\na\n</parameter>\n<parameter=text>\nb\n</parameter>\n</function>",
            "run",
            "the argument 'text' is given twice",
        ),
        (
            f"<function=run>\n<parameter=items>\n{'[' * 70}{']' * 70}\n</parameter>\n</function>",
            "run",
            "it is nested too deeply: 64 levels are allowed",
        ),
        (
            f"<function=run>\n<parameter=items>\n{'[' * 100_000}\n</parameter>\n</function>",
            "run",
            "the argument 'items' cannot be read: it is nested too deeply",
        ),
        (
            '<function=run>\n<parameter=items>\n["\\ud800"]\n</parameter>\n</function>',
            "run",
            "it holds an unpaired surrogate",
        ),
        (
            "<function=run>\n<parameter=text>\n\ud800\n</parameter>\n</function>",
            "run",
            "it holds an unpaired surrogate",
        ),
    ],
)
def test_malformed_calls_say_what_is_wrong(body: str, name: str, error: str) -> None:
    raw = f"<tool_call>\n{body}\n</tool_call>"
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


def test_a_call_without_its_opening_tag_is_no_answer() -> None:
    bare = GOOD.removeprefix("<tool_call>\n")
    message = parse("I will look.\n\n" + bare)
    (bad,) = message.tool_calls
    assert message.content == "I will look." and bad.name == "run"
    assert bad.error == "<tool_call> is missing" and bad.raw == bare
    good, bad = parse(GOOD + "\n" + bare).tool_calls
    assert good.error is None and bad.error == "<tool_call> is missing"


def test_thinking_is_kept_apart_and_calls_in_it_are_not_made() -> None:
    said = f"Should I {GOOD}?\n</think>\n\nYes.\n\n{GOOD}"
    message = DIALECT.parse(said, thinking=True, tools=[TOOL])
    assert message.reasoning == f"Should I {GOOD}?" and message.content == "Yes."
    assert len(message.tool_calls) == 1


@pytest.mark.parametrize("renderer", [THINKS, NEMOTRON], ids=["qwen3_5", "nemotron_3"])
def test_a_reply_is_read_by_the_types_of_the_tools_it_was_told_of(renderer: Any) -> None:
    ids = renderer.template.encoder.encode("Hm.\n</think>\n\n" + call(("text", "7")))
    assert only(renderer.parse(ids, [TOOL])) == {"text": "7"}
    assert only(renderer.parse(ids)) == {"text": 7}


def forgets_to_close(made: tuple[ToolCall, ...]) -> bool:
    """Whether a line of a value begins an argument that is not given, as where a closing tag is missing."""
    return any("text" not in one.arguments and _OPENS_TEXT.search(str(one.arguments)) for one in made)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([THINKS, NEMOTRON]),
    plain_text | st.sampled_from(["", "I call run, with <function=run>.", "</tool_call>"]),
    plain_text.map(str.strip) | st.sampled_from(["<tool_call>", GOOD]),
    calls(FRAGMENTS) | st.just(()),
)
def test_what_is_rendered_is_read_back(
    renderer: Any, content: str, reasoning: str, made: tuple[ToolCall, ...]
) -> None:
    assume(not forgets_to_close(made))  # Refused: it would be read back as that.
    message = Message.assistant(content.strip(), *made, reasoning=f"Hm. {reasoning}.")
    assert renderer.parse(renderer.reply(message, [TOOL]), [TOOL]) == message


@settings(max_examples=200, deadline=None)
@given(any_text([*FRAGMENTS, GOOD]), st.booleans())
def test_any_text_is_read_as_something(text: str, thinking: bool) -> None:
    check_sound(DIALECT, text, thinking=thinking)


@given(calls(FRAGMENTS))
def test_format_is_read_back(made: tuple[ToolCall, ...]) -> None:
    assume(not forgets_to_close(made))
    assert parse("\n".join(map(DIALECT.format, made))).tool_calls == made


@pytest.mark.parametrize(
    "loop",
    ["<tool_call><function=run><parameter=text>", GOOD.replace("left", "<parameter=x>"), "</parameter>\n"],
)
def test_a_policy_that_loops_is_read_in_reasonable_time(loop: str) -> None:
    started = time.thread_time()
    check_sound(DIALECT, "<tool_call>\n<function=run>\n<parameter=text>\n" + loop * 4000)
    # A second or two. Where each value is searched to the reply's end it is twenty.
    assert time.thread_time() - started < 15


def test_a_call_without_its_tag_ends_where_another_call_begins() -> None:
    call = DIALECT.format(ToolCall(name="run", arguments={"text": "left"}))
    message = DIALECT.parse(f"<function=run>{call}</tool_call>", tools=[TOOL])
    good, bare = message.tool_calls
    assert (good.error, bare.error, bare.raw) == (None, "<tool_call> is missing", "<function=run>")
    assert message.content == "\n</tool_call>"
