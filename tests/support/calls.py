"""What the tests of every dialect share: a tool with arguments of all types, values for them, invariants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from turnwise.chat.dialects import Dialect
from turnwise.types import Message, ToolCall, ToolSchema

TOOL = ToolSchema(
    name="run",
    description="Run something.",
    parameters={
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "more": {"type": "string"},
            "count": {"type": "integer"},
            "size": {"type": "number"},
            "fast": {"type": "boolean"},
            "items": {"type": "array"},
            "options": {"type": "object"},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
    },
)

# Every character but halves of one, control characters, and what tokenizers may normalise.
plain_text = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)


def json_values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Nested JSON values."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | finite | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    )


def arguments(fragments: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `TOOL`, whose texts are full of what the dialect itself writes.

    A letter stands between fragments: texts that are the form of a call to the letter are ambiguous.
    """
    text = plain_text | st.lists(st.sampled_from(fragments), max_size=5).map("x".join)
    values = json_values(text)
    return st.fixed_dictionaries(
        {},
        optional={
            "text": text,
            "more": text,
            "count": st.integers(),
            "size": finite | st.integers(),
            "fast": st.booleans(),
            "items": st.lists(values, max_size=3),
            "options": st.dictionaries(text, values, max_size=3),
            "limit": st.none() | st.integers(),
        },
    )


def calls(fragments: Sequence[str], *, most: int = 3) -> st.SearchStrategy[tuple[ToolCall, ...]]:
    """Calls of `TOOL`, with the ids that parsing gives them."""
    return st.lists(arguments(fragments), min_size=1, max_size=most).map(
        lambda made: tuple(
            ToolCall(name=TOOL.name, arguments=each, id=f"call_{index}") for index, each in enumerate(made)
        )
    )


def any_text(fragments: Sequence[str]) -> st.SearchStrategy[str]:
    """Text of fragments in any order, half characters too."""
    return st.lists(
        st.sampled_from([*fragments, "\ud800", "\n", " "]) | st.text(max_size=5), max_size=14
    ).map("".join)


def check_sound(dialect: Dialect, text: str, *, thinking: bool = False) -> Message:
    """Parse any text: it never raises, numbers its calls, and says of malformed ones what was said."""
    message = dialect.parse(text, thinking=thinking, tools=[TOOL])
    assert message.role == "assistant"
    assert [call.id for call in message.tool_calls] == [f"call_{i}" for i in range(len(message.tool_calls))]
    for call in message.tool_calls:
        assert (call.error is None) == (call.raw == "")
        if call.error is not None:
            assert call.error and dict(call.arguments) == {} and call.raw in text
    assert message == dialect.parse(text, thinking=thinking, tools=[TOOL])
    return message
