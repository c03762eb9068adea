"""Gemma's notation of calls: read exactly, its faults said in words, nothing raises."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.replies import as_peer, calls, peer, same, sound, texts, written
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.gemma import FUNCTION_GEMMA, GEMMA, GemmaDialect, split_channels
from turnwise.chat.renderer import load_renderer
from turnwise.types import Message, ToolCall

Q = '<|"|>'
GEMMA4 = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma")
TAGS = ("<|tool_call>", "<tool_call|>", "<escape>", "<start_function_call>", "<end_function_call>", "call:f{")


def call(body: str) -> str:
    return f"<|tool_call>{body}<tool_call|>"


def cut(text: str) -> str:
    """A reply without what ends it."""
    return text.rstrip("\n").removesuffix("<turn|>").removesuffix("<|tool_response>")


GOOD = call(f"call:move{{direction:{Q}left{Q}}}")
MOVE = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")


def test_a_call_with_thinking_before_it_and_text_after() -> None:
    message = GEMMA.parse(f"<|channel>thought\nLeft, then.\n<channel|>{GOOD}I moved.")
    assert message == Message.assistant("I moved.", MOVE, reasoning="Left, then.")


def test_every_kind_of_value() -> None:
    body = f"call:f{{a:-3.5e1,b:true,c:False,d:null,e:None,l:[1,{Q}x{Q},[]],o:{{a b:{{}},{Q}c:d{Q}:0}},"
    body += f"s:{Q}{Q}}}"
    (made,) = GEMMA.parse(call(body)).tool_calls
    assert made.error is None
    assert made.arguments == {
        "a": -35.0, "b": True, "c": False, "d": None, "e": None, "l": [1, "x", []],
        "o": {"a b": {}, "c:d": 0}, "s": "",
    }  # fmt: skip


def test_white_space_between_the_signs_and_json_strings_are_fine() -> None:
    (made,) = GEMMA.parse(call('call: f { a : "x\\n" , b : [ 1 , 2 , ] }\n')).tool_calls
    assert made.error is None and made.arguments == {"a": "x\n", "b": [1, 2]}


def test_closing_tags_inside_a_string_are_part_of_it() -> None:
    said = f'}}<tool_call|>{GOOD[:12]} "x" {{,]'
    (made,) = GEMMA.parse(call(f"call:say{{text:{Q}{said}{Q}}}")).tool_calls
    assert made.arguments == {"text": said}


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ('{"name": "f"}', "", 'expected \'call:\', found \'{"name": "f"}<tool'),
        ("call:{}", "", "expected the tool's name, found '{}<tool_call|>"),
        ("call:f", "f", "expected '{', found '<tool_call|>"),
        ("call:f{a}", "f", "expected ':', found '}<tool_call|>"),
        ("call:f{:1}", "f", "expected a key, found ':1}<tool_call|>"),
        ("call:f{a:}", "f", "expected a value, found '}<tool_call|>"),
        ("call:f{a:left}", "f", f"'left' is no value: a string stands between {Q} and {Q}"),
        ("call:f{a:'left'}", "f", "expected a value, found \"'left'}<tool_call|>"),
        ("call:f{a:007}", "f", "'007' is no value"),
        ("call:f{a:1 2}", "f", "expected ',' or '}', found '2}<tool_call|>"),
        ("call:f{a:[1}", "f", "expected ',' or ']', found '}<tool_call|>"),
        ("call:f{a:1,a:2}", "f", "'a' is given twice"),
        ("call:f{a:{b:1,b:2}}", "f", "'b' is given twice"),
        ("call:f{a:NaN}", "f", "NaN is not a JSON value"),
        ("call:f{a:-Infinity}", "f", "-Infinity is not a JSON value"),
        ("call:f{a:1e999}", "f", "1e999 is out of range"),
        ("call:f{a:" + "9" * 5000 + "}", "f", "Exceeds the limit"),
        ("call:f{a:" + "[" * 100_000, "f", "it is nested too deeply: 64 levels are allowed"),
        ("call:f{a:" + "{a:" * 100_000, "f", "it is nested too deeply: 64 levels are allowed"),
        (f"call:f{{a:{Q}left}}", "f", f"a string is not closed by {Q}"),
        ('call:f{a:"left}', "f", "the call is not valid JSON: Unterminated string"),
        (f"call:f{{a:{Q}\ud800{Q}}}", "f", "it holds an unpaired surrogate"),
        ("call:f{} go", "f", "there is text between the call and <tool_call|>"),
    ],
)
def test_malformed_calls_say_what_is_wrong(body: str, name: str, error: str) -> None:
    message = GEMMA.parse("Well." + call(body) + call("call:move{}"))
    bad, good = message.tool_calls
    assert (bad.name, bad.id, dict(bad.arguments)) == (name, "call_0", {})
    assert bad.error is not None and error in bad.error
    assert bad.raw == call(body)
    assert good == ToolCall(name="move", arguments={}, id="call_1")
    assert message.content == "Well."


@pytest.mark.parametrize("length", range(len("<|tool_call>"), len(GOOD)))
def test_a_call_that_is_cut_anywhere_is_malformed(length: int) -> None:
    (bad,) = GEMMA.parse(GOOD[:length]).tool_calls
    assert bad.error is not None and bad.error.endswith("<tool_call|> is missing")
    assert bad.raw == GOOD[:length]


def test_an_unclosed_call_does_not_swallow_the_next() -> None:
    bad, good = GEMMA.parse(GOOD.removesuffix("<tool_call|>") + GOOD).tool_calls
    assert bad.error == "<tool_call|> is missing"
    assert good.error is None


def test_depth_is_bounded_where_json_is() -> None:
    (good,) = GEMMA.parse(call(f"call:f{{a:{'[' * 63}{']' * 63}}}")).tool_calls
    assert good.error is None
    (bad,) = GEMMA.parse(call(f"call:f{{a:{'[' * 64}{']' * 64}}}")).tool_calls
    assert bad.error == "it is nested too deeply: 64 levels are allowed"


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<|channel>thought\na\n<channel|>b", False, ("a", "b")),
        ("<|channel>thought\n<channel|>b", False, (None, "b")),
        ("<|channel>thought\nnever clo", False, ("never clo", "")),
        ("a\n<channel|>b", False, ("a", "b")),
        ("thought\na\n<channel|>b", True, ("a", "b")),
        ("still at it", True, ("still at it", "")),
        ("b", False, (None, "b")),
        ("b <|channel>thought\na<channel|>", False, (None, "b <|channel>thought\na<channel|>")),
        (f"<|tool_call>call:f{{a:{Q}<channel|>{Q}", False, (None, f"<|tool_call>call:f{{a:{Q}<channel|>{Q}")),
    ],
)
def test_thinking_is_what_stands_in_the_first_channel(
    text: str, opened: bool, expected: tuple[str | None, str]
) -> None:
    assert split_channels(text, opened=opened) == expected


def test_calls_in_thinking_are_not_made() -> None:
    message = GEMMA.parse(f"<|channel>thought\nShould I {GOOD}?\n<channel|>Yes.{GOOD}")
    assert message == Message.assistant("Yes.", MOVE, reasoning=f"Should I {GOOD}?")


@pytest.mark.parametrize("dialect", [GEMMA, FUNCTION_GEMMA], ids=lambda dialect: dialect.name)
@settings(deadline=None)
@given(st.data(), st.sampled_from(["", "I will look.", "f{a:1}?"]))
def test_what_is_formatted_is_read_back(dialect: GemmaDialect, data: st.DataObject, content: str) -> None:
    quote = "<escape>" if dialect is FUNCTION_GEMMA else Q
    strings = texts(*TAGS, without=[quote])
    wanted = data.draw(calls(strings, keys=strings))
    text = content + "".join(map(dialect.format, wanted))
    assert same(dialect.parse(text), Message.assistant(content, *wanted))


@pytest.mark.parametrize("name", GEMMA4)
@settings(max_examples=40, deadline=None)
@given(
    calls(texts(*TAGS, without=[Q]), inner_keys=st.sampled_from(["a", "b c", "été"])),
    st.sampled_from(["", "Done.", "call:f{}"]),
)
@example([], "Done.")
def test_what_published_templates_write_is_read_back(name: str, made: list[ToolCall], content: str) -> None:
    text = written(trl_template(name), Message.assistant(content, *made))
    assert same(GEMMA.parse(cut(text)), Message.assistant(content, *made))


@pytest.mark.parametrize("name", [name for name in GEMMA4 if name != "diffusion_gemma"])
def test_transformers_reads_the_same(name: str) -> None:
    arguments = {"a": [1, "it's, {x}: [y]", True], "b": {"c": 2.5}, "text": "</x>\n漢字"}
    other = ToolCall(name="f", arguments=arguments, id="call_1")
    message = Message.assistant("", MOVE, other, reasoning="Hm.")
    text = written(trl_template(name), message)
    ours = GEMMA.parse(cut(text))
    assert peer(trl_template(name), text) == as_peer(ours, "reasoning_content")


FRAGMENTS = st.sampled_from(
    [*TAGS, GOOD, Q, "<|channel>", "thought\n", "<channel|>", *"{}[],:\n", "\ud800", "<think>"]
)


@pytest.mark.parametrize("dialect", [GEMMA, FUNCTION_GEMMA], ids=lambda dialect: dialect.name)
@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join), st.booleans())
def test_no_text_raises(dialect: GemmaDialect, text: str, thinking: bool) -> None:
    sound(dialect, text, thinking=thinking)


SPECIALS = (
    "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", Q,
    "<|channel>", "<channel|>", "<|tool>", "<tool|>",
)  # fmt: skip


@pytest.mark.parametrize("name", GEMMA4)
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = load_renderer(tiny_tokenizer(trl_template(name), specials=SPECIALS, bos="<bos>"))
    assert renderer.dialect.name == "gemma" and renderer.tools_problem is None
    ids = renderer.tokenizer(GOOD, add_special_tokens=False).input_ids
    assert renderer.parse(ids) == Message.assistant("", MOVE)
