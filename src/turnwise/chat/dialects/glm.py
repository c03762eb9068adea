"""The GLM dialect: GLM-4.5 and later.

    <think>It falls left.</think>
    I will look.
    <tool_call>move
    <arg_key>direction</arg_key>
    <arg_value>left</arg_value>
    <arg_key>steps</arg_key>
    <arg_value>2</arg_value>
    </tool_call>

Later models leave out the line breaks; they mean nothing. A value is all that stands between its tags, white
space too. Strings stand as they are, everything else as JSON (see `turnwise.chat.dialects.arguments`), and
nothing is escaped (see `turnwise.chat.dialects.argument_tags`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from turnwise.chat.dialects.argument_tags import ArgumentTags, made_call
from turnwise.chat.dialects.arguments import known_arguments, parameters_of, read_argument, write_argument
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, found, read_tagged
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=re.compile(r"<tool_call>\s*([^\s<>{}\[\]\"]+)"))
_NAME = re.compile(r"\s*([^\s<>{}\[\]\"]+)")
_ARGUMENTS = ArgumentTags(
    opening=r"<arg_key>(?P<key>[^<>]+)</arg_key>\s*<arg_value>",
    form="<arg_key>NAME</arg_key><arg_value>",
    closing="</arg_value>",
    ends=(CLOSE,),
    call=r"<tool_call>\s*[^\s<>{}\[\]\"]+\s*(?=<arg_key>[^<>]+</arg_key>\s*<arg_value>|</tool_call>)",
)


class GlmDialect:
    """``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>``, after thinking."""

    name = "glm"
    tags = frozenset({OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, _TAGS, partial(_read, tools=tools))
        return Message.assistant(content.rstrip("\n") if calls else content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, as the templates of GLM-4.5 and 4.6 write it."""
        arguments = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{write_argument(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        )
        return f"{OPEN}{call.name}\n{arguments}{CLOSE}"


def _read(text: str, start: int, tools: Sequence[ToolSchema]) -> tuple[list[Made], int]:
    name = _NAME.match(text, start)
    if name is None:
        raise CallFault(f"expected the tool's name, found {found(text, start)}", start)
    schema = parameters_of(name[1], tools)
    entries, end = _ARGUMENTS.read(text, name.end(), known_arguments(schema))
    return [
        made_call(name[1], entries, lambda entry: read_argument(entry[1], entry[0]["key"], schema), end)
    ], end
