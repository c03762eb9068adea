"""Dialects beside transformers' `parse_response` with TRL's response templates: what both read alike."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.calls import TOOL
from tests.support.tokenizers import tiny_tokenizer, trl_template
from trl.chat_template_utils import add_response_schema

from turnwise.chat.dialects import DIALECTS
from turnwise.chat.template import common_length

Read = list[dict[str, Any]]

TYPED = ["qwen3_5_nothink", "nemotron_3_nano", "glm4moe"]
FAMILIES = {
    "qwen3": ("hermes", (), "<|im_end|>\n"),
    "qwen3_5_nothink": ("qwen_xml", (), "<|im_end|>\n"),
    "qwen3_8": ("qwen_xml", (), "<|im_end|>\n"),
    "nemotron_3_nano": ("qwen_xml", (), "<|im_end|>\n"),
    "glm4moe": ("glm", ("<|user|>", "<|assistant|>", "<|observation|>"), ""),
    "llama3_1": ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


def read(family: str, *arguments: dict[str, Any]) -> tuple[Read, Read]:
    """The arguments of calls that the family's own template wrote, as we and as transformers read them."""
    name, specials, end = FAMILIES[family]
    tokenizer = tiny_tokenizer(trl_template(family), specials=specials, bos="<s>")
    add_response_schema(tokenizer)
    schema = TOOL.as_function()
    asked = [{"role": "user", "content": "Hello."}]
    calls = [{"type": "function", "function": {"name": TOOL.name, "arguments": each}} for each in arguments]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    prompt = tokenizer.apply_chat_template(asked, tools=[schema], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, said], tools=[schema], tokenize=False)
    prefix = prompt[: common_length(prompt, whole)]
    text = whole.removeprefix(prefix)
    opened = prefix.rstrip().endswith("<think>")
    ours = DIALECTS[name].parse(text.removesuffix(end), thinking=opened, tools=[TOOL])
    theirs = tokenizer.parse_response(text, prefix=prefix, tools=[schema])
    return (
        [dict(call.arguments) for call in ours.tool_calls if call.error is None],
        [call["function"]["arguments"] for call in theirs.get("tool_calls", ())],
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"text": "left"}, {"text": ""}, {"text": "7"}, {"text": "null"}, {"text": "Ünï\n\n漢字 <b>"},
        {"count": -3}, {"size": 2.5}, {"size": 3}, {"size": 1e22}, {"fast": True}, {"fast": False},
        {"items": [1, ["a", None]]}, {"options": {"a": {"b": [True]}}}, {"limit": None}, {"limit": 4},
        {"text": "left", "more": '{"a": 1}', "count": 0},
    ],
)  # fmt: skip
def test_well_formed_calls_are_read_alike(family: str, arguments: dict[str, Any]) -> None:
    ours, theirs = read(family, arguments)
    assert ours == theirs == [arguments]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama3_1"}))
def test_parallel_calls_are_read_alike(family: str) -> None:
    ours, theirs = read(family, {"text": "left"}, {}, {"count": 3})
    assert ours == theirs == [{"text": "left"}, {}, {"count": 3}]


@pytest.mark.parametrize("family", TYPED)
@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        (" left ", {"text": "left"}),
        ("a </parameter> b </arg_value> c", None),
        ("a </tool_call> b", {}),
    ],
)
def test_what_they_lose_we_keep(family: str, text: str, theirs: dict[str, Any] | None) -> None:
    """White space at a value's ends, and closing tags inside of it: here theirs is not what was said."""
    ours, read_by_them = read(family, {"text": text})
    assert ours == [{"text": text}]
    assert read_by_them != ours and (theirs is None or read_by_them == [theirs])


@pytest.mark.parametrize("family", TYPED)
def test_what_no_schema_names_is_a_value_here_and_text_there(family: str) -> None:
    assert read(family, {"unknown": 7}) == ([{"unknown": 7}], [{"unknown": "7"}])
