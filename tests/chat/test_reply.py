"""Replies in their context: what asks for them, how calls are named, and what a template cannot hold."""

from __future__ import annotations

import pytest
from tests.chat.families import renderer

from turnwise.chat.check import difference
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall, ToolSchema

LOOK = ToolSchema(
    name="look",
    description="Look.",
    parameters={"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
)
GO = Message.user("Go.")


def call(at: str = "door", id: str = "call_0") -> ToolCall:
    return ToolCall(name="look", arguments={"at": at}, id=id)


def test_the_generation_prompt_opens_the_thinking_that_history_leaves_out() -> None:
    chat = renderer("deepseek-r1")
    message = Message.assistant("Four.", reasoning="Two and two.")
    ids = chat.reply(message)
    assert chat.decode(ids) == "Two and two.\n</think>\n\nFour.<｜end▁of▁sentence｜>"
    assert chat.parse(ids) == message
    assert chat.decode(chat.reply(Message.assistant("Four."))) == "\n</think>\n\nFour.<｜end▁of▁sentence｜>"
    context = chat.prompt([GO]).ids + ids
    bridge = chat.bridge(context, [Message.user("Sure?")])
    assert bridge is not None
    assert chat.decode(context + bridge.ids) == (
        "<｜begin▁of▁sentence｜><｜User｜>Go.<｜Assistant｜><think>\nTwo and two.\n</think>\n\nFour."
        "<｜end▁of▁sentence｜><｜User｜>Sure?<｜Assistant｜><think>\n"
    )


def test_a_call_is_not_lost_in_thinking_that_nothing_follows() -> None:
    chat = renderer("qwen3")
    encode, made = (
        chat.template.encoder.encode,
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
    )
    for text in (f"<think>\nHm.\n{made}", f"<think>\nHm.\n{made}\n</think>\n\n"):
        message = chat.parse(encode(f"{text}<|im_end|>"), [LOOK])
        (bad,) = message.tool_calls
        assert bad.name == "look" and bad.error is not None and "within the thinking" in bad.error
        assert bad.raw == made and message.reasoning == "Hm." and message.text == ""
        assert not chat.parse(encode(text), [LOOK]).tool_calls, "a reply that was cut may have gone on"
    assert not chat.parse(encode(f"<think>\nHm.\n{made}\n</think>\n\nNo.<|im_end|>"), [LOOK]).tool_calls
    mentioned = chat.template.encoder.mark(made)
    assert not chat.parse(encode(f"<think>\nHm.\n{mentioned}<|im_end|>"), [LOOK]).tool_calls


def test_a_call_that_thinking_only_spells_is_thinking() -> None:
    chat = renderer("qwen3.5")
    spelled = "Hm.\n<tool_call>\n<function=look>\n</function>\n</tool_call>"
    message = Message.assistant("", reasoning=spelled)
    assert chat.parse(chat.reply(message, [LOOK]), [LOOK]) == message


def test_llama_ends_a_call_with_a_token_that_its_template_does_not_write_there() -> None:
    for name in ("llama3.1", "llama3.2"):
        chat = renderer(name)
        end = chat.template.encoder.added["<|eom_id|>"]
        assert end in chat.stop_ids
        text = '<|python_tag|>{"name": "look", "parameters": {"at": "door"}}'
        message = chat.parse([*chat.template.encoder.encode(text), end], [LOOK])
        assert message == Message.assistant("", call())


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "glm4", "tiny-aya", "qwen2.5"])
def test_a_system_message_on_the_way_is_never_lost(name: str) -> None:
    chat = renderer(name)
    context = chat.prompt([GO]).ids + chat.reply(Message.assistant("Yes."))
    assert chat.bridge(context, [Message.system("Hurry."), Message.user("On.")]) is None


def test_an_empty_block_of_thinking_is_written_as_the_template_writes_a_full_one() -> None:
    chat = renderer("nemotron")
    assert chat.decode(chat.reply(Message.assistant("Four."))) == "\n</think>\nFour.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "after_question", "after_result"),
    [
        ("gemma4-v5/on", "<|channel>thought\nHm.\n<channel|>Yes.<turn|>", "Hm.\n<channel|>Yes.<turn|>"),
        (
            "deepseek-v3.1/on",
            "Hm.</think>Yes.<｜end▁of▁sentence｜>",
            "<think>Hm.</think>Yes.<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_what_opens_the_thinking_is_the_replys_own_context(
    name: str, after_question: str, after_result: str
) -> None:
    chat = renderer(name)
    message = Message.assistant("Yes.", reasoning="Hm.")
    asked = chat.prompt([GO], [LOOK]).ids
    held = asked + chat.reply(Message.assistant("", call()), [LOOK], asked)
    bridge = chat.bridge(held, [Message.tool("A door.", call=call())], [LOOK])
    assert bridge is not None
    held = held + bridge.ids
    assert chat.opens_thinking(asked) is not chat.opens_thinking(held)
    assert chat.decode(chat.reply(message, [LOOK], asked)) == after_question
    assert chat.decode(chat.reply(message, [LOOK], held)) == after_result
    assert chat.parse(chat.reply(message, [LOOK], held), [LOOK], held) == message
    silent = Message.assistant("Yes.")
    assert chat.parse(chat.reply(silent, [LOOK], held), [LOOK], held) == silent


def test_glm_ends_a_reply_with_the_token_of_who_speaks_next() -> None:
    chat = renderer("glm4")
    names = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))
    assert names == ["<|user|>", "<|observation|>", "<|endoftext|>"]
    context = chat.prompt([GO], [LOOK]).ids
    called = chat.reply(Message.assistant("", call()), [LOOK])
    assert chat.decode(called).endswith("</tool_call><|observation|>")
    results = [Message.tool("A door.", call=call())]
    closed = chat.bridge(context + called, results, [LOOK])
    cut = chat.bridge(context + called[:-1], results, [LOOK])
    assert closed is not None and cut is not None and cut.ids == [called[-1], *closed.ids]
    assert chat.decode(closed.ids).startswith("\n<tool_response>")
    # It meant to be answered by a tool, and a user speaks: the user's own token has to stand there.
    other = chat.bridge(context + called, [Message.user("No.")], [LOOK])
    assert other is not None and chat.decode(other.ids).startswith("<|user|>\nNo.")
    system = chat.extend(context + called, [Message.system("Rules."), Message.user("Hi.")], [LOOK])
    assert chat.decode(system.ids).startswith("<|system|>\nRules.<|user|>\nHi.")


def test_gpt_oss_holds_what_it_returned_and_closes_what_was_cut() -> None:
    chat = renderer("gpt-oss")
    message = Message.assistant("Four.", reasoning="Two and two.")
    reply = chat.reply(message)
    assert chat.decode(reply) == (
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Four.<|return|>"
    )
    context = chat.prompt([GO]).ids
    ended = chat.bridge(context + reply, [Message.user("Sure?")])
    cut = chat.bridge(context + reply[:-1], [Message.user("Sure?")])
    assert ended is not None and cut is not None
    assert chat.decode(ended.ids) == "<|start|>user<|message|>Sure?<|end|><|start|>assistant"
    assert chat.decode(cut.ids) == "<|end|>" + chat.decode(ended.ids)
    whole = chat.prompt([GO, message, Message.user("Sure?")]).ids
    assert difference(chat, context + reply + ended.ids, whole) == "thinking"
    silent = chat.reply(Message.assistant("Four."))
    bare = context + silent + ended.ids
    assert (
        difference(chat, bare, whole) == "end"
        and "<|return|> is written with <|end|>" in chat.reports[False].note
    )


def test_a_function_gemma_reply_may_hold_several_calls() -> None:
    chat = renderer("functiongemma")
    text = chat.decode(chat.reply(Message.assistant("", call("a"), call("b")), [LOOK]))
    assert text.count("<start_function_call>") == 2 and text.endswith(
        "<end_function_call><start_function_response>"
    )


def test_results_answer_to_the_ids_that_the_policy_gave_its_calls() -> None:
    chat = renderer("mistral")
    sampled = chat.template.encoder.encode(
        '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "door"}, "id": "a1B2c3D4e"}]</s>'
    )
    (made,) = chat.parse(sampled, [LOOK]).tool_calls
    assert made.id == "a1B2c3D4e"
    # As `ModelPolicy` names it in the episode.
    renamed = ToolCall(name=made.name, arguments=made.arguments, id=f"t3c0-{made.id}")
    context = chat.prompt([GO], [LOOK]).ids + sampled
    bridge = chat.bridge(context, [Message.tool("A door.", call=renamed)], [LOOK])
    assert bridge is not None
    assert (
        chat.decode(bridge.ids)
        == '[TOOL_RESULTS] {"content": "A door.", "call_id": "a1B2c3D4e"}[/TOOL_RESULTS]'
    )
    short = chat.bridge(context, [Message.tool("A door.", call=call(id="t3c0"))], [LOOK])
    assert short is not None and '"call_id": "00000t3c0"' in chat.decode(short.ids)


def test_mistral_starts_anew_where_the_tools_move() -> None:
    chat = renderer("mistral")
    assert chat.reports[True].new_segments == {"user"} and chat.reports[False].exact
    context = chat.prompt([GO], [LOOK]).ids + chat.reply(Message.assistant("Yes."), [LOOK])
    assert chat.bridge(context, [Message.user("On.")], [LOOK]) is None


# -- what a template cannot hold -------------------------------------------------------------------


def shown(name: str, *messages: Message) -> str:
    chat = renderer(name)
    return chat.decode(chat.prompt([GO, *messages], [LOOK]).ids).partition("Go.")[2]


BAD = ToolCall(name="", arguments={}, id="call_0", error="broken", raw="look(")


@pytest.mark.parametrize("name", ["gpt-oss", "gemma4", "functiongemma", "llama3.1", "qwen3", "glm4"])
def test_the_answer_to_a_malformed_call_is_shown(name: str) -> None:
    text = shown(name, Message.assistant("", BAD), Message.tool("That is no call.", call=BAD))
    assert "look(" in text and text.count("That is no call.") == 1
    chat = renderer(name)
    context = chat.prompt([GO], [LOOK]).ids + chat.template.encoder.encode("look(")
    bridge = chat.bridge(context, [Message.tool("That is no call.", call=BAD)], [LOOK])
    assert bridge is not None and "That is no call." in chat.decode(bridge.ids)


@pytest.mark.parametrize("name", ["gpt-oss", "llama3.1"])
def test_two_calls_where_the_template_holds_one_are_shown_one_by_one(name: str) -> None:
    one, two = call("door", "c0"), call("key", "c1")
    results = [Message.tool("A door.", call=one), Message.tool("A key.", call=two)]
    text = shown(name, Message.assistant("", one, two), *results)
    order = [text.index(part) for part in ('"door"', "A door.", '"key"', "A key.")]
    assert order == sorted(order)
    chat = renderer(name)
    context = chat.prompt([GO], [LOOK]).ids
    bridge = chat.bridge(context, results, [LOOK])
    assert bridge is not None
    assert chat.decode(bridge.ids).index("A door.") < chat.decode(bridge.ids).index("A key.")


def test_gpt_oss_shows_a_word_before_a_call_with_the_thinking() -> None:
    said = Message.assistant("I will look.", call(), reasoning="Look first.")
    text = shown("gpt-oss", said, Message.tool("A door.", call=call()))
    assert "<|channel|>analysis<|message|>Look first.\n\nI will look.<|end|>" in text
    with pytest.raises(TemplateError):
        renderer("gpt-oss").reply(said, [LOOK])


@pytest.mark.parametrize("name", ["gemma4", "mistral"])
def test_text_is_said_before_calls_wherever_the_template_puts_it(name: str) -> None:
    chat = renderer(name)
    message = Message.assistant("I will look.", call())
    ids = chat.reply(message, [LOOK])
    assert chat.decode(ids).startswith("I will look.")
    assert chat.parse(ids, [LOOK]).text == "I will look." and "text beside calls" in chat.reports[True].note
