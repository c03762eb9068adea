"""Replies for the tests of dialects: generated ones, written by templates, read by transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.support.tokenizers import tiny_tokenizer
from turnwise.chat.dialects.base import Dialect
from turnwise.types import Message, ToolCall, ToolSchema

NAMES = st.sampled_from(["move", "look_up", "a.b-c", "f2"])
IDENTIFIERS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True) | st.sampled_from(
    ["from", "class", "été"]
)
ASK = [{"role": "user", "content": "Hello."}]


def texts(*tags: str, without: Sequence[str] = ()) -> st.SearchStrategy[str]:
    """Any text, and text that looks like the tags of a call."""
    pieces = st.sampled_from(
        [
            *tags,
            "\n",
            " ",
            "'",
            '"',
            "\\",
            "\\n",
            "{",
            "}",
            "[",
            "]",
            "(",
            ")",
            ",",
            "=",
            ":",
            "it's",
            "漢字",
            "🙂",
        ]
    )
    any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    text = any_text | st.lists(pieces | st.sampled_from("abc"), max_size=8).map("".join)
    return text.filter(lambda found: not any(piece in found for piece in without))


def values(strings: st.SearchStrategy[str], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """JSON values."""
    numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    return st.recursive(
        st.none() | st.booleans() | numbers | strings,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=6,
    )


def calls(
    strings: st.SearchStrategy[str],
    *,
    keys: st.SearchStrategy[str] = IDENTIFIERS,
    inner_keys: st.SearchStrategy[str] | None = None,
    most: int = 3,
) -> st.SearchStrategy[list[ToolCall]]:
    """Calls of one reply, numbered as a dialect numbers them."""
    arguments = st.dictionaries(
        keys, values(strings, strings if inner_keys is None else inner_keys), max_size=3
    )
    made = st.lists(st.tuples(NAMES, arguments), max_size=most)
    return made.map(
        lambda pairs: [
            ToolCall(name=name, arguments=given, id=f"call_{index}")
            for index, (name, given) in enumerate(pairs)
        ]
    )


def same(found: Message, wanted: Message) -> bool:
    """Whether two replies are equal, ``1``, ``1.0`` and ``true`` held apart."""
    return _exact(found) == _exact(wanted)


def _exact(message: Message) -> tuple[Any, ...]:
    return (
        message.content,
        message.reasoning,
        [
            (call.id, call.name, json.dumps(dict(call.arguments), sort_keys=True), call.error, call.raw)
            for call in message.tool_calls
        ],
    )


@functools.cache
def _tokenizer(template: str) -> Any:
    return tiny_tokenizer(template, bos="<bos>")


def written(
    template: str,
    message: Message,
    *,
    tools: Sequence[ToolSchema] = (),
    thinking: str = "reasoning_content",
    **kwargs: Any,
) -> str:
    """What a template writes for a reply after its generation prompt, to the end of the text.

    Args:
        template: Jinja text.
        message: The reply.
        tools: Told to the template.
        thinking: The key that the template reads reasoning from.
        kwargs: For the template.
    """
    row = message.as_dict()
    if message.reasoning:
        row[thinking] = message.reasoning
    tokenizer = _tokenizer(template)
    schemas = [tool.as_function() for tool in tools] or None
    render = functools.partial(tokenizer.apply_chat_template, tools=schemas, tokenize=False, **kwargs)
    asked: str = render(ASK, add_generation_prompt=True)
    answered: str = render([*ASK, row], add_generation_prompt=False)
    assert answered.startswith(asked), (asked, answered)
    return answered[len(asked) :]


def peer(template: str, text: str) -> dict[str, Any]:
    """The message that transformers reads with trl's response template for this chat template."""
    from trl.chat_template_utils import add_response_schema

    tokenizer = tiny_tokenizer(template, bos="<bos>")
    add_response_schema(tokenizer)
    prefix = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    found: dict[str, Any] = tokenizer.parse_response(text, prefix=prefix)
    return found


def as_peer(message: Message, thinking: str) -> dict[str, Any]:
    """A message in the form of `peer`."""
    row = message.as_dict()
    if not row["content"]:
        del row["content"]
    if message.reasoning:
        row[thinking] = message.reasoning
    return row


def sound(dialect: Dialect, text: str, *, thinking: bool) -> Message:
    """A reply's message, after asserting what holds for every text."""
    message = dialect.parse(text, thinking=thinking)
    assert message.role == "assistant"
    assert [call.id for call in message.tool_calls] == [f"call_{i}" for i in range(len(message.tool_calls))]
    for call in message.tool_calls:
        assert (call.error is None) == (call.raw == "")
        if call.error is None:
            json.dumps(dict(call.arguments), ensure_ascii=False, allow_nan=False).encode()
        else:
            assert call.error and call.raw.strip() in text and not call.arguments
            call.error.encode()
    return message
