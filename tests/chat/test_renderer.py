"""The renderer's edges: demonstrations, odd ids, errors, fingerprints, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import CHATML_TOOLS, tiny_tokenizer, trl_template

from turnwise.chat.renderer import TemplateRenderer, builtin_template, load_renderer
from turnwise.errors import TemplateError
from turnwise.types import ImageBlock, Message, TextBlock, ToolCall, ToolSchema

QWEN3 = load_renderer(tiny_tokenizer(trl_template("qwen3")))
CHATML = load_renderer(tiny_tokenizer())
MOVE = ToolSchema(
    name="move",
    description="Move. Never write <|im_end|>.",
    parameters={"type": "object", "properties": {"direction": {"type": "string"}}},
)


def test_prompt_is_the_templates_own_rendering() -> None:
    messages = [Message.system("Be brief."), Message.user("Hi, 漢字.")]
    tool = ToolSchema(name="move", description="Move.", parameters=MOVE.parameters)
    rows = [{"role": m.role, "content": m.text} for m in messages]
    wanted = QWEN3.tokenizer.apply_chat_template(
        rows, tools=[tool.as_function()], add_generation_prompt=True, return_dict=False
    )
    assert QWEN3.prompt(messages, [tool]).ids == wanted
    assert all(type(index) is int for index in QWEN3.prompt(messages, [tool]).ids)


def test_control_tokens_in_a_tools_description_are_text() -> None:
    ids = CHATML.prompt([Message.user("Go.")], [MOVE]).ids
    assert ids.count(CHATML.template.encoder.added["<|im_end|>"]) == 2


def test_a_demonstration_is_what_follows_the_generation_prompt() -> None:
    call = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
    message = Message.assistant("Left.", call, reasoning="It falls left.")
    assert QWEN3.decode(QWEN3.reply(message)) == (
        "<think>\nIt falls left.\n</think>\n\nLeft.\n"
        '<tool_call>\n{"name": "move", "arguments": {"direction": "left"}}\n</tool_call><|im_end|>'
    )
    assert QWEN3.parse(QWEN3.reply(message)) == message


def test_a_generation_prompt_that_opens_thinking_is_read_so() -> None:
    opening = trl_template("qwen3").replace(
        "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}"
    )
    chat = load_renderer(tiny_tokenizer(opening))
    assert chat.template.opens_thinking and chat.reports[True].bridges
    message = Message.assistant("Left.", reasoning="Hm.")
    assert chat.decode(chat.reply(message)) == "Hm.\n</think>\n\nLeft.<|im_end|>"
    assert chat.parse(chat.reply(message)) == message
    assert chat.parse(chat.template.encoder.encode("Hm, still")) == Message.assistant(
        "", reasoning="Hm, still"
    )


def test_malformed_calls_are_demonstrated_and_shown_as_they_were_said() -> None:
    raw = '<tool_call>\n{"name": "move", "argum\n</tool_call>'
    good = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
    bad = ToolCall(name="move", arguments={}, id="call_1", error="broken", raw=raw)
    ids = CHATML.reply(Message.assistant("Well.", good, bad))
    said = CHATML.parse(ids)
    assert said.content == "Well." and said.tool_calls[0] == good
    assert said.tool_calls[1].raw == raw and said.tool_calls[1].error is not None
    tag = CHATML.template.encoder.added["<tool_call>"]
    assert ids.count(tag) == 2
    shown = CHATML.prompt([Message.user("Go."), Message.assistant("", bad), Message.user("What?")]).ids
    assert shown.count(tag) == 1 and raw in CHATML.decode(shown)


def test_thinking_off_cannot_demonstrate_thinking() -> None:
    chat = load_renderer(
        tiny_tokenizer(trl_template("qwen3")), chat_template_kwargs={"enable_thinking": False}
    )
    with pytest.raises(TemplateError, match="is thinking off"):
        chat.reply(Message.assistant("Left.", reasoning="Hm."))


@pytest.mark.parametrize(
    "message",
    [
        Message.assistant("<think>no</think> yes"),
        Message.assistant("", ToolCall(name="move", arguments={"x": float("nan")})),
        Message.user("Hello."),
    ],
)
def test_what_would_be_read_back_differently_cannot_be_demonstrated(message: Message) -> None:
    with pytest.raises(TemplateError):
        CHATML.reply(message)


def test_a_call_that_is_only_mentioned_is_text() -> None:
    mentioned = Message.assistant('See <tool_call>\n{"name": "move", "arguments": {}}\n</tool_call>.')
    ids = CHATML.reply(mentioned)
    assert CHATML.template.encoder.added["<tool_call>"] not in ids
    assert CHATML.parse(ids) == mentioned
    called = CHATML.template.encoder.encode(mentioned.text)
    assert CHATML.decode(called) == CHATML.decode(ids[:-1]) and len(CHATML.parse(called).tool_calls) == 1
    argument = ToolCall(name="move", arguments={"to": ["</tool_call><|im_end|>"]}, id="call_0")
    assert CHATML.parse(CHATML.reply(Message.assistant("", argument))).tool_calls == (argument,)


def test_template_that_drops_reasoning_refuses_to_demonstrate_it() -> None:
    with pytest.raises(TemplateError, match="read back differently"):
        CHATML.reply(Message.assistant("Left.", reasoning="Hm."))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=60))
def test_parse_takes_any_ids(ids: list[int]) -> None:
    for chat in (CHATML, QWEN3):
        message = chat.parse(ids)
        assert message.role == "assistant"


def test_parse_leaves_out_one_stop_token_alone() -> None:
    end = CHATML.stop_ids[0]
    ids = CHATML.template.encoder.encode("a")
    assert CHATML.parse([*ids, end]) == Message.assistant("a") == CHATML.parse(ids)
    assert CHATML.parse([]) == CHATML.parse([end]) == Message.assistant("")


def test_blocks_of_text_are_joined_and_images_refused() -> None:
    blocks = Message.user((TextBlock(text="a"), TextBlock(text="b")))
    assert CHATML.prompt([blocks]).ids == CHATML.prompt([Message.user("ab")]).ids
    with pytest.raises(TemplateError, match="a user message holds an image"):
        CHATML.prompt([Message.user((ImageBlock(sha256="0" * 64),))])


def test_errors_name_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"has no chat template; set model\.chat_template"):
        load_renderer(tiny_tokenizer(None))
    with pytest.raises(TemplateError, match="'hermse' is unknown; there are: hermes"):
        load_renderer(tiny_tokenizer(), dialect="hermse")
    with pytest.raises(TemplateError, match="cannot be read"):
        load_renderer(tiny_tokenizer(), chat_template=tmp_path / "none.jinja")
    with pytest.raises(TemplateError, match="cannot be loaded"):
        load_renderer(tmp_path)
    with pytest.raises(TemplateError, match="UndefinedError"):
        load_renderer(tiny_tokenizer("{{ messages[0].nothing.at_all }}"))
    with pytest.raises(TemplateError, match="does not write the text of a user's message"):
        load_renderer(tiny_tokenizer("{{ 'constant' }}"))
    with pytest.raises(TemplateError, match="there are: tiny"):
        builtin_template("huge")


def test_loads_from_a_directory_and_a_template_file(tmp_path: Path) -> None:
    tiny_tokenizer(None).save_pretrained(tmp_path)
    file = tmp_path / "own.jinja"
    file.write_text(CHATML_TOOLS, encoding="utf-8")
    loaded = load_renderer(tmp_path, chat_template=str(file))
    assert loaded.prompt([Message.user("Hi.")]).ids == CHATML.prompt([Message.user("Hi.")]).ids
    assert loaded.stop_ids == CHATML.stop_ids


def test_stop_ids_are_the_templates_end_and_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    chat = load_renderer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>", "<|endoftext|>"]


def test_fingerprint_follows_everything_that_changes_tokens() -> None:
    def fingerprint(template: str = CHATML_TOOLS, **kwargs: bool) -> str:
        return load_renderer(tiny_tokenizer(template), chat_template_kwargs=kwargs).fingerprint

    same = fingerprint()
    assert fingerprint() == same == CHATML.fingerprint
    others = {
        fingerprint(CHATML_TOOLS + "\n"),
        fingerprint(enable_thinking=False),
        load_renderer(tiny_tokenizer(texts=["zebra " * 9])).fingerprint,
        load_renderer(tiny_tokenizer(CHATML_TOOLS.replace("<tool_call>", "<call>"))).fingerprint,
    }
    assert len(others) == 4 and same not in others


def test_the_tokenizers_own_response_template_reads_what_no_dialect_does() -> None:
    from trl.chat_template_utils import qwen3_5_template

    # Qwen3.5 in all but the names of its tags.
    tokenizer = tiny_tokenizer(trl_template("qwen3_5_nothink").replace("tool_call>", "act>"))
    assert load_renderer(tokenizer).dialect.name == "plain"
    tokenizer.response_template = json.loads(json.dumps(qwen3_5_template).replace("tool_call>", "act>"))
    chat = load_renderer(tokenizer)
    assert chat.dialect.name == "response_template" and chat.reports[True].bridges
    call = ToolCall(name="move", arguments={"direction": "left"}, id="call_0")
    assert chat.parse(chat.reply(Message.assistant("", call))) == Message.assistant("", call)
    for text in ("<act>", "<act>\n<function=move>\n<parameter=x>", "</act>", "plain"):
        assert chat.parse(chat.template.encoder.encode(text)).role == "assistant"


def test_the_tiny_template_says_little() -> None:
    chat = load_renderer(tiny_tokenizer(builtin_template("tiny")))
    call = ToolCall(name="move", arguments={"direction": "right"}, id="call_0")
    ids = chat.prompt([Message.user("ball 3 paddle 1 rows 4")], [MOVE]).ids
    ids += chat.reply(Message.assistant("", call))
    bridge = chat.bridge(ids, [Message.tool("ball 3 paddle 2 rows 3", call=call)], [MOVE])
    assert bridge is not None
    assert chat.decode(ids + bridge.ids) == (
        "<|im_start|>system\nmove(direction)<|im_end|>"
        "<|im_start|>user\nball 3 paddle 1 rows 4<|im_end|>"
        '<|im_start|>assistant\n<tool_call>{"name":"move","arguments":{"direction":"right"}}</tool_call><|im_end|>'
        "<|im_start|>tool\nball 3 paddle 2 rows 3<|im_end|><|im_start|>assistant\n"
    )
    two = ToolSchema(name="say", description="", parameters={"properties": {"a": {}, "b": {}}})
    prompt = chat.prompt([Message.system("Be brief."), Message.user("Hi.")], [MOVE, two])
    assert chat.decode(prompt.ids) == (
        "<|im_start|>system\nBe brief.\nmove(direction)\nsay(a,b)<|im_end|>"
        "<|im_start|>user\nHi.<|im_end|><|im_start|>assistant\n"
    )
    assert chat.decode(chat.prompt([Message.user("Hi.")]).ids).startswith("<|im_start|>user\nHi.")


def test_importing_the_room_brings_in_neither_torch_nor_transformers() -> None:
    code = (
        "import pkgutil, importlib, sys, turnwise.chat as room\n"
        "for m in pkgutil.iter_modules(room.__path__): importlib.import_module('turnwise.chat.' + m.name)\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_a_renderer() -> None:
    from turnwise.chat.base import Renderer

    chat: Renderer = CHATML
    assert isinstance(chat, TemplateRenderer)
