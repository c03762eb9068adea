"""Calls written as Python: literals are read, nothing is evaluated, faults are said in words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.replies import as_peer, calls, peer, same, sound, texts, written
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.pythonic import LFM, PYTHONIC, PythonicDialect
from turnwise.chat.renderer import load_renderer
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall

OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
TAGS = (OPEN, CLOSE, "[f(a=1)]", "')]", "'''", '"""')
BOTH = pytest.mark.parametrize("dialect", [LFM, PYTHONIC], ids=lambda dialect: dialect.name)


def block(body: str) -> str:
    return f"{OPEN}{body}{CLOSE}"


GOOD = block("[move(direction='left')]")
MOVE = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")


def test_calls_of_one_list_with_thinking_and_text_around() -> None:
    text = f"<think>Left, then.</think>I will.{block('[move(direction=' + repr('left') + '), look()]')} Go."
    look = ToolCall(name="look", arguments={}, id="call_1")
    assert LFM.parse(text) == Message.assistant("I will.\nGo.", MOVE, look, reasoning="Left, then.")


def test_calls_of_several_lists_are_numbered_on() -> None:
    message = LFM.parse(GOOD + "\n" + block("[f(), g()]"))
    assert [(call.id, call.name) for call in message.tool_calls] == [
        ("call_0", "move"), ("call_1", "f"), ("call_2", "g"),
    ]  # fmt: skip


def read(value: str) -> object:
    (made,) = LFM.parse(block(f"[f(x={value})]")).tool_calls
    assert made.error is None, made.error
    return made.arguments["x"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("'a'", "a"),
        ('"it\'s"', "it's"),
        ("'it\\'s'", "it's"),
        ("'it's'", "it's"),
        ("'rock'n'roll'", "rock'n'roll"),
        ("'a\nb'", "a\nb"),
        ("'''a 'b' c'''", "a 'b' c"),
        ('"""say "x"\n"""', 'say "x"\n'),
        ("''", ""),
        (r"'\n\t\\\x41\101é\U0001F642\N{BULLET}'", "\n\t\\AAé🙂•"),
        (r"'C:\dir\%'", r"C:\dir\%"),
        ("'a\\\nb'", "ab"),
        ("')]" + CLOSE + "'", ")]" + CLOSE),
        ("-3", -3),
        ("1.5e-3", 0.0015),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("[1, [], {}, 'a',]", [1, [], {}, "a"]),
        ("{\"a\": {'b': [True, null]}}", {"a": {"b": [True, None]}}),
    ],
)
def test_literals(value: str, expected: object) -> None:
    found = read(value)
    assert found == expected and type(found) is type(expected)


def test_parameters_may_be_called_as_python_may_not_and_tools_too() -> None:
    (made,) = LFM.parse(block("[get-weather.v2(from='a', class=1)]")).tool_calls
    assert made == ToolCall(name="get-weather.v2", arguments={"from": "a", "class": 1}, id="call_0")


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ("f(a=1)", "f", "expected '[', found 'f(a=1)"),
        ("[]", "", "the list of calls is empty"),
        ("[f]", "", "expected name(key=value, …), found 'f]"),
        ("[{'name': 'f'}]", "", "expected name(key=value, …), found \"{'name'"),
        ("[f('left')]", "f", "expected key=value (arguments are given by name), found \"'left')"),
        ("[f(1)]", "f", "expected key=value (arguments are given by name), found '1)"),
        ("[f(**{'a': 1})]", "f", "expected key=value"),
        ("[f(a=left)]", "f", "'left' is no value: a string stands between quotes"),
        ("[f(a=g(x=1))]", "f", "'g' is no value"),
        ("[f(a=__import__('os'))]", "f", "'__import__' is no value"),
        ("[f(a=1+1)]", "f", "'1+1' is no value"),
        ("[f(a=1_000)]", "f", "'1_000' is no value"),
        ("[f(a=f'x')]", "f", "'f' is no value"),
        ("[f(a=(1, 2))]", "f", "expected a value, found '(1, 2)"),
        ("[f(a={1: 2})]", "f", "expected a key between quotes, found '1: 2}"),
        ("[f(a={'b'})]", "f", "expected ':', found '})"),
        ("[f(a='x' b='y')]", "f", "expected ',' or ')', found \"b='y'"),
        ("[f(a=1), g(b=]", "f", "expected a value, found ']"),
        ("[f(a=1]", "f", "expected ',' or ')', found ']"),
        ("[f(a=1, a=2)]", "f", "'a' is given twice"),
        ('[f(a="x)]', "f", 'a string is not closed by "'),
        ('[f(a="""x")]', "f", 'a string is not closed by """'),
        ("[f(a='\\N{no such}')]", "f", "\\N{no such} is no character"),
        ("[f(a='\\ud800')]", "f", "it holds an unpaired surrogate"),
        ("[f(a='\ud800')]", "f", "it holds an unpaired surrogate"),
        ("[f(a=NaN)]", "f", "NaN is not a JSON value"),
        ("[f(a=nan)]", "f", "'nan' is no value"),
        ("[f(a=1e999)]", "f", "1e999 is out of range"),
        ("[f(a=" + "9" * 5000 + ")]", "f", "Exceeds the limit"),
        ("[f(a=" + "[" * 100_000, "f", "it is nested too deeply: 64 levels are allowed"),
        ("[f(a=" + '{"a":' * 100_000, "f", "it is nested too deeply: 64 levels are allowed"),
        ("[f()] go", "f", "there is text between the call and <|tool_call_end|>"),
    ],
)
def test_malformed_lists_say_what_is_wrong(body: str, name: str, error: str) -> None:
    message = LFM.parse("Well." + block(body) + GOOD)
    bad, good = message.tool_calls
    assert (bad.name, bad.id, dict(bad.arguments)) == (name, "call_0", {})
    assert bad.error is not None and error in bad.error
    assert bad.raw == block(body)
    assert good == ToolCall(name="move", arguments={"direction": "left"}, id="call_1")
    assert message.content == "Well."


@pytest.mark.parametrize("length", range(len(OPEN), len(GOOD)))
def test_a_list_that_is_cut_anywhere_is_malformed(length: int) -> None:
    (bad,) = LFM.parse(GOOD[:length]).tool_calls
    assert bad.error is not None and bad.error.endswith("<|tool_call_end|> is missing")
    assert bad.raw == GOOD[:length]


def test_depth_is_bounded_where_json_is() -> None:
    assert read("[" * 63 + "]" * 63) is not None
    (bad,) = LFM.parse(block(f"[f(x={'[' * 64}{']' * 64})]")).tool_calls
    assert bad.error == "it is nested too deeply: 64 levels are allowed"


@pytest.mark.parametrize(
    "body",
    [
        "it's" * 50_000, "\\" * 100_001, "'a' " * 50_000, "-" * 200_000, "'''" + "''" * 50_000,
        "x(" * 50_000, OPEN * 10_000, " " * 200_000,
    ],
    ids=lambda body: body[:6],
)  # fmt: skip
@BOTH
def test_long_nonsense_is_read_in_no_time(dialect: PythonicDialect, body: str) -> None:
    start = time.thread_time()
    dialect.parse(f"{OPEN if dialect is LFM else ''}[f(a='{body}")
    dialect.parse(f"{OPEN if dialect is LFM else ''}[f(a={body}")
    assert time.thread_time() - start < 3


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[f(a=1)]", ["f"]),
        (" [ f ( ) ,\n g(b='x') ]\n", ["f", "g"]),
        ("<think>\nx\n</think>\n\n[f()]", ["f"]),
    ],
)
def test_without_tags_the_whole_reply_is_the_list(text: str, names: list[str]) -> None:
    message = PYTHONIC.parse(text)
    assert message.content == ""
    assert [(call.name, call.error) for call in message.tool_calls] == [(name, None) for name in names]


@pytest.mark.parametrize(
    "text",
    ["", "Hello.", "[1, 2]", "[see(1)] for more", "[f", "[f(", "Use [f(a=1)].", "f(a=1)", "[f(a==1)]", "[]"],
)
def test_without_tags_other_text_is_content_to_the_letter(text: str) -> None:
    assert PYTHONIC.parse(text) == Message.assistant(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[f(a=1)] as you asked", "there is text after the calls"),
        ("[f(a='x", "a string is not closed by '"),
        ("[f(a=1), g(2)]", "expected key=value"),
        ("[f()", "expected ',' or ']', found the end"),
    ],
)
def test_without_tags_what_begins_as_a_list_of_calls_is_one(text: str, error: str) -> None:
    (bad,) = PYTHONIC.parse(text).tool_calls
    assert bad.name == "f" and bad.raw == text
    assert bad.error is not None and bad.error.startswith(error)


@settings(deadline=None)
@given(calls(texts(*TAGS)), st.sampled_from(["", "I will look.", "[f(a=1)]"]))
def test_what_is_formatted_is_read_back(made: list[ToolCall], content: str) -> None:
    text = content + "".join(map(LFM.format, made))
    assert same(LFM.parse(text), Message.assistant(content, *made))


@settings(deadline=None)
@given(calls(texts(*TAGS), most=1))
def test_what_is_formatted_without_tags_is_read_back(made: list[ToolCall]) -> None:
    assert same(PYTHONIC.parse("".join(map(PYTHONIC.format, made))), Message.assistant("", *made))


@pytest.mark.parametrize("name", ["lfm2_v2", "lfm2_2_5_vl"])
@settings(max_examples=100, deadline=None)
@given(calls(texts(*TAGS)), st.sampled_from(["", "I will look.", "[f(a=1)]"]))
def test_what_templates_that_escape_write_is_read_back(name: str, made: list[ToolCall], content: str) -> None:
    text = written(trl_template(name), Message.assistant(content, *made)).removesuffix("<|im_end|>\n")
    assert same(LFM.parse(text), Message.assistant(content, *made))


PLAIN = st.lists(st.sampled_from(["it's", "a", " ", "\n", "漢", '"', "=", ")]", ",", CLOSE]), max_size=8).map(
    "".join
)


@pytest.mark.parametrize("name", ["lfm2_2_5", "lfm2_2_5_v2"])
@settings(max_examples=100, deadline=None)
@given(calls(PLAIN))
def test_what_templates_that_do_not_escape_write_is_read_back(name: str, made: list[ToolCall]) -> None:
    """Backslashes and quotes elsewhere than in words cannot be read back there: a renderer refuses them."""
    text = written(trl_template(name), Message.assistant("", *made)).removesuffix("<|im_end|>\n")
    assert same(LFM.parse(text), Message.assistant("", *made))


@pytest.mark.parametrize("name", ["lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"])
def test_transformers_reads_the_same(name: str) -> None:
    """Where it can: it takes ``True`` for text, and cuts a string at its first apostrophe."""
    one = ToolCall(name="move", arguments={"to": "the left, then [up]", "n": 3, "l": [1, 2]}, id="call_0")
    two = ToolCall(name="look", arguments={}, id="call_1")
    thinks = name != "lfm2_v2"
    message = Message.assistant("I will.", one, two, reasoning="Hm." if thinks else None)
    text = written(trl_template(name), message, thinking="thinking")
    assert peer(trl_template(name), text) == as_peer(LFM.parse(text.removesuffix("<|im_end|>\n")), "thinking")

    hard = Message.assistant("", ToolCall(name="say", arguments={"text": "it's", "loud": True}, id="call_0"))
    text = written(trl_template(name), hard)
    assert same(LFM.parse(text.removesuffix("<|im_end|>\n")), hard)
    theirs = peer(trl_template(name), text)["tool_calls"][0]["function"]["arguments"]
    assert theirs["loud"] == "True" and theirs["text"] in ("it", "it\\")


FRAGMENTS = st.sampled_from(
    [
        *TAGS,
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "f",
        "a=",
        "'",
        '"',
        "\\",
        ",",
        "\\x4",
        "\\N{",
        "1",
        "\n",
        "\ud800",
        "<think>",
    ]
)


@BOTH
@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join), st.booleans())
def test_no_text_raises(dialect: PythonicDialect, text: str, thinking: bool) -> None:
    sound(dialect, text, thinking=thinking)
    sound(dialect, f"[f(a={text}", thinking=False)


SPECIALS = (OPEN, CLOSE, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_response_start|>")


@pytest.mark.parametrize("name", ["lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"])
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = load_renderer(tiny_tokenizer(trl_template(name), specials=SPECIALS, bos="<bos>"))
    assert renderer.dialect.name == "lfm" and renderer.tools_problem is None
    for text, escapes in [("left, it's 3", True), ("the 'left'", name in ("lfm2_v2", "lfm2_2_5_vl"))]:
        message = Message.assistant("", ToolCall(name="say", arguments={"text": text}, id="call_0"))
        if escapes:
            assert renderer.parse(renderer.reply(message)) == message
        else:
            with pytest.raises(TemplateError, match="read back differently"):
                renderer.reply(message)
