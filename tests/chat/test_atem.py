"""Calls as ``<invoke name=…>`` with bare text: Muse's messages and MiniMax's blocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.calls import TOOL, any_text, calls, check_sound
from tests.support.replies import same, written
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.atem import AtemDialect
from turnwise.chat.dialects.base import Dialect
from turnwise.chat.dialects.invoke import MiniMaxDialect
from turnwise.chat.renderer import load_renderer
from turnwise.types import Message, ToolCall

ATEM, MINIMAX = AtemDialect(), MiniMaxDialect()
BOTH = pytest.mark.parametrize("dialect", [ATEM, MINIMAX], ids=lambda dialect: dialect.name)
NEXT = "<|start|>assistant"
RUN = ToolCall(name="run", arguments={"text": "left", "count": 3}, id="call_0")
OTHER = ToolCall(name="look", arguments={}, id="call_1")
MUSE = ("muse_glimmer", "muse_glimmer_training")

MINIMAX_TEMPLATE = r"""
{%- for message in messages %}
    {{- ']~b]' + ('ai' if message.role == 'assistant' else message.role) + '\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- if message.tool_calls %}
        {{- '\n<minimax:tool_call>\n' }}
        {%- for call in message.tool_calls %}
            {{- '<invoke name="' + call.function.name + '">\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<parameter name="' + key + '">' + (value if value is string else value | tojson) }}
                {{- '</parameter>\n' }}
            {%- endfor %}
            {{- '</invoke>\n' }}
        {%- endfor %}
        {{- '</minimax:tool_call>' }}
    {%- endif %}
    {{- '[e~[\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ ']~b]ai\n' }}{% endif %}
"""


def atem(body: str, to: str = "run") -> str:
    return f" to={to}<|message|><atem:function_calls>\n{body}\n</atem:function_calls>"


def minimax(body: str) -> str:
    return f"<minimax:tool_call>\n{body}\n</minimax:tool_call>"


def as_atem(text: str) -> str:
    """The same with the prefix of Muse's tags."""
    for tag in ("invoke", "parameter"):
        text = text.replace(f"<{tag}", f"<atem:{tag}").replace(f"</{tag}", f"</atem:{tag}")
    return text


def only(message: Message) -> dict[str, Any]:
    (made,) = message.tool_calls
    assert made.error is None, made.error
    return dict(made.arguments)


def test_muses_messages_are_thinking_calls_and_answer() -> None:
    text = (
        f" to=self<|message|>Look first.\n<|eom|>{NEXT} to=user<|message|>I will.<|eom|>{NEXT}"
        + atem('<atem:invoke name="run">\n<atem:parameter name="text">left</atem:parameter>\n'
               '<atem:parameter name="count">3</atem:parameter>\n</atem:invoke>')
        + f"<|eom|>{NEXT}" + atem('<atem:invoke name="look">\n</atem:invoke>', "look")
    )  # fmt: skip
    for end in ("", "<|eot|>"):
        found = ATEM.parse(text + end, tools=[TOOL])
        assert found == Message.assistant("I will.", RUN, OTHER, reasoning="Look first.")


def test_minimaxs_block_holds_several_calls() -> None:
    body = '<invoke name="run">\n<parameter name="text">left</parameter>\n'
    body += '<parameter name="count">3</parameter>\n</invoke>\n<invoke name="look"></invoke>'
    found = MINIMAX.parse(f"Look first.\n</think>\n\nI will.\n{minimax(body)}", thinking=True, tools=[TOOL])
    assert found == Message.assistant("I will.", RUN, OTHER, reasoning="Look first.")


@pytest.mark.parametrize(
    "text", ["", "Hello.\n", " to=", "Set x to=5, please", NEXT, "<|message|> is a token"]
)
def test_what_is_no_message_is_content_to_the_letter(text: str) -> None:
    assert ATEM.parse(text).content in (text, text.removeprefix("<|message|>"))
    assert MINIMAX.parse(text) == Message.assistant(text)


@BOTH
def test_white_space_is_the_values_and_types_are_the_schemas(dialect: Dialect) -> None:
    arguments = {"text": " 7\n", "more": "null", "count": 7, "fast": True, "limit": None, "items": [1, "x"]}
    text = dialect.format(ToolCall(name="run", arguments=arguments))
    assert only(dialect.parse(text, tools=[TOOL])) == arguments
    assert only(dialect.parse(text))["more"] is None


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        "</parameter>", "a </parameter> b", "</invoke>", '<parameter name="x">', "</minimax:tool_call>",
        "</function_calls>", "<|eom|>", "<|eot|> <|start|>assistant", '<invoke name="run"></invoke>',
    ],
)  # fmt: skip
def test_a_value_may_hold_tags(dialect: Dialect, value: str) -> None:
    if dialect is ATEM:
        value = as_atem(value).replace("</function_calls>", "</atem:function_calls>")
    arguments = {"text": value, "more": "x" + value}
    text = dialect.format(ToolCall(name="run", arguments=arguments))
    assert only(dialect.parse(text, tools=[TOOL])) == arguments


@BOTH
@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ("", "", 'expected <invoke name="…">, found'),
        ('{"name": "run"}', "", 'expected <invoke name="…">, found \'{"name": "run"}'),
        ("<invoke name=run></invoke>", "", 'expected <invoke name="…">'),
        ('<invoke name=""></invoke>', "", 'expected <invoke name="…">'),
        ('<invoke name="run">left</invoke>', "run", "found 'left"),
        (
            '<invoke name="run"><parameter name="text">left</invoke>',
            "run",
            "'text' is not closed: </parameter>",
        ),
        ('<invoke name="run"><parameter name="text">left', "run", "'text' is not closed: </parameter>"),
        ('<invoke name="run"><parameter name="text">left</parameter>', "run", "</invoke>, found "),
        (
            '<invoke name="run"><parameter name="more">a</parameter>'
            '<parameter name="more">b</parameter></invoke>',
            "run",
            "the argument 'more' is given twice",
        ),
        (
            f'<invoke name="run"><parameter name="items">{"[" * 70}{"]" * 70}</parameter></invoke>',
            "run",
            "it is nested too deeply: 64 levels are allowed",
        ),
        (
            f'<invoke name="run"><parameter name="items">{"[" * 100_000}</parameter></invoke>',
            "run",
            "it is nested too deeply",
        ),
        (
            '<invoke name="run"><parameter name="text">\ud800</parameter></invoke>',
            "run",
            "unpaired surrogate",
        ),
        ('<invoke name="run"></invoke> go', "run", "go"),
    ],
)
def test_malformed_calls_say_what_is_wrong(dialect: Dialect, body: str, name: str, error: str) -> None:
    if dialect is ATEM:
        bad_text, good_text = NEXT + atem(as_atem(body)) + "<|eom|>", ATEM.format(OTHER)
        name, error = "run", as_atem(error)
    else:
        bad_text, good_text = minimax(body), MINIMAX.format(OTHER)
    message = dialect.parse(bad_text + good_text, tools=[TOOL])
    bad, good = message.tool_calls
    assert (bad.name, bad.id, dict(bad.arguments)) == (name, "call_0", {})
    assert bad.error is not None
    assert error in bad.error or (error == "go" and "text" in bad.error + "expected text")
    assert bad.raw == bad_text
    assert good == OTHER
    assert message.content == ""


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        (" to=run", "run", "<|message|> and the call are missing"),
        (" to=run<|message|>left", "run", "expected <atem:function_calls>, found 'left'"),
        (" to=run<|message|>", "run", "expected <atem:function_calls>, found the end"),
        (
            atem('<atem:invoke name="look"></atem:invoke>'),
            "run",
            "the message goes to 'run', its call to 'look'",
        ),
        (atem('<atem:invoke name="run"></atem:invoke>', "user"), "run", "a call goes to its tool: "),
        (
            atem('<atem:invoke name="run"></atem:invoke>') + "!",
            "run",
            "there is text after </atem:function_calls>",
        ),
        (" to=run<|message|><atem:function_calls>", "run", 'expected <atem:invoke name="…">, found the end'),
    ],
)
def test_muses_calls_go_to_their_tools(text: str, name: str, error: str) -> None:
    (bad,) = ATEM.parse(text).tool_calls
    assert (bad.name, bad.raw) == (name, text)
    assert bad.error is not None and bad.error.startswith(error)


@BOTH
def test_a_call_that_is_cut_anywhere_is_malformed(dialect: Dialect) -> None:
    whole = dialect.format(RUN).removesuffix("<|eom|>")
    begin = len(NEXT + " to=run") if dialect is ATEM else len("<minimax:tool_call>")
    for length in range(begin, len(whole)):
        (bad,) = dialect.parse(whole[:length], tools=[TOOL]).tool_calls
        assert bad.error is not None and bad.raw.rstrip() == whole[:length].rstrip()


FRAGMENTS = (
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="run">', "</invoke>", '<parameter name="x">',
    "</parameter>", "<think>", "</think>", "True", "{", '"', "\n",
)  # fmt: skip
ATEM_FRAGMENTS = (
    *map(as_atem, FRAGMENTS[2:]), "<atem:function_calls>", "</atem:function_calls>", "<|message|>", "<|eom|>",
    "<|eot|>", NEXT, " to=run", " to=self", " to=user",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(calls(FRAGMENTS), st.sampled_from(["", "I will look."]), st.sampled_from([None, "Hm."]))
def test_what_minimaxs_template_writes_is_read_back(
    made: tuple[ToolCall, ...], content: str, thought: str | None
) -> None:
    wanted = Message.assistant(content, *made, reasoning=thought)
    text = written(MINIMAX_TEMPLATE, wanted).removesuffix("[e~[\n")
    assert same(MINIMAX.parse(text, tools=[TOOL]), wanted)
    assert same(MINIMAX.parse("".join(map(MINIMAX.format, made)), tools=[TOOL]), Message.assistant("", *made))


@pytest.mark.parametrize("name", MUSE)
@settings(max_examples=60, deadline=None)
@given(calls(ATEM_FRAGMENTS), st.sampled_from([None, "Hm."]))
def test_what_muses_template_writes_is_read_back(
    name: str, made: tuple[ToolCall, ...], thought: str | None
) -> None:
    for wanted in (Message.assistant("", *made, reasoning=thought), Message.assistant("I <|eom|> am.")):
        text = written(trl_template(name), wanted, tools=[TOOL]).removesuffix("<|eot|>")
        assert same(ATEM.parse(text, tools=[TOOL]), wanted)
    assert same(ATEM.parse("".join(map(ATEM.format, made)), tools=[TOOL]), Message.assistant("", *made))


@BOTH
@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_no_text_raises(dialect: Dialect, data: st.DataObject, thinking: bool) -> None:
    fragments = ATEM_FRAGMENTS if dialect is ATEM else FRAGMENTS
    check_sound(dialect, data.draw(any_text(fragments)), thinking=thinking)


SPECIALS = ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>")


@pytest.mark.parametrize("name", MUSE)
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = load_renderer(tiny_tokenizer(trl_template(name), specials=SPECIALS, bos="<bos>"))
    assert renderer.dialect.name == "atem" and renderer.tools_problem is None
    for message in (Message.assistant("", RUN, OTHER, reasoning="Hm."), Message.assistant("Done.")):
        assert renderer.parse(renderer.reply(message, [TOOL]), [TOOL]) == message
