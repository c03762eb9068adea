"""Promise 1 on every family of templates, over generated conversations; and what each family's report says.

What is generated holds what an episode can: parallel calls, nested JSON, unicode, empty contents, tags and
control tokens that are only mentioned, text like ``</parameter>`` inside of arguments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.chat.families import BY_NAME, FAMILIES, PUBLISHED, Family, bridging, renderer, table

from turnwise.chat.check import difference
from turnwise.chat.dialects import DIALECTS
from turnwise.chat.renderer import TemplateRenderer
from turnwise.chat.thinking import without_thinking
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall, ToolSchema

PUBLISHED_NAMES = {family.name for family in PUBLISHED}
EVERY = [family.name for family in FAMILIES]
CALLING = [family.name for family in FAMILIES if family.dialect is not None]
MOVE = ToolSchema(
    name="move",
    description="Move the paddle.",
    parameters={
        "type": "object",
        "properties": {
            "direction": {"type": "string", "description": "Where to."},
            "note": {"type": "string", "description": "Why."},
            "steps": {"type": "integer", "description": "How far."},
            "fast": {"type": "boolean", "description": "Whether to hurry."},
            "path": {"type": "array", "description": "On the way.", "items": {}},
            "options": {"type": "object", "description": "What else."},
        },
        "required": ["direction"],
    },
)
TOOLS = (MOVE,)

few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

# -- what is said ----------------------------------------------------------------------------------

_MENTIONED = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "</parameter>", "<parameter=note>", "</arg_value>",
    "<|im_end|>", "<|eot_id|>", "<turn|>", '<|"|>', "<escape>", "[TOOL_CALLS]", "[/INST]", "</s>", "<|user|>",
    "<|end|>", "<|channel|>final<|message|>", "<｜User｜>", "</atem:parameter>", "functions.move:0",
    '{"name": "move"', "move(", "```json", "\\n", '"', "'", "{", "}]",
)  # fmt: skip
_LETTERS = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufdd0\ufdd1"), max_size=10
)
_WORDS = _LETTERS | st.sampled_from(("left", "Ünï", "漢字", "🙂", "a b", "7", "true", "null"))
_PIECES = st.lists(_WORDS | st.sampled_from(_MENTIONED), max_size=4).map(" ".join)
SAID = st.lists(_PIECES, min_size=1, max_size=3).map("\n".join).map(str.strip)
PLAIN = st.lists(_WORDS, max_size=4).map(" ".join).map(str.strip)
# Gemma 4 and FunctionGemma write keys as they are, so signs of the notation in one are truly ambiguous.
_KEYS = st.sampled_from(("key", "a_b", "x-1", "Ünï", "two words"))
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _PIECES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries(
    {"direction": _PIECES},
    optional={
        "note": SAID,
        "steps": st.integers(-9, 9),
        "fast": st.booleans(),
        "path": st.lists(_VALUES, max_size=3),
        "options": st.dictionaries(_KEYS, _VALUES, max_size=2),
    },
)


@st.composite
def replies(draw: st.DrawFn, family: Family, *, calls: int = 3, last: bool = False) -> Message:
    """A reply that a template of this family can hold at all."""
    count = 0
    if family.dialect is not None and calls:
        count = draw(st.integers(0, calls if family.parallel else 1))
    made = [ToolCall(name="move", arguments=draw(ARGUMENTS), id=f"call_{index}") for index in range(count)]
    # LFM2's template takes the text null for none beside a call.
    beside = SAID.filter(lambda text: text != "null")
    text = draw(SAID.filter(bool)) if not made else (draw(beside) if family.beside else "")
    thought = draw(st.none() | PLAIN.filter(bool)) if family.thinks else None
    return Message.assistant(text, *made, reasoning=thought)


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> list[Message]:
    chat = renderer(family.name)
    messages = [Message.system(draw(SAID.filter(bool)))] if chat.template.has_system else []
    messages.append(Message.user(draw(SAID.filter(bool))))
    for _ in range(draw(st.integers(1, 3))):
        reply = draw(replies(family))
        messages.append(reply)
        messages += [Message.tool(draw(SAID), call=call) for call in reply.tool_calls]
        if not reply.tool_calls:
            messages.append(Message.user(draw(SAID.filter(bool))))
    return messages


REFUSED: Counter[str] = Counter()
"""Replies that could not be demonstrated, and those that could, for each family."""


def demonstrated(
    chat: TemplateRenderer, name: str, message: Message, tools: Sequence[ToolSchema], context: Sequence[int]
) -> list[int]:
    """The reply's ids; one that is truly ambiguous is left out and counted."""
    if chat.template.end is None:
        assert name not in PUBLISHED_NAMES
        pytest.skip("no token ends a reply of this template, so none can be demonstrated")
    try:
        ids = chat.reply(message, tools, context)
    except TemplateError as problem:
        assert "read back differently" in str(problem) or "does not end this reply" in str(problem), problem
        REFUSED[f"{name} refused"] += 1
        assume(False)
    REFUSED[f"{name} said"] += 1
    return ids


def turns(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Each reply's position, and that of the next."""
    position = next(index for index, one in enumerate(messages) if one.role == "assistant")
    while position < len(messages):
        end = position + 1
        while end < len(messages) and messages[end].role != "assistant":
            end += 1
        yield position, end
        position = end


# -- promise 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@few
@given(data=st.data())
def test_prompt_replies_and_bridges_are_the_whole_conversation(name: str, data: st.DataObject) -> None:
    family, chat = BY_NAME[name], renderer(name)
    messages = data.draw(conversations(family))
    tools = TOOLS if family.dialect is not None else ()
    report = chat.reports[bool(tools)]
    first = next(turns(messages))[0]
    held = chat.prompt(messages[:first], tools).ids
    for position, end in turns(messages):
        reply, new = messages[position], messages[position + 1 : end]
        said = demonstrated(chat, name, reply, tools, held)
        assert _same(chat.parse(said, tools, held), reply)
        before = [*held, *said]
        bridge = chat.bridge(before, new, tools)
        whole = chat.prompt(messages[:end], tools).ids
        kind = "tool" if reply.tool_calls else "user"
        assert (bridge is None) is (kind in report.new_segments)
        if bridge is None:
            held = whole
            continue
        held = before + bridge.ids
        assert held[: len(before)] == before, "what is held never changes"
        if report.exact:
            assert held == whole
            assert whole[len(before) - len(said) : len(before)] == said, "the reply is where the loss falls"
        elif not report.new_segments:
            found = difference(chat, held, whole)
            assert found != "other", _apart(chat, held, whole)


def _apart(chat: TemplateRenderer, held: Sequence[int], whole: Sequence[int]) -> str:
    return f"{without_thinking(chat.decode(held))!r}\n{without_thinking(chat.decode(whole))!r}"


@pytest.mark.parametrize("name", EVERY)
@few
@given(data=st.data())
def test_a_demonstration_reads_back_as_itself(name: str, data: st.DataObject) -> None:
    family, chat = BY_NAME[name], renderer(name)
    tools = TOOLS if family.dialect is not None else ()
    message = data.draw(replies(family))
    ids = demonstrated(chat, name, message, tools, ())
    assert _same(chat.parse(ids, tools), message)
    assert ids[-1] in chat.stop_ids and not set(ids[:-1]) & set(chat.stop_ids)


def _same(read: Message, said: Message) -> bool:
    """Equal up to the calls' ids, which some families write, and white space around the text."""
    calls = [[(call.name, call.arguments, call.error) for call in one.tool_calls] for one in (read, said)]
    return calls[0] == calls[1] and (read.text.strip(), read.reasoning) == (said.text, said.reasoning)


def test_few_replies_are_too_ambiguous_to_be_demonstrated() -> None:
    told = {key.split()[0] for key in REFUSED}
    if not told:
        pytest.skip("no family was played in this process")
    for name in told:
        refused, said = REFUSED[f"{name} refused"], REFUSED[f"{name} said"]
        assert refused <= 3 + BY_NAME[name].ambiguous * (refused + said), (
            f"{name}: {refused} of {refused + said} refused"
        )


@pytest.mark.parametrize("name", EVERY)
@few
@given(data=st.data())
def test_a_cut_reply_is_closed_and_goes_on(name: str, data: st.DataObject) -> None:
    family, chat = BY_NAME[name], renderer(name)
    tools = TOOLS if family.dialect is not None else ()
    context = chat.prompt([Message.user("Go.")], tools).ids
    reply = demonstrated(chat, name, data.draw(replies(family)), tools, context)
    cut = reply[: data.draw(st.integers(0, len(reply) - 1))]
    message = chat.parse(cut, tools, context)
    assert all(call.error and call.raw for call in message.tool_calls if not call.name)
    new = [Message.user("Go on.")]
    ended = chat.extend(context + reply[:-1], new, tools).ids
    bridge = chat.extend(context + cut, new, tools).ids
    if cut and cut[-1] == ended[0]:
        assert bridge == ended[1:], "it was cut after the very token that ends it"
    else:
        assert bridge == ended and bridge[0] == chat.template.encoder.added[_end(chat)]
    assert chat.prompt([Message.user("Go."), Message.assistant("Yes."), *new], tools).ids[
        -len(ended) + 1 :
    ] == (ended[1:]) or bool(chat.reports[bool(tools)].new_segments)


def _end(chat: TemplateRenderer) -> str:
    assert chat.template.end is not None
    return chat.template.end.past


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@few
@given(data=st.data())
def test_anything_sampled_is_read_and_what_is_malformed_says_why(name: str, data: st.DataObject) -> None:
    family, chat = BY_NAME[name], renderer(name)
    tools = TOOLS if family.dialect is not None else ()
    added = sorted(chat.template.encoder.added.values())
    pieces = st.lists(st.sampled_from(added) | st.integers(0, added[-1]), max_size=12)
    texts = st.lists(st.sampled_from((*_MENTIONED, *chat.dialect.tags)) | _WORDS, max_size=8).map("".join)
    ids = data.draw(pieces | texts.map(chat.template.encoder.encode))
    message = chat.parse(ids, tools)
    assert message.role == "assistant"
    for call in message.tool_calls:
        assert (call.error is None) is (call.raw == "")
        assert call.error is None or len(call.error) > 8
        assert call.error is not None or call.name
    assert "\ufdd0" not in repr(message) or "\ufdd0" in chat.decode(ids)


@pytest.mark.parametrize("name", EVERY)
@few
@given(data=st.data())
def test_no_text_becomes_a_control_token(name: str, data: st.DataObject) -> None:
    family, chat = BY_NAME[name], renderer(name)
    control = sorted(chat.template.encoder.control)
    text = data.draw(st.lists(st.sampled_from(control) | _WORDS, min_size=1, max_size=4).map(" ".join))
    ids = {chat.template.encoder.added[token] for token in control}

    def structure(messages: list[Message]) -> list[int]:
        tools = TOOLS if family.dialect is not None else ()
        return [index for index in chat.prompt(messages, tools).ids if index in ids]

    def conversation(said: str) -> list[Message]:
        call = ToolCall(name="move", arguments={"direction": said}, id="call00000")
        answer = Message.assistant("", call) if family.dialect is not None else Message.assistant(said)
        told = Message.tool(said, call=call) if family.dialect is not None else Message.user(said)
        return [Message.user(said), answer, told]

    assert structure(conversation(text)) == structure(conversation("plain"))


@pytest.mark.parametrize("name", CALLING)
def test_a_call_that_is_repeated_in_ordinary_tokens_does_not_run(name: str) -> None:
    family, chat = BY_NAME[name], renderer(name)
    call = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
    ids = chat.reply(Message.assistant("", call), TOOLS)
    assert _same(chat.parse(ids, TOOLS), Message.assistant("", call))
    encoder, text = chat.template.encoder, chat.decode(ids[:-1])
    if not any(tag in text for tag in chat.dialect.tags & encoder.control):
        assert family.dialect == "llama3", "its calls are text, and so is all text that looks like one"
        return
    echoed = chat.parse(encoder.encode(encoder.mark(text)), TOOLS)
    assert all(call.error for call in echoed.tool_calls)


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_family_is_what_its_renderer_finds(name: str) -> None:
    family, chat = BY_NAME[name], renderer(name)
    if family.bridging is None:
        return
    tools = chat.tools_problem is None
    report = chat.reports[tools]
    assert (chat.dialect.name if tools else None) == family.dialect, chat.tools_problem
    assert bridging(report) == family.bridging, report.note
    assert chat.can_think is family.thinks
    if tools:
        assert chat.template.has_parallel_calls is family.parallel
        assert chat.speaks_beside_calls is family.beside


@pytest.mark.parametrize("name", EVERY)
def test_a_forked_template_behaves_like_its_parent(name: str) -> None:
    parent, fork = renderer(name), renderer(name, fork=True)
    assert fork.template.source != parent.template.source
    assert fork.dialect.name == parent.dialect.name and fork.tools_problem == parent.tools_problem
    assert fork.reports == parent.reports and fork.stop_ids == parent.stop_ids
    messages = [Message.user("Go."), Message.assistant("Yes."), Message.user("On.")]
    assert fork.prompt(messages).ids == parent.prompt(messages).ids
    assert fork.fingerprint != parent.fingerprint


DROPPING = [family.name for family in PUBLISHED if family.bridging == "keeps thinking"]


@pytest.mark.parametrize("name", DROPPING)
def test_thinking_as_the_template_has_it_starts_new_segments(name: str) -> None:
    chat, kept = renderer(name, thinking="template"), renderer(name)
    tools = TOOLS if BY_NAME[name].dialect is not None else ()
    report = chat.reports[bool(tools)]
    assert report.drops_thinking and not report.keeps_thinking and "user" in report.new_segments
    assert "a new segment starts after" in report.note and chat.fingerprint != kept.fingerprint
    context = chat.prompt([Message.user("Go.")], tools).ids + chat.reply(Message.assistant("Yes."), tools)
    assert chat.bridge(context, [Message.user("On.")], tools) is None
    assert kept.bridge(context, [Message.user("On.")], tools) is not None
    for kind in {"tool", "user"} - report.new_segments:
        assert kind == "tool", "what is still bridged is what the template itself would write"


@pytest.mark.parametrize("name", [name for name in DROPPING if BY_NAME[name].thinks])
@few
@given(data=st.data())
def test_thinking_as_the_template_has_it_is_what_a_server_would_render(
    name: str, data: st.DataObject
) -> None:
    family, chat = BY_NAME[name], renderer(name, thinking="template")
    tools = TOOLS if family.dialect is not None else ()
    messages = [
        replace(one, reasoning=one.reasoning or "Hm.") if one.role == "assistant" else one
        for one in data.draw(conversations(family))
    ]
    held = chat.prompt(messages[: next(turns(messages))[0]], tools).ids
    for position, end in turns(messages):
        said = demonstrated(chat, name, messages[position], tools, held)
        bridge = chat.bridge(held + said, messages[position + 1 : end], tools)
        whole = chat.prompt(messages[:end], tools).ids
        held = whole if bridge is None else held + said + bridge.ids
        assert difference(chat, held, whole) in ("exact", "end"), _apart(chat, held, whole)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "qwen3-coder", "mistral"])
def test_a_choice_about_thinking_that_does_nothing_is_an_error(name: str) -> None:
    with pytest.raises(TemplateError, match=r"model\.thinking: template does nothing"):
        renderer(name, thinking="template")


def test_the_documentation_lists_what_is_found() -> None:
    page = (Path(__file__).parents[2] / "docs/chat.md").read_text(encoding="utf-8")
    assert table() in page, "docs/chat.md: put the output of `python -m tests.chat.families` there"
    assert not {family.dialect for family in PUBLISHED} - {None, *DIALECTS}
    listed = re.findall(r"`(\w+)`", page.partition("Dialects:")[2].partition("\n\n")[0])
    assert set(listed) == set(DIALECTS)
