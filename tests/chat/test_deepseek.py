"""The DeepSeek dialects: V3's fenced JSON, V3.1's bare JSON, V3.2's tags."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound, plain_text
from tests.support.tokenizers import tiny_tokenizer

from turnwise.chat.dialects.deepseek import DEEPSEEK_DSML, DEEPSEEK_V3, DEEPSEEK_V31, SectionDialect
from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.types import Message, ToolCall

V3_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>run\n```json\n{"text": "left"}\n```<｜tool▁call▁end｜>'
V31_CALL = '<｜tool▁call▁begin｜>run<｜tool▁sep｜>{"text": "left"}<｜tool▁call▁end｜>'
DSML_CALL = (
    '<｜DSML｜invoke name="run">\n<｜DSML｜parameter name="text" string="true">left</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)
SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DSML_SECTION = ("\n\n<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>")
MADE = ToolCall(name="run", arguments={"text": "left"}, id="call_0")
FRAGMENTS = (
    *SECTION, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "function", "```json", "```",
    "{", '"', "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "</｜DSML｜invoke>",
    '<｜DSML｜invoke name="run">', '<｜DSML｜parameter name="x" string="true">', "</｜DSML｜parameter>",
    "<think>", "</think>",
)  # fmt: skip
DIALECTS = {
    "deepseek_v3": (DEEPSEEK_V3, V3_CALL, SECTION),
    "deepseek_v31": (DEEPSEEK_V31, V31_CALL, SECTION),
    "deepseek_dsml": (DEEPSEEK_DSML, DSML_CALL, DSML_SECTION),
}
each = pytest.mark.parametrize(("dialect", "call", "section"), DIALECTS.values(), ids=DIALECTS)

# What DeepSeek's templates have in common, with the tools and each of the ways to write calls.
TEMPLATE = """
{{- bos_token }}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<｜Assistant｜></think>{% endif %}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- if message.tool_calls %}CALLS{% endif %}
        {{- eos_token }}
    {%- else %}
        {{- '<｜User｜>' + message.content + '<｜Assistant｜></think>' }}
    {%- endif %}
{%- endfor %}
"""
WAYS = {
    "deepseek_v3": """
        {{- '<｜tool▁calls▁begin｜>' }}
        {%- for call in message.tool_calls %}
            {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}
            {{- call.function.arguments | tojson + '\n```<｜tool▁call▁end｜>' + ('' if loop.last else '\n') }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' }}
    """,
    "deepseek_v31": """
        {{- '<｜tool▁calls▁begin｜>' }}
        {%- for call in message.tool_calls %}
            {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}
            {{- call.function.arguments | tojson + '<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' }}
    """,
    "deepseek_dsml": r"""
        {{- '\n\n<｜DSML｜function_calls>\n' }}
        {%- for call in message.tool_calls %}
            {{- '<｜DSML｜invoke name="' + call.function.name + '">\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<｜DSML｜parameter name="' + key + '" string="' }}
                {{- 'true">' if value is string else 'false">' }}
                {{- (value if value is string else value | tojson) + '</｜DSML｜parameter>\n' }}
            {%- endfor %}
            {{- '</｜DSML｜invoke>\n' }}
        {%- endfor %}
        {{- '</｜DSML｜function_calls>' }}
    """,
}


def renderer(written: str) -> TemplateRenderer:
    specials = [
        "<｜User｜>", "<｜Assistant｜>", *SECTION, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "｜DSML｜",
    ]  # fmt: skip
    return load_renderer(
        tiny_tokenizer(TEMPLATE.replace("CALLS{%", f"{written}{{%"), specials=specials, bos="<s>")
    )


RENDERERS = {name: renderer(written) for name, written in WAYS.items()}


@pytest.mark.parametrize("name", DIALECTS)
def test_templates_are_known_by_what_they_write(name: str) -> None:
    found = RENDERERS[name]
    assert found.dialect.name == name and found.tools_problem is None
    assert found.reports[True].parallel_calls


@each
def test_calls_with_text_before_them(dialect: SectionDialect, call: str, section: tuple[str, str]) -> None:
    opening, closing = section
    text = f"I will look.{opening}{call}{closing}"
    assert dialect.parse(text, tools=[TOOL]) == Message.assistant("I will look.", MADE)
    two = dialect.parse(f"{opening}{call}\n{call}{closing}", tools=[TOOL])
    assert [(made.id, made.error) for made in two.tool_calls] == [("call_0", None), ("call_1", None)]
    assert two.content == ""


@each
def test_no_call_is_text_to_the_letter(dialect: SectionDialect, call: str, section: tuple[str, str]) -> None:
    assert dialect.parse("  42\n") == Message.assistant("  42\n")


@each
def test_a_call_is_made_though_its_section_was_cut(
    dialect: SectionDialect, call: str, section: tuple[str, str]
) -> None:
    good = section[0] + call
    bad = good + call[: len(call) // 2]
    assert dialect.parse(good).tool_calls == (MADE,)
    first, second = dialect.parse(bad).tool_calls
    assert first == MADE and second.error is not None and second.raw == call[: len(call) // 2].rstrip()


@each
def test_a_section_without_calls_is_a_malformed_call(
    dialect: SectionDialect, call: str, section: tuple[str, str]
) -> None:
    raw = section[0].strip() + "\nrun"
    message = dialect.parse("Well." + raw)
    (bad,) = message.tool_calls
    assert bad.error is not None and "is missing after" in bad.error and bad.raw == raw
    assert message.content == "Well."


@each
def test_a_call_that_was_cut_is_malformed_wherever_it_was_cut(
    dialect: SectionDialect, call: str, section: tuple[str, str]
) -> None:
    for length in range(len("<｜tool▁call▁begin｜>"), len(call)):
        (bad,) = dialect.parse(section[0] + call[:length]).tool_calls
        assert (
            bad.error is not None and bad.error.endswith("is missing") and bad.raw == call[:length].rstrip()
        )


@each
@pytest.mark.parametrize(
    "value",
    [
        "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "```", "</｜DSML｜parameter>",
        "</｜DSML｜invoke>", "</｜DSML｜parameter>\n</｜DSML｜invoke>", "</｜DSML｜function_calls>",
        '<｜DSML｜invoke name="run">', V3_CALL, V31_CALL, DSML_CALL,
    ],
)  # fmt: skip
def test_arguments_may_hold_any_tag(
    dialect: SectionDialect, call: str, section: tuple[str, str], value: str
) -> None:
    made = [
        ToolCall(name="run", arguments={"text": value, "more": "x"}, id="call_0"),
        ToolCall(name="run", arguments={"text": "left"}, id="call_1"),
    ]
    written = section[0] + "\n".join(map(dialect.format, made)) + section[1]
    assert list(dialect.parse(written, tools=[TOOL]).tool_calls) == made


V3, V31 = "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>"
DSML = '<｜DSML｜invoke name="run">\n{}\n</｜DSML｜invoke>'


@pytest.mark.parametrize(
    ("dialect", "raw", "name", "error"),
    [
        (DEEPSEEK_V3, V3.format("run"), "", "expected function<｜tool▁sep｜>NAME and ```json, found 'run"),
        (DEEPSEEK_V3, V31_CALL, "", "expected function<｜tool▁sep｜>NAME and ```json"),
        (DEEPSEEK_V3, V3_CALL.replace("\n```<", "<"), "run", "expected ``` after the arguments"),
        (DEEPSEEK_V3, V3_CALL.replace("}", ""), "run", "the call is not valid JSON: "),
        (DEEPSEEK_V3, V3_CALL.replace('{"text": "left"}', "[]"), "run", '"arguments" must be an object'),
        (DEEPSEEK_V31, V31.format(""), "", "expected NAME<｜tool▁sep｜>, found '<｜tool▁call▁end｜>"),
        (DEEPSEEK_V31, V3_CALL, "function", "the call is not valid JSON: Expecting value"),
        (DEEPSEEK_V31, V31_CALL.replace('"left"', "NaN"), "run", "NaN is not a JSON value"),
        (DEEPSEEK_V31, V31_CALL.replace("left", "\\ud800"), "run", "it holds an unpaired surrogate"),
        (DEEPSEEK_V31, V31_CALL.replace("}<", "} left<"), "run", "there is text between the call and"),
        (DEEPSEEK_V31, V31.format("run<｜tool▁sep｜>" + "[" * 100_000), "run", "it is nested too deeply"),
        (DEEPSEEK_DSML, DSML.format("left"), "run", 'expected <｜DSML｜parameter name="NAME"'),
        (DEEPSEEK_DSML, "<｜DSML｜invoke>\n</｜DSML｜invoke>", "", 'expected name="NAME">'),
        (DEEPSEEK_DSML, DSML_CALL.replace("</｜DSML｜parameter>", ""), "run", "'text' is not closed"),
        (DEEPSEEK_DSML, DSML_CALL.replace("true", "maybe"), "run", 'string="true|false"> or'),
        (DEEPSEEK_DSML, DSML_CALL.replace("true", "false"), "run", "the argument 'text' cannot be read: "),
        (
            DEEPSEEK_DSML,
            DSML_CALL.replace("true", "false").replace("left", "1 2"),
            "run",
            "there is text after the value: '2'",
        ),
    ],
)
def test_malformed_calls_say_what_is_wrong(dialect: SectionDialect, raw: str, name: str, error: str) -> None:
    _, call, (opening, closing) = DIALECTS[dialect.name]
    message = dialect.parse(f"Well.{opening}{raw}\n{call}{closing}", tools=[TOOL])
    bad, good = message.tool_calls
    assert bad.name == name and bad.raw == raw and bad.id == "call_0" and dict(bad.arguments) == {}
    assert bad.error is not None and error in bad.error
    assert good == ToolCall(name="run", arguments={"text": "left"}, id="call_1")
    assert message.content == "Well."


def test_dsml_says_itself_what_is_a_string() -> None:
    said = DSML_CALL.replace("left", "7")
    assert DEEPSEEK_DSML.parse(said, tools=[TOOL]).tool_calls[0].arguments == {"text": "7"}
    assert DEEPSEEK_DSML.parse(said.replace("true", "false")).tool_calls[0].arguments == {"text": 7}


@each
def test_thinking_is_kept_apart_and_calls_in_it_are_not_made(
    dialect: SectionDialect, call: str, section: tuple[str, str]
) -> None:
    said = section[0] + call + section[1]
    message = dialect.parse(f"Should I {said}?</think>Yes.{said}", thinking=True, tools=[TOOL])
    assert message.reasoning == f"Should I {said}?" and message.content == "Yes."
    assert message.tool_calls == (MADE,)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(RENDERERS)), plain_text, calls(FRAGMENTS) | st.just(()))
def test_what_is_rendered_is_read_back(name: str, content: str, made: tuple[ToolCall, ...]) -> None:
    chat = RENDERERS[name]
    message = Message.assistant(content.strip(), *made)
    assert chat.parse(chat.reply(message, [TOOL]), [TOOL]) == message


names: Any = st.sampled_from(sorted(DIALECTS))


@settings(max_examples=200, deadline=None)
@given(names, any_text([*FRAGMENTS, V3_CALL, V31_CALL, DSML_CALL]), st.booleans())
def test_any_text_is_read_as_something(name: str, text: str, thinking: bool) -> None:
    check_sound(DIALECTS[name][0], text, thinking=thinking)


@given(names, calls(FRAGMENTS))
def test_format_is_read_back(name: str, made: tuple[ToolCall, ...]) -> None:
    dialect = DIALECTS[name][0]
    assert dialect.parse("\n".join(map(dialect.format, made)), tools=[TOOL]).tool_calls == made
