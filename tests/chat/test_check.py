"""The check at start: append-only templates are proven, others are named and never bridged."""

from __future__ import annotations

import logging

import pytest
from tests.support.tokenizers import CHATML_TOOLS, family_tokenizer, tiny_tokenizer, trl_template

from turnwise.chat.check import check_template, difference
from turnwise.chat.renderer import builtin_template, load_renderer
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall, ToolSchema

ADD = ToolSchema(
    name="add",
    description="Add.",
    parameters={"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
)
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("template", "kwargs", "exact"),
    [
        (CHATML_TOOLS, {}, True),
        (builtin_template("tiny"), {}, True),
        (trl_template("qwen2_5"), {}, True),
        (trl_template("qwen3_instruct_2507"), {}, True),
        (trl_template("qwen3_training"), {}, True),
        (trl_template("qwen3_training"), OFF, True),
        (trl_template("qwen3"), {}, False),
        (trl_template("qwen3"), OFF, False),
    ],
)
def test_chatml_families_are_proven(template: str, kwargs: dict[str, bool], exact: bool) -> None:
    chat = load_renderer(tiny_tokenizer(template), chat_template_kwargs=kwargs)
    report = check_template(chat, [ADD])
    assert report.bridges and report.exact is exact and report.keeps_thinking is not exact
    assert report.parallel_calls and report.messages == 11
    assert ("keep" in report.note) is not exact


# What the published tokenizers of these families add, as far as their templates write it.
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
COHERE = [f"<|{name}|>" for name in (
    "START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN",
)]  # fmt: skip
OTHERS: dict[str, tuple[list[str], str | None]] = {
    "llama3": (LLAMA, "<|begin_of_text|>"),
    "llama3_1": (LLAMA, "<|begin_of_text|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>"),
    "gemma3": (["<start_of_turn>", "<end_of_turn>"], "<bos>"),
    "phi3": (["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>"),
    "glm4moe": (["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], None),
    "deepseekv3": (["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], "<｜begin▁of▁sentence｜>"),
    "cohere": (COHERE, "<BOS_TOKEN>"),
    "smolvlm": (["<end_of_utterance>"], None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_plain_conversations_work_on_any_template(name: str) -> None:
    specials, bos = OTHERS[name]
    every = [*specials, *([bos] if bos else [])]
    chat = load_renderer(tiny_tokenizer(trl_template(name), specials=every, bos=bos))
    messages = [Message.user("Two and two?")]
    context = chat.prompt(messages).ids
    said = "</think>Four." if chat.template.opens_thinking else "Four."
    sampled = [*chat.template.encoder.encode(said), chat.stop_ids[0]]
    message = chat.parse(sampled)
    assert message == Message.assistant("Four.")
    if chat.reports[False].bridges:
        sampled = chat.reply(message)
    new = [Message.user("Sure?")]
    bridge = chat.bridge(context + sampled, new)
    whole = chat.prompt([*messages, message, *new]).ids
    if chat.reports[False].bridges:
        assert bridge is not None
        held = context + sampled + bridge.ids
        assert difference(chat, held, whole) == ("thinking" if chat.template.opens_thinking else "exact")
    else:
        assert bridge is None
    assert len(whole) > len(context)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "llama3_1", "cohere"])
def test_bridges_are_found_on_families_nobody_told_it_about(name: str) -> None:
    specials, bos = OTHERS[name]
    chat = load_renderer(tiny_tokenizer(trl_template(name), specials=[*specials, bos or ""], bos=bos))
    assert chat.reports[False].bridges and chat.reports[False].exact
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_ids[0]) == {
        "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
        "cohere": "<|END_OF_TURN_TOKEN|>",
    }[name]  # fmt: skip


REWRITES = """
{%- for message in messages %}
    {%- if message.role == 'user' and loop.index0 + 2 < messages | length %}
        {{- '<|im_start|>user\n(earlier)<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


def test_a_template_that_rewrites_is_named_and_never_bridged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chat = load_renderer(tiny_tokenizer(REWRITES))
    report = chat.reports[False]
    assert not report.bridges and not report.exact
    assert report.note.startswith("at message 3 of 6 (assistant, then user): the whole conversation has '")
    assert "(earlier)" in report.note
    assert report.note in caplog.text and "new segment" in caplog.text
    context = chat.prompt([Message.user("Go.")]).ids + chat.reply(Message.assistant("Yes."))
    assert chat.bridge(context, [Message.user("On.")]) is None


def test_a_template_that_breaks_later_names_the_later_message() -> None:
    breaks = REWRITES.replace("loop.index0 + 2 <", "loop.index0 + 4 <")
    assert breaks != REWRITES
    report = load_renderer(tiny_tokenizer(breaks)).reports[False]
    assert report.note.startswith("at message 5 of 6 (assistant, then user)")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (REWRITES, "does not write the tools that it is given"),
        (
            REWRITES.replace("{%- for", "{{- tools | tojson if tools else '' }}{%- for", 1),
            "does not write an assistant message's tool calls",
        ),
        (
            CHATML_TOOLS.replace("message.role == 'tool'", "message.role == 'nobody'"),
            "does not write tool results",
        ),
        (
            CHATML_TOOLS.replace("<tool_call>", "<call>"),
            "which no dialect reads (there are: hermes, ",
        ),
    ],
)
def test_tools_on_a_template_without_them_are_an_error(template: str, problem: str) -> None:
    chat = load_renderer(family_tokenizer(template, special=["<|im_start|>"], eos="<|im_end|>"))
    assert chat.dialect.name == "plain"
    with pytest.raises(TemplateError) as caught:
        chat.prompt([Message.user("Go.")], [ADD])
    assert problem in str(caught.value)
    assert "set model.chat_template" in str(caught.value)
    with pytest.raises(TemplateError):
        check_template(chat, [ADD])
    assert chat.prompt([Message.user("Go.")]).ids


def test_calls_that_a_template_leaves_out_are_content_to_it() -> None:
    template = REWRITES.replace("loop.index0 + 2 <", "loop.index0 + 99 <").replace(
        "{%- for", "{{- tools | tojson if tools else '' }}{%- for", 1
    )
    chat = load_renderer(tiny_tokenizer(template))
    assert chat.dialect.name == "hermes" and chat.reports[True].exact
    call = ToolCall(name="add", arguments={"a": 1, "b": "</tool_call>"}, id="call_0")
    message = Message.assistant("Well.", call)
    assert chat.parse(chat.reply(message)) == message
    assert load_renderer(tiny_tokenizer(template), dialect="hermes").tools_problem is None


def test_a_forked_template_needs_no_entry() -> None:
    fork = "{#- ours -#}\n" + trl_template("qwen3").replace("<tool_call>\\n{", "<tool_call>{ ")
    chat = load_renderer(tiny_tokenizer(fork), chat_template_kwargs={"extra": 1})
    assert chat.dialect.name == "hermes" and chat.reports[True].bridges
    message = Message.assistant("", ToolCall(name="add", arguments={"a": 1}, id="call_0"))
    assert chat.parse(chat.reply(message)) == message


def test_llama_3_1_is_checked_without_the_parallel_calls_that_it_refuses() -> None:
    specials, bos = OTHERS["llama3_1"]
    chat = load_renderer(tiny_tokenizer(trl_template("llama3_1"), specials=[*specials, bos or ""], bos=bos))
    assert not chat.template.has_parallel_calls
    assert chat.tools_problem is None and chat.dialect.name == "llama3"
    assert chat.reports[True].bridges and not chat.reports[True].parallel_calls
