"""The Mistral dialects: lists of calls, and the token before each call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound, plain_text
from tests.support.tokenizers import tiny_tokenizer

from turnwise.chat.dialects.mistral import MISTRAL, MISTRAL_ARGS, MistralDialect
from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.types import Message, ToolCall

FRAGMENTS = (
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "run", "[", "]", "{", "}", '"', "\\",
    '[{"name": "run", "arguments": ', "NaN",
)  # fmt: skip
LIST = '[TOOL_CALLS][{"name": "run", "arguments": {"text": "left"}}]'
NAMED = '[TOOL_CALLS]run[ARGS]{"text": "left"}'
MADE = ToolCall(name="run", arguments={"text": "left"}, id="call_0")

both = pytest.mark.parametrize(("dialect", "good"), [(MISTRAL, LIST), (MISTRAL_ARGS, NAMED)])

# What Mistral's templates have in common, with the tools and one way or the other to write calls.
TEMPLATE = """
{{- bos_token }}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {%- if message.reasoning_content %}
            {{- '[THINK]' + message.reasoning_content + '[/THINK]' }}
        {%- endif %}
        {{- message.content }}
        {%- if message.tool_calls %}CALLS{% endif %}
        {{- eos_token }}
    {%- else %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""
AS_LIST = """
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
        {{- (call.function | tojson)[:-1] + ', "id": "' + call.id[-9:] + '"}' }}
        {%- if not loop.last %}, {% endif %}
    {%- endfor %}
    {{- ']' }}
"""
AS_NAMED = """
    {%- for call in message.tool_calls %}
        {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}
"""


def renderer(written: str) -> TemplateRenderer:
    names = [
        "TOOL_CALLS",
        "ARGS",
        "CALL_ID",
        "THINK",
        "/THINK",
        "INST",
        "/INST",
        "TOOL_RESULTS",
        "/TOOL_RESULTS",
    ]
    template = TEMPLATE.replace("CALLS{%", f"{written}{{%")
    return load_renderer(tiny_tokenizer(template, specials=[f"[{name}]" for name in names], bos="<s>"))


RENDERERS = {"mistral": renderer(AS_LIST), "mistral_args": renderer(AS_NAMED)}


@pytest.mark.parametrize("name", ["mistral", "mistral_args"])
def test_templates_are_known_by_what_they_write(name: str) -> None:
    found = RENDERERS[name]
    assert found.dialect.name == name and found.tools_problem is None
    assert found.reports[True].bridges and found.reports[True].parallel_calls


@both
def test_a_call_with_text_before_it(dialect: MistralDialect, good: str) -> None:
    assert dialect.parse(f"I will look.{good}") == Message.assistant("I will look.", MADE)
    assert dialect.parse(f" {good}\n") == Message.assistant("", MADE)


@both
def test_no_call_is_text_to_the_letter(dialect: MistralDialect, good: str) -> None:
    for text in ("  42\n", good.removeprefix("[TOOL_CALLS]")):
        assert dialect.parse(text) == Message.assistant(text)


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "run", "arguments": {"text": "left"}, "id": "a1b2c3d4e"}]',
        '[TOOL_CALLS]{"name": "run", "arguments": {"text": "left"}}',
    ],
)
def test_lists_with_ids_and_single_objects(text: str) -> None:
    assert MISTRAL.parse(text) == Message.assistant("", MADE)


def test_ids_before_arguments() -> None:
    assert MISTRAL_ARGS.parse('[TOOL_CALLS]run[CALL_ID]a1b2c3d4e[ARGS]{"text": "left"}').tool_calls == (MADE,)


def test_several_calls() -> None:
    listed = MISTRAL.parse('[TOOL_CALLS][{"name": "run"}, {"name": "stop", "arguments": {}}]')
    named = MISTRAL_ARGS.parse("[TOOL_CALLS]run[ARGS]{}[TOOL_CALLS]stop[ARGS]{}")
    assert listed == named
    assert [(made.id, made.name) for made in named.tool_calls] == [("call_0", "run"), ("call_1", "stop")]


@both
def test_arguments_may_hold_the_token(dialect: MistralDialect, good: str) -> None:
    message = dialect.parse(good.replace("left", "[TOOL_CALLS]x[ARGS]{}") + good)
    assert [made.arguments["text"] for made in message.tool_calls] == ["[TOOL_CALLS]x[ARGS]{}", "left"]


@pytest.mark.parametrize(
    ("dialect", "said", "name", "error"),
    [
        (MISTRAL, "", "", "the call is not valid JSON: Expecting value"),
        (MISTRAL, "[]", "", "the list of calls is empty"),
        (MISTRAL, '[{"name": "run", "arguments": {', "run", "the call is not valid JSON: "),
        (MISTRAL, '[{"name": "run", "arguments": {}}', "run", "the call is not valid JSON: "),
        (MISTRAL, '[{"name": "run"}, {"arguments": {}}]', "run", 'call 2 of 2: the call has no "name"'),
        (MISTRAL, '[{"name": "run", "arguments": "{}"}]', "run", '"arguments" must be an object'),
        (MISTRAL, '[{"name": "run", "arguments": {"x": Infinity}}]', "run", "Infinity is not a JSON value"),
        (MISTRAL, '[{"name": "run"}]]', "run", "expected the end of the call, found ']"),
        (MISTRAL, "run[ARGS]{}", "", "the call is not valid JSON: Expecting value"),
        (MISTRAL_ARGS, "", "", "expected NAME[ARGS] and an object, found the end"),
        (MISTRAL_ARGS, '[{"name": "run"}]', "", "expected NAME[ARGS] and an object, found '[{"),
        (MISTRAL_ARGS, "run{}", "run", "expected NAME[ARGS] and an object, found 'run{}"),
        (MISTRAL_ARGS, "run[ARGS]", "run", "the call is not valid JSON: Expecting value"),
        (MISTRAL_ARGS, 'run[ARGS]{"text": "le', "run", "the call is not valid JSON: "),
        (MISTRAL_ARGS, "run[ARGS][1]", "run", '"arguments" must be an object, not a list'),
        (MISTRAL_ARGS, "run[ARGS]{}}", "run", "expected the end of the call, found '}"),
        (MISTRAL_ARGS, 'run[ARGS]{"text": "\\ud800"}', "run", "it holds an unpaired surrogate"),
        (MISTRAL_ARGS, 'run[ARGS]{"items": ' + "[" * 65 + "]" * 65 + "}", "run", "it is nested too deeply"),
        (MISTRAL_ARGS, "run[ARGS]" + "[" * 100_000, "run", "it is nested too deeply"),
    ],
)
def test_malformed_calls_say_what_is_wrong(dialect: MistralDialect, said: str, name: str, error: str) -> None:
    raw, good = f"[TOOL_CALLS]{said}", LIST if dialect is MISTRAL else NAMED
    for text, number in ((raw, 1), (raw + good, 2)):
        bad, *others = dialect.parse(f"Well.{text}").tool_calls
        if not said and others:
            error = error.replace("found the end", "found '[TOOL_CALLS]")
        assert bad.name == name and bad.raw == raw and bad.id == "call_0" and dict(bad.arguments) == {}
        assert bad.error is not None and error in bad.error
        assert len(others) == number - 1 and all(made.error is None for made in others)


@both
def test_thinking_between_tokens(dialect: MistralDialect, good: str) -> None:
    message = dialect.parse(f"[THINK]Should I {good}?[/THINK]Yes.{good}")
    assert message.reasoning == f"Should I {good}?" and message.content == "Yes."
    assert message.tool_calls == (MADE,)
    assert dialect.parse("[THINK]never clo") == Message.assistant("", reasoning="never clo")
    assert dialect.parse("<think>\nHm.\n</think>\n\nYes.") == Message.assistant("Yes.", reasoning="Hm.")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(RENDERERS)),
    plain_text,
    plain_text | st.sampled_from(["[TOOL_CALLS]", NAMED]),
    calls(FRAGMENTS) | st.just(()),
)
def test_what_is_rendered_is_read_back(
    name: str, content: str, reasoning: str, made: tuple[ToolCall, ...]
) -> None:
    chat = RENDERERS[name]
    rendered: Any = [
        ToolCall(name=call.name, arguments=call.arguments, id=f"00000000{index}")
        for index, call in enumerate(made)
    ]
    ids = chat.reply(Message.assistant(content.strip(), *rendered, reasoning=f"Hm. {reasoning}."), [TOOL])
    assert chat.parse(ids, [TOOL]) == Message.assistant(content.strip(), *made, reasoning=f"Hm. {reasoning}.")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([MISTRAL, MISTRAL_ARGS]), any_text([*FRAGMENTS, LIST, NAMED]), st.booleans())
def test_any_text_is_read_as_something(dialect: MistralDialect, text: str, thinking: bool) -> None:
    check_sound(dialect, text, thinking=thinking)


@given(st.sampled_from([MISTRAL, MISTRAL_ARGS]), calls(FRAGMENTS))
def test_format_is_read_back(dialect: MistralDialect, made: tuple[ToolCall, ...]) -> None:
    assert dialect.parse("\n".join(map(dialect.format, made))).tool_calls == made
