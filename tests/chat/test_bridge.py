"""Promise 1: tokens in are tokens out. What was sampled is never decoded and encoded again.

A conversation held as ids (prompt + reply + bridge + reply + …) must be what the template writes for all of
it, on the published templates' own text, and the held ids must never change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import CHATML_TOOLS, QWEN_SPECIALS, tiny_tokenizer, trl_template

from turnwise.chat.renderer import TemplateRenderer, builtin_template, load_renderer
from turnwise.chat.thinking import without_thinking
from turnwise.types import Message, ToolCall, ToolSchema

MOVE = ToolSchema(
    name="move",
    description="Move the paddle.",
    parameters={"type": "object", "properties": {"direction": {"type": "string"}}, "required": ["direction"]},
)

# Append-only: whole rendering and bridged ids are the same to the token.
EXACT = ["chatml", "tiny", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "qwen3_training/off"]
# Drops thinking from earlier turns, the empty block of thinking-off included.
DROPS_THINKING = ["qwen3", "qwen3/off"]


@functools.cache
def renderer(name: str) -> TemplateRenderer:
    stem, _, off = name.partition("/")
    template = {"chatml": CHATML_TOOLS, "tiny": builtin_template("tiny")}.get(stem) or trl_template(stem)
    return load_renderer(
        tiny_tokenizer(template), chat_template_kwargs={"enable_thinking": False} if off else {}
    )


def play(chat: TemplateRenderer, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
    """The ids that an episode would hold after ``messages``, its replies demonstrated."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
    ids, position = chat.prompt(messages[:first], tools).ids, first
    while position < len(messages):
        reply, end = messages[position], position + 1
        while end < len(messages) and messages[end].role != "assistant":
            end += 1
        ids = ids + chat.reply(reply)
        held = list(ids)
        bridge = chat.bridge(ids, messages[position + 1 : end], tools)
        assert bridge is not None
        assert ids == held, "a bridge must not touch what it extends"
        ids, position = ids + bridge.ids, end
    return ids


# Text that templates leave alone: they trim line breaks around it, and tags in it mean something.
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>"), max_size=12).map(
    str.strip
)
LINES = st.lists(WORDS, min_size=1, max_size=3).map("\n".join).map(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(WORDS, VALUES, max_size=3)
SAID = LINES.filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [Message.system(draw(SAID))] if draw(st.booleans()) else []
    messages.append(Message.user(draw(LINES)))
    for turn in range(draw(st.integers(1, 4))):
        calls = [
            ToolCall(name="move", arguments=draw(ARGUMENTS), id=f"call{turn}{index:04}")
            for index in range(draw(st.integers(0, 3)))
        ]
        messages.append(Message.assistant(draw(LINES if calls else SAID), *calls))
        if calls:
            messages += [Message.tool(draw(LINES), call=call) for call in calls]
            if draw(st.booleans()):
                messages.append(Message.user(draw(LINES)))
        else:
            messages.append(Message.user(draw(LINES)))
    return messages


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_bridged_ids_are_the_whole_rendering(name: str, messages: list[Message]) -> None:
    chat = renderer(name)
    assert play(chat, messages, [MOVE]) == chat.prompt(messages, [MOVE]).ids


@pytest.mark.parametrize("name", DROPS_THINKING)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_bridged_ids_keep_thinking_and_nothing_else_differs(name: str, messages: list[Message]) -> None:
    chat = renderer(name)
    ids = play(chat, messages, [MOVE])
    whole = chat.prompt(messages, [MOVE]).ids
    assert without_thinking(chat.decode(ids)) == without_thinking(chat.decode(whole))
    assert chat.tokenizer.encode(chat.decode(ids), add_special_tokens=False) == ids


@pytest.mark.parametrize("name", EXACT + DROPS_THINKING)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=LINES, arguments=st.lists(ARGUMENTS, max_size=3))
def test_a_demonstration_reads_back_as_itself(
    name: str, content: str, arguments: list[dict[str, object]]
) -> None:
    assume(content or arguments)
    chat = renderer(name)
    calls = [ToolCall(name="move", arguments=a, id=f"call_{i}") for i, a in enumerate(arguments)]
    message = Message.assistant(content, *calls)
    ids = chat.reply(message)
    assert chat.parse(ids) == message
    assert ids[-1] == chat.stop_ids[0] and ids.count(ids[-1]) == 1


@pytest.mark.parametrize("name", EXACT + DROPS_THINKING)
@settings(max_examples=30, deadline=None)
@given(
    contents=st.lists(
        st.lists(st.sampled_from(QWEN_SPECIALS) | WORDS, max_size=5).map(" ".join), min_size=1, max_size=3
    )
)
def test_control_tokens_in_observations_are_text(name: str, contents: list[str]) -> None:
    chat = renderer(name)
    call = ToolCall(name="move", arguments={})
    question = [Message.user("Go.")]
    calls = Message.assistant("", *[call] * len(contents))
    results = [Message.tool(content, call=call) for content in contents]
    plain = [Message.tool("ok", call=call) for _ in contents]
    control = {chat.template.encoder.added[token] for token in chat.template.encoder.control}

    def structure(ids: Sequence[int]) -> list[int]:
        return [index for index in ids if index in control]

    context = chat.prompt(question, [MOVE]).ids + chat.reply(calls)
    bridge, ordinary = chat.bridge(context, results, [MOVE]), chat.bridge(context, plain, [MOVE])
    assert bridge is not None and ordinary is not None
    assert structure(bridge.ids) == structure(ordinary.ids)
    whole = chat.prompt([*question, calls, *results], [MOVE]).ids
    assert structure(whole) == structure(chat.prompt([*question, calls, *plain], [MOVE]).ids)
    assert whole[-len(bridge.ids) :] == bridge.ids


@pytest.mark.parametrize("name", EXACT + DROPS_THINKING)
def test_a_cut_reply_is_closed_first(name: str) -> None:
    chat = renderer(name)
    context = chat.prompt([Message.user("Go.")]).ids
    reply = chat.reply(Message.assistant("I was going to"))
    new = [Message.user("Go on.")]
    ended, cut = chat.bridge(context + reply, new), chat.bridge(context + reply[:-1], new)
    assert ended is not None and cut is not None
    assert cut.ids == [reply[-1], *ended.ids]


def test_a_reply_ended_by_a_token_that_the_template_never_writes_is_closed_too() -> None:
    chat = renderer("qwen2_5")
    end = chat.template.encoder.added["<|im_end|>"]
    other = chat.template.encoder.added["<|endoftext|>"]
    context = chat.prompt([Message.user("Go.")]).ids
    bridge = chat.bridge([*context, other], [Message.user("Go on.")])
    assert bridge is not None and bridge.ids[0] == end


def test_qwen_puts_parallel_results_into_one_turn() -> None:
    chat = renderer("qwen2_5")
    one, two = (ToolCall(name="move", arguments={"n": n}) for n in (1, 2))
    context = chat.prompt([Message.user("Go.")], [MOVE]).ids + chat.reply(Message.assistant("", one, two))
    bridge = chat.bridge(context, [Message.tool("a", call=one), Message.tool("b", call=two)], [MOVE])
    assert bridge is not None
    assert chat.decode(bridge.ids) == (
        "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_thinking_off_begins_each_reply_with_an_empty_block() -> None:
    chat = renderer("qwen3/off")
    context = chat.prompt([Message.user("Go.")]).ids
    assert chat.decode(context).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    bridge = chat.bridge(context + chat.reply(Message.assistant("Yes.")), [Message.user("Sure?")])
    assert bridge is not None
    assert chat.decode(bridge.ids) == (
        "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_sampled_ids_survive_even_where_their_text_would_encode_differently() -> None:
    chat = renderer("chatml")
    encode = chat.template.encoder.encode
    # "is" as two tokens: a policy may sample what no tokenizer would write.
    sampled = [*encode("i"), *encode("s"), chat.stop_ids[0]]
    assert encode("is") != sampled[:-1]
    context = chat.prompt([Message.user("Go.")]).ids + sampled
    bridge = chat.bridge(context, [Message.user("On.")])
    assert bridge is not None
    assert chat.decode(context + bridge.ids).count("is<|im_end|>") == 1
    assert chat.parse(sampled) == Message.assistant("is")


def test_the_shortcut_is_the_templates_own_text() -> None:
    for name in EXACT + DROPS_THINKING:
        bridge = renderer(name)._bridge
        for roles, constants in bridge._constants.items():
            assert constants is not None, (name, roles)


def test_a_template_that_changes_contents_is_rendered_each_time() -> None:
    quoting = CHATML_TOOLS.replace(
        "'\\n<tool_response>\\n' + message.content", "'\\n<tool_response>\\n' + message.content | tojson"
    )
    assert quoting != CHATML_TOOLS
    chat = load_renderer(tiny_tokenizer(quoting))
    call = ToolCall(name="move", arguments={})
    context = chat.prompt([Message.user("Go.")], [MOVE]).ids + chat.reply(Message.assistant("", call))
    bridge = chat.bridge(context, [Message.tool("quiet", call=call)], [MOVE])
    assert bridge is not None and '"quiet"' in chat.decode(bridge.ids)
