"""The DeepSeek dialects: calls between tokens of their own, all of them in one section.

V3 and R1 (``deepseek_v3``):

    I will look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>move
    ```json
    {"direction": "left"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 (``deepseek_v31``):

    …<｜tool▁call▁begin｜>move<｜tool▁sep｜>{"direction": "left"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.2 (``deepseek_dsml``), strings as they are and all else as JSON:

    I will look.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="move">
    <｜DSML｜parameter name="direction" string="true">left</｜DSML｜parameter>
    <｜DSML｜parameter name="steps" string="false">2</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

The tokens around the section say nothing that those around each call do not: a reply that was cut after a
call has made that call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from turnwise.chat.dialects.argument_tags import ArgumentTags, Entry, made_call
from turnwise.chat.dialects.arguments import known_arguments, parameters_of, write_argument
from turnwise.chat.dialects.json_text import read_value, skip_space, write_arguments
from turnwise.chat.dialects.tagged import (
    CallFault,
    Made,
    Tags,
    found,
    malformed,
    read_json,
    read_tagged,
    sound,
)
from turnwise.chat.thinking import split_thinking
from turnwise.types import Message, ToolCall, ToolSchema

SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
DSML_SECTION, DSML_SECTION_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
DSML_CALL, DSML_CALL_END = "<｜DSML｜invoke", "</｜DSML｜invoke>"

_V3_HEAD = re.compile(rf"\s*function\s*{SEPARATOR}\s*([^\s`{{}}<>]+)\s*```json\b")
_V3_TAIL = re.compile(r"\s*```")
_V31_HEAD = re.compile(rf"\s*([^\s`{{}}<>]+)\s*{SEPARATOR}")
_DSML_HEAD = re.compile(r'\s+name="([^"\n]+)">')
_DSML_PARAMETERS = ArgumentTags(
    opening=r'<｜DSML｜parameter name="(?P<key>[^"\n]+)" string="(?P<string>true|false)">',
    form='<｜DSML｜parameter name="NAME" string="true|false">',
    closing="</｜DSML｜parameter>",
    ends=(DSML_CALL_END,),
    call=rf'{DSML_CALL} name="[^"\n]+">\s*(?=<｜DSML｜parameter name=|{DSML_CALL_END})',
)


class SectionDialect:
    """Calls between tags, in a section of its own at the reply's end.

    Args:
        name: Of the dialect.
        section: The tags around all calls.
        tags: The tags around one call.
        tokens: All tokens that a call is written with.
        read: Reads a call after its opening tag.
        write: The text of a call between its tags.
    """

    def __init__(
        self,
        name: str,
        *,
        section: tuple[str, str],
        tags: Tags,
        tokens: frozenset[str],
        read: Callable[[str, int, Sequence[ToolSchema]], tuple[Sequence[Made], int]],
        write: Callable[[ToolCall], str],
    ) -> None:
        self.name = name
        self.tags = tokens
        self._section, self._tags, self._read, self._write = section, tags, read, write

    def parse(self, text: str, *, thinking: bool = False, tools: Sequence[ToolSchema] = ()) -> Message:
        """A reply's message. Text beside the calls is the content; see `Dialect.parse`."""
        reasoning, text = split_thinking(text, opened=thinking)
        content, calls = read_tagged(text, self._tags, lambda text, start: self._read(text, start, tools))
        if not calls and self._section[0] in text:
            content, opening, said = text.partition(self._section[0])
            error = f"{self._tags.opening} is missing after {opening}"
            calls = [malformed(opening + said.rstrip(), error, 0, self._tags.name)]
        if calls:
            for tag in self._section:
                content = content.replace(tag, "")
            content = content.rstrip("\n")
        return Message.assistant(content, *calls, reasoning=reasoning)

    def format(self, call: ToolCall) -> str:
        """The text of one call, without its section."""
        return f"{self._tags.opening}{self._write(call)}{self._tags.closing}"


def _read_v3(text: str, start: int, _: Sequence[ToolSchema]) -> tuple[list[Made], int]:
    head = _V3_HEAD.match(text, start)
    if head is None:
        raise CallFault(f"expected function{SEPARATOR}NAME and ```json, found {found(text, start)}", start)
    made, end = _read_arguments(text, head)
    tail = _V3_TAIL.match(text, end)
    if tail is None:
        raise CallFault(f"expected ``` after the arguments, found {found(text, end)}", end)
    return [made], tail.end()


def _read_v31(text: str, start: int, _: Sequence[ToolSchema]) -> tuple[list[Made], int]:
    head = _V31_HEAD.match(text, start)
    if head is None:
        raise CallFault(f"expected NAME{SEPARATOR}, found {found(text, start)}", start)
    made, end = _read_arguments(text, head)
    return [made], end


def _read_arguments(text: str, head: re.Match[str]) -> tuple[Made, int]:
    arguments, end = read_json(text, head.end())
    return sound(head[1], arguments, end), end


def _read_dsml(text: str, start: int, tools: Sequence[ToolSchema]) -> tuple[list[Made], int]:
    head = _DSML_HEAD.match(text, start)
    if head is None:
        raise CallFault(f'expected name="NAME">, found {found(text, start)}', start)
    known = known_arguments(parameters_of(head[1], tools))
    entries, end = _DSML_PARAMETERS.read(text, head.end(), known)
    return [made_call(head[1], entries, _dsml_value, end)], end


def _dsml_value(entry: Entry) -> Any:
    opening, text = entry
    if opening["string"] == "true":
        return text
    value, end = read_value(text, skip_space(text, 0))
    if text[end:].strip():
        raise ValueError(f"there is text after the value: {found(text, end)}")
    return value


def _write_v3(call: ToolCall) -> str:
    return f"function{SEPARATOR}{call.name}\n```json\n{write_arguments(call)}\n```"


def _write_v31(call: ToolCall) -> str:
    return f"{call.name}{SEPARATOR}{write_arguments(call)}"


def _write_dsml(call: ToolCall) -> str:
    parameters = [
        f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{write_argument(value)}</｜DSML｜parameter>\n"
        for key, value in call.arguments.items()
    ]
    return f' name="{call.name}">\n{"".join(parameters)}'


_TOKENS = frozenset({SECTION, SECTION_END, CALL, CALL_END, SEPARATOR})

DEEPSEEK_V3 = SectionDialect(
    "deepseek_v3",
    section=(SECTION, SECTION_END),
    tags=Tags(opening=CALL, closing=CALL_END, name=re.compile(rf"{SEPARATOR}\s*([^\s`{{}}<>]+)")),
    tokens=_TOKENS,
    read=_read_v3,
    write=_write_v3,
)
DEEPSEEK_V31 = SectionDialect(
    "deepseek_v31",
    section=(SECTION, SECTION_END),
    tags=Tags(opening=CALL, closing=CALL_END, name=re.compile(rf"([^\s`{{}}<>｜]+)\s*{SEPARATOR}")),
    tokens=_TOKENS,
    read=_read_v31,
    write=_write_v31,
)
DEEPSEEK_DSML = SectionDialect(
    "deepseek_dsml",
    section=(DSML_SECTION, DSML_SECTION_END),
    tags=Tags(opening=DSML_CALL, closing=DSML_CALL_END, name=re.compile(r'name="([^"\n]+)"')),
    tokens=frozenset({"｜DSML｜"}),
    read=_read_dsml,
    write=_write_dsml,
)
