"""The XML dialect of Qwen3-Coder, Qwen3.5 and later, and Nemotron 3.

    I will look.

    <tool_call>
    <function=move>
    <parameter=direction>
    left
    </parameter>
    <parameter=steps>
    2
    </parameter>
    </function>
    </tool_call>

A value is bare text; one line break at each end of it belongs to the form, all other white space to the
value. Strings stand as they are, everything else as JSON (see `turnwise.chat.dialects.arguments`), and
nothing is escaped (see `turnwise.chat.dialects.argument_tags`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from turnwise.chat.dialects.argument_tags import ArgumentTags, Entry, made_call
from turnwise.chat.dialects.arguments import known_arguments, parameters_of, read_argument, write_argument
from turnwise.chat.dialects.tagged import CallFault, Made, Tags, found, malformed, read_tagged
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAGS = Tags(opening=OPEN, closing=CLOSE, name=re.compile(r"<function=([^\n>]+)"))
_FUNCTION = re.compile(r"\s*<function=([^\n>]+)>")
_BARE_FUNCTION = re.compile(r"^<function=[^\n>]+>", re.MULTILINE)
_PARAMETERS = ArgumentTags(
    opening=r"<parameter=(?P<key>[^\n>]+)>",
    form="<parameter=NAME>",
    closing="</parameter>",
    ends=("</function>", CLOSE),
    call=r"<tool_call>\s*<function=[^\n>]+>\s*(?=<parameter=|</function>)",
    begins=r"<function=[^\n>]+>",
    due=r"^<parameter=(?P<key>[^\n>]+)>\n",
)


class QwenXmlDialect:
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>``."""

    name = "qwen_xml"
    tags = frozenset({OPEN, CLOSE})

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, _TAGS, partial(_read, tools=tools))
        # Models of this family forget the tag before a call; the call must not pass for an answer.
        bare = _BARE_FUNCTION.search(content)
        if bare is not None:
            before, raw = content[: bare.start()], content[bare.start() :]
            after = ""
            while raw not in text:  # It goes on behind another call, with which it has nothing to do.
                raw, _, piece = raw.rpartition("\n")
                after = f"\n{piece}{after}"
            calls.append(malformed(raw, f"{OPEN} is missing", len(calls), _TAGS.name))
            content = f"{before}{after}"
        return Message.assistant(content.rstrip("\n") if calls else content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, as the templates of this dialect write it."""
        parameters = "".join(
            f"<parameter={key}>\n{write_argument(value)}\n</parameter>\n"
            for key, value in call.arguments.items()
        )
        return f"{OPEN}\n<function={call.name}>\n{parameters}</function>\n{CLOSE}"


def _read(text: str, start: int, tools: Sequence[ToolSchema]) -> tuple[list[Made], int]:
    function = _FUNCTION.match(text, start)
    if function is None:
        raise CallFault(f"expected <function=NAME>, found {found(text, start)}", start)
    name = function[1]
    schema = parameters_of(name, tools)
    entries, end = _PARAMETERS.read(text, function.end(), known_arguments(schema))

    def value(entry: Entry) -> Any:
        return read_argument(entry[1].removeprefix("\n").removesuffix("\n"), entry[0]["key"], schema)

    return [made_call(name, entries, value, end)], end
