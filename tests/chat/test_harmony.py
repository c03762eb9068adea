"""gpt-oss: messages on channels, read wherever they are cut, and every call that is none reported."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.replies import as_peer, calls, peer, same, sound, texts, written
from tests.support.tokenizers import tiny_tokenizer, trl_template

from turnwise.chat.dialects.harmony import HarmonyDialect
from turnwise.chat.renderer import load_renderer
from turnwise.types import Message, ToolCall

HARMONY = HarmonyDialect()
NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Look first.<|end|>"
TAGS = (
    "<|call|>",
    "<|end|>",
    "<|return|>",
    "<|message|>",
    "<|channel|>",
    " to=functions.f",
    "<|call|><|start|>user",
)
LOOK = ToolCall(name="look", arguments={"at": "door"}, id="call_0")
GOOD = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": "door"}'


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.look <|constrain|>json",
        " to=functions.look<|channel|>commentary json",
        " to=functions.look<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.look json",
        "<|channel|>commentary to=functions.look",
        "<|channel|>commentary to=functions.look code",
    ],
)
@pytest.mark.parametrize("end", ["", "<|call|>"])
def test_the_recipient_may_stand_before_or_after_the_channel(header: str, end: str) -> None:
    text = header + '<|message|>{"at": "door"}' + end
    assert HARMONY.parse(text) == Message.assistant("", LOOK)
    assert HARMONY.parse(NEXT + text) == Message.assistant("", LOOK)
    assert HARMONY.parse(THOUGHT + NEXT + text) == Message.assistant("", LOOK, reasoning="Look first.")


def test_channels_are_thinking_preamble_calls_and_answer() -> None:
    second = GOOD.replace("look", "f").replace("{", '{"n": 1, ')
    text = (
        f"{THOUGHT}{NEXT}<|channel|>commentary<|message|>I will look.<|end|>{NEXT}{GOOD}<|call|>"
        f"{NEXT}<|channel|>analysis<|message|>Again.<|end|>{NEXT}{second}<|call|>"
        f"{NEXT}<|channel|>final<|message|>Done.\n<|return|>"
    )
    other = ToolCall(name="f", arguments={"n": 1, "at": "door"}, id="call_1")
    assert HARMONY.parse(text) == Message.assistant(
        "I will look.\nDone.\n", LOOK, other, reasoning="Look first.\nAgain."
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello.\n",
        "Set x to=5, please",
        "use to=functions.f",
        "<|channel|>anal",
        "<|channel|>",
        "json",
        NEXT,
    ],
)
def test_what_is_no_message_is_content_to_the_letter(text: str) -> None:
    assert HARMONY.parse(text) == Message.assistant(text)


def test_tokens_of_the_format_within_a_text_end_nothing() -> None:
    said = "The token <|end|> ends a message, then <|start|>assistant follows. <|call|>, <|return|>?"
    assert HARMONY.parse(f"<|channel|>final<|message|>{said}<|return|>") == Message.assistant(said)
    assert HARMONY.parse(f"<|channel|>analysis<|message|>{said}<|end|>{NEXT}{GOOD}").reasoning == said


def test_arguments_may_hold_a_whole_reply() -> None:
    said = f"{THOUGHT}{NEXT}<|channel|>final<|message|>x<|return|>"
    text = f'<|channel|>commentary to=functions.say<|message|>{{"text": "{said}"}}<|call|>'
    assert HARMONY.parse(text + NEXT + GOOD) == Message.assistant(
        "", ToolCall(name="say", arguments={"text": said}, id="call_0"),
        ToolCall(name="look", arguments={"at": "door"}, id="call_1"),
    )  # fmt: skip


def to(header: str, body: str = "{}") -> str:
    return f"{header}<|message|>{body}"


COMMENTARY = "<|channel|>commentary to=functions.f"


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        (to("<|channel|>analysis to=functions.f"), "f", "this one is on 'analysis'"),
        (to(" to=functions.f<|channel|>final json"), "f", "this one is on 'final'"),
        (to(" to=functions.f"), "f", "calls go to the commentary channel; this one names no channel"),
        (to("<|channel|>commentary to=python code", "1"), "", "there is no recipient 'python'"),
        (to("<|channel|>commentary to=functions."), "", "there is no recipient 'functions.'"),
        (to("<|channel|>thoughts", "hm"), "", "there is no channel 'thoughts'"),
        (to("<|channel|>comment to=functions.f"), "f", "there is no channel 'comment'"),
        (to(f"{COMMENTARY} to=functions.g"), "f", "to=functions.g' cannot be read"),
        (to(f"{COMMENTARY} <|channel|>final"), "f", "the header "),
        (to(f"{COMMENTARY} in json"), "f", "the header "),
        (" to=functions.f<|channel|>commentary json", "f", "<|message|> and the arguments are missing"),
        (COMMENTARY, "f", "<|message|> and the arguments are missing"),
        (to(COMMENTARY, ""), "f", "the call is not valid JSON: Expecting value"),
        (to(COMMENTARY, '{"a": '), "f", "the call is not valid JSON: Expecting value"),
        (to(COMMENTARY, "left"), "f", "the call is not valid JSON: Expecting value"),
        (to(COMMENTARY, "[1]"), "f", '"arguments" must be an object, not a list'),
        (to(COMMENTARY, "{} {}"), "f", "there is text after the arguments"),
        (to(COMMENTARY, '{"a": NaN}'), "f", "NaN is not a JSON value"),
        (to(COMMENTARY, '{"a": 1e999}'), "f", "1e999 is out of range"),
        (to(COMMENTARY, '{"a": "\\ud800"}'), "f", "it holds an unpaired surrogate"),
        (to(COMMENTARY, '{"a": %s}' % ("[" * 64 + "]" * 64)), "f", "it is nested too deeply: 64 levels"),
        (to(COMMENTARY, "[" * 100_000), "f", "it is nested too deeply"),
    ],
)
def test_malformed_calls_say_what_is_wrong(text: str, name: str, error: str) -> None:
    for end in ("", "<|call|>"):
        message = HARMONY.parse(f"{THOUGHT}{NEXT}{text}{end}{NEXT}{GOOD}<|call|>")
        bad, good = message.tool_calls
        assert (bad.name, bad.id, dict(bad.arguments)) == (name, "call_0", {})
        assert bad.error is not None and error in bad.error
        assert bad.raw == NEXT + text + end
        assert good == ToolCall(name="look", arguments={"at": "door"}, id="call_1")
        assert (message.content, message.reasoning) == ("", "Look first.")


def test_a_reply_that_is_cut_anywhere_keeps_what_it_said() -> None:
    tokens = re.findall(r"<\|[a-z]+\|>|.", f"{THOUGHT}{NEXT}{GOOD}")
    begin = tokens.index("<|message|>") + 1
    for length in range(len(tokens)):
        message = sound(HARMONY, "".join(tokens[:length]), thinking=False)
        assert all(call.error for call in message.tool_calls)
        assert message.reasoning == ("Look first."[: max(0, length - begin)] or None)
    assert sound(HARMONY, "".join(tokens), thinking=False).tool_calls == (LOOK,)


@settings(deadline=None)
@given(
    calls(texts(*TAGS), keys=texts(*TAGS)),
    st.sampled_from(["", "I will look.", "f <|end|> to=functions.g"]),
    st.sampled_from([None, "Hm."]),
)
def test_what_is_formatted_is_read_back(made: list[ToolCall], content: str, thought: str | None) -> None:
    parts = [f"<|channel|>analysis<|message|>{thought}<|end|>"] if thought else []
    parts += [f"<|channel|>commentary<|message|>{content}<|end|>"] if content else []
    text = NEXT.join(parts) + "".join(map(HARMONY.format, made))
    assert same(HARMONY.parse(text), Message.assistant(content, *made, reasoning=thought))


TEMPLATES = pytest.mark.parametrize("name", ["gptoss", "gptoss_training"])


@TEMPLATES
@settings(max_examples=60, deadline=None)
@given(calls(texts(*TAGS), keys=texts(*TAGS), most=1), st.sampled_from([None, "Hm."]))
def test_what_the_published_templates_write_is_read_back(
    name: str, made: list[ToolCall], thought: str | None
) -> None:
    """They write one call a reply, and a word before it as thinking."""
    wanted = Message.assistant("" if made else "Done.", *made, reasoning=thought)
    text = written(trl_template(name), wanted, thinking="thinking")
    assert same(HARMONY.parse(text.removesuffix("<|call|>").removesuffix("<|return|>")), wanted)


@pytest.mark.parametrize(
    "message", [Message.assistant("", LOOK, reasoning="Hm."), Message.assistant("Done.")]
)
def test_transformers_reads_the_same(message: Message) -> None:
    text = written(trl_template("gptoss"), message, thinking="thinking")
    assert peer(trl_template("gptoss"), text) == as_peer(HARMONY.parse(text), "thinking")


def test_transformers_does_not_see_a_recipient_after_the_channel() -> None:
    """Which is how the models themselves write it."""
    assert "tool_calls" not in peer(trl_template("gptoss"), GOOD + "<|call|>")
    assert HARMONY.parse(GOOD + "<|call|>").tool_calls == (LOOK,)


@pytest.mark.parametrize(
    "text",
    [" " * 200_000 + "!", "<|end|>" * 20_000, "<|message|>" * 20_000, "<|channel|>" * 20_000, NEXT * 10_000,
     "<|end|>" + " " * 200_000 + "x", f"{NEXT}{COMMENTARY}<|message|>" * 2_000, "to=a " * 20_000],
    ids=lambda text: text[:20].strip(),
)  # fmt: skip
def test_long_nonsense_is_read_in_no_time(text: str) -> None:
    start = time.thread_time()
    sound(HARMONY, text, thinking=False)
    assert time.thread_time() - start < 3


FRAGMENTS = st.sampled_from(
    [
        *TAGS, NEXT, THOUGHT, GOOD, "<|constrain|>", "analysis", "commentary", "final", "json",
        *"{}\"\n ", "\ud800",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join), st.booleans())
def test_no_text_raises(text: str, thinking: bool) -> None:
    sound(HARMONY, text, thinking=thinking)


SPECIALS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")


@TEMPLATES
def test_published_templates_are_known_by_what_they_write(name: str) -> None:
    renderer = load_renderer(tiny_tokenizer(trl_template(name), specials=SPECIALS, bos="<bos>"))
    assert renderer.dialect.name == "harmony" and renderer.tools_problem is None
    for message in (Message.assistant("", LOOK), Message.assistant("Done.", reasoning="Hm.")):
        assert renderer.parse(renderer.reply(message)) == message
