"""Calls written as JSON between tags, alone or in a list: Phi-4-mini's and Cohere's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.replies import calls, same, sound, texts, written

from turnwise.chat.dialects import DIALECTS, Dialect, find_dialect
from turnwise.chat.dialects.cohere import CohereDialect
from turnwise.chat.dialects.phi import PhiDialect
from turnwise.types import Message, ToolCall

PHI, COHERE = PhiDialect(), CohereDialect()
TAGS = (
    "<|tool_call|>",
    "<|/tool_call|>",
    "functools[",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|END_RESPONSE|>",
)
BOTH = pytest.mark.parametrize("dialect", [PHI, COHERE], ids=lambda dialect: dialect.name)

MOVE = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
LOOK = ToolCall(name="look", arguments={}, id="call_1")
ONE, OTHER = '{"name": "move", "arguments": {"direction": "left"}}', '{"name": "look"}'

PHI_TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<|tool_call|>' + (call.function | tojson) + '<|/tool_call|>' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
COHERE_TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' }}
    {{- '<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>' }}
    {%- if message.tool_calls %}
        {{- '<|START_THINKING|>' + (message.reasoning_content or '') + '<|END_THINKING|><|START_ACTION|>[' }}
        {%- for call in message.tool_calls %}
            {{- '\n    {"tool_call_id": "' ~ loop.index0 ~ '", "tool_name": "' + call.function.name }}
            {{- '", "parameters": ' + call.function.arguments | tojson + '}' }}
            {%- if not loop.last %},{% endif %}
        {%- endfor %}
        {{- '\n]<|END_ACTION|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
"""


def phi(body: str) -> str:
    return f"<|tool_call|>{body}<|/tool_call|>"


def cohere(body: str) -> str:
    return f"<|START_ACTION|>{body}<|END_ACTION|>"


def as_cohere(body: str) -> str:
    return body.replace('"name"', '"tool_name"').replace('"arguments"', '"parameters"')


@pytest.mark.parametrize(
    "text",
    [
        phi(ONE) + phi(OTHER), phi(f"[{ONE}, {OTHER}]"), phi(f"\n[{ONE}]\n") + "\n" + phi(OTHER),
        f"functools[{ONE}, {OTHER}]", f"\nfunctools [ {ONE}, {OTHER} ]\n",
    ],
)  # fmt: skip
def test_phi_writes_one_call_or_a_list(text: str) -> None:
    assert PHI.parse(text) == Message.assistant("", MOVE, LOOK)
    assert PHI.parse("<think>\nHm.\n</think>\n\n" + text) == Message.assistant(
        "", MOVE, LOOK, reasoning="Hm."
    )


@pytest.mark.parametrize("text", ["", "Hello.\n", "functools is a module", f"Not functools[{ONE}]", ONE])
def test_other_text_is_content_to_the_letter(text: str) -> None:
    assert PHI.parse(text) == COHERE.parse(text) == Message.assistant(text)


def test_what_begins_as_functools_is_a_call() -> None:
    (bad,) = PHI.parse(f"functools[{ONE}").tool_calls
    assert bad.name == "move" and bad.raw == f"functools[{ONE}"
    assert bad.error is not None and bad.error.startswith("the call is not valid JSON: Expecting ','")
    (bad,) = PHI.parse(f"functools[{ONE}] there").tool_calls
    assert bad.error == "there is text after the calls"


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<|START_THINKING|>Hm.<|END_THINKING|>", False, ("Hm.", "")),
        ("<|START_THINKING|><|END_THINKING|>", False, (None, "")),
        ("Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", False, ("Hm.", "Yes.")),
        ("Hm.<|END_THINKING|>", True, ("Hm.", "")),
        ("never clo", True, ("never clo", "")),
        ("<|START_RESPONSE|>Yes.", False, (None, "Yes.")),
        ("<|START_TEXT|>Yes.<|END_TEXT|>", False, (None, "Yes.")),
        ("Yes.<|END_RESPONSE|>", False, (None, "Yes.")),
        ("Yes.\n", False, (None, "Yes.\n")),
    ],
)
def test_the_parts_of_coheres_replies(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    message = COHERE.parse(text, thinking=opened)
    assert (message.reasoning, message.content) == expected
    assert not message.tool_calls


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ("[]", "", "the list of calls is empty"),
        ('{"name": "move"', "move", "the call is not valid JSON: Expecting ',' delimiter"),
        ("left", "", "the call is not valid JSON: Expecting value"),
        ("", "", "the call is not valid JSON: Expecting value"),
        ('"left"', "", 'the call must be an object {"name": …, "arguments": {…}}, not a string'),
        ('{"arguments": {}}', "", 'the call has no "name"'),
        ('{"name": 3}', "", 'the call has no "name"'),
        ('{"name": "move", "arguments": [1]}', "move", '"arguments" must be an object, not a list'),
        ('{"name": "move", "arguments": "{}"}', "move", '"arguments" must be an object, not a string'),
        (
            f'[{ONE}, {{"name": "look", "arguments": 1}}]',
            "move",
            'call 2 of 2: "arguments" must be an object',
        ),
        (f"[{ONE}, 3]", "move", "call 2 of 2: the call must be an object"),
        (f"[{ONE} {OTHER}]", "move", "the call is not valid JSON: Expecting ',' delimiter"),
        ('{"name": "move", "arguments": {"x": NaN}}', "move", "NaN is not a JSON value"),
        ('{"name": "move", "arguments": {"x": 1e999}}', "move", "1e999 is out of range"),
        ('{"name": "move", "arguments": {"x": "\\ud800"}}', "move", "it holds an unpaired surrogate"),
        (
            '{"name": "move", "arguments": {"x": %s}}' % ("[" * 64 + "]" * 64),
            "move",
            "it is nested too deeply",
        ),
        ("[" * 100_000, "", "it is nested too deeply"),
        (f"{ONE} go", "move", "there is text between the call and "),
    ],
)
@BOTH
def test_malformed_calls_say_what_is_wrong(dialect: Dialect, body: str, name: str, error: str) -> None:
    block = phi if dialect is PHI else cohere
    if dialect is COHERE:
        body, error = as_cohere(body), as_cohere(error)
    good = dialect.format(LOOK)
    message = dialect.parse("Well." + block(body) + good)
    bad, look = message.tool_calls
    assert (bad.name, bad.id, dict(bad.arguments)) == (name, "call_0", {})
    assert bad.error is not None and error in bad.error
    assert bad.raw == block(body)
    assert look == LOOK
    assert message.content == "Well."


@BOTH
def test_a_call_that_is_cut_anywhere_is_malformed(dialect: Dialect) -> None:
    whole = dialect.format(MOVE)
    closing = "<|/tool_call|>" if dialect is PHI else "<|END_ACTION|>"
    opening = "<|tool_call|>" if dialect is PHI else "<|START_ACTION|>"
    for length in range(len(opening), len(whole)):
        (bad,) = dialect.parse(whole[:length]).tool_calls
        assert bad.error is not None and bad.error.endswith(f"{closing} is missing")
        assert bad.raw == whole[:length].rstrip()


@BOTH
@settings(deadline=None)
@given(st.data(), st.sampled_from(["", "I will look.", '{"name": "f"}']))
def test_what_is_formatted_is_read_back(dialect: Dialect, data: st.DataObject, content: str) -> None:
    wanted = data.draw(calls(texts(*TAGS), keys=texts(*TAGS)))
    text = content + "".join(map(dialect.format, wanted))
    assert same(dialect.parse(text), Message.assistant(content, *wanted))


@settings(deadline=None)
@given(calls(texts(*TAGS), keys=texts(*TAGS)), st.sampled_from(["", "I will look.", '{"name": "f"}']))
def test_what_phis_template_writes_is_read_back(made: list[ToolCall], content: str) -> None:
    wanted = Message.assistant(content, *made)
    assert same(PHI.parse(written(PHI_TEMPLATE, wanted).removesuffix("<|end|>")), wanted)


@settings(deadline=None)
@given(calls(texts(*TAGS), keys=texts(*TAGS)), st.sampled_from([None, "Look first."]))
def test_what_coheres_template_writes_is_read_back(made: list[ToolCall], thought: str | None) -> None:
    wanted = Message.assistant("" if made else "Done.", *made, reasoning=thought if made else None)
    text = written(COHERE_TEMPLATE, wanted).removesuffix("<|END_OF_TURN_TOKEN|>")
    assert same(COHERE.parse(text), wanted)


def test_calls_in_thinking_are_not_made() -> None:
    text = f"<|START_THINKING|>Should I {cohere('[1]')}?<|END_THINKING|>{COHERE.format(MOVE)}"
    assert COHERE.parse(text) == Message.assistant("", MOVE, reasoning=f"Should I {cohere('[1]')}?")


FRAGMENTS = st.sampled_from(
    [
        *TAGS, ONE, as_cohere(ONE), json.dumps([1]), "<|START_THINKING|>", "<|END_THINKING|>", "<think>",
        "[", "]", "{", '"name": "', "\n", "\ud800",
    ]
)  # fmt: skip


@BOTH
@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join), st.booleans())
def test_no_text_raises(dialect: Dialect, text: str, thinking: bool) -> None:
    sound(dialect, text, thinking=thinking)


def test_templates_are_known_by_what_they_write() -> None:
    for template, dialect in ((PHI_TEMPLATE, PHI), (COHERE_TEMPLATE, COHERE)):
        for made in ((MOVE,), (MOVE, LOOK)):
            text = written(template, Message.assistant("", *made))
            text = text.removesuffix("<|end|>").removesuffix("<|END_OF_TURN_TOKEN|>")
            assert find_dialect(text, made, thinking=False) is DIALECTS[dialect.name]
