"""``turnwise env play``: one episode by hand. What is typed becomes a reply:

move left                    a call, its arguments in order
move direction=left          a call, its arguments by name
{"name": "move", "arguments": {"direction": "left"}}
anything else                plain text; /say TEXT for text that begins with a tool's name
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from turnwise.envs.play import Play
from turnwise.envs.session import EnvSpec
from turnwise.envs.validate import call_form
from turnwise.errors import EnvError, TaskError
from turnwise.types import Message, StopReason, Task, ToolCall, ToolSchema

HELP = "/say TEXT for plain text, /teacher to ask the teacher, /tools, /quit"
ENDINGS = {
    StopReason.TERMINATED: "the task is over",
    StopReason.ANSWERED: "a reply without a tool call ends it",
    StopReason.ENV_TRUNCATED: "the environment cut it short",
    StopReason.MAX_TURNS: "no turns are left",
    StopReason.MAX_TOOL_CALLS: "no tool calls are left",
}


class InputError(ValueError):
    """What was typed cannot be read; the message says why."""


def read_reply(line: str, tools: Sequence[ToolSchema]) -> Message:
    """The reply that a typed line stands for.

    Raises:
        InputError: It begins as a call and is none.
    """
    line = line.strip()
    if line.startswith("/say"):
        return Message.assistant(line[4:].strip())
    if line.startswith("{"):
        return _from_json(line, tools)
    name, _, rest = line.partition(" ")
    schema = next((tool for tool in tools if tool.name == name), None)
    if schema is None:
        return Message.assistant(line)
    return Message.assistant("", ToolCall(name=name, arguments=_arguments(rest, schema)))


def _from_json(line: str, tools: Sequence[ToolSchema]) -> Message:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    if isinstance(value.get("name"), str) and isinstance(value.get("arguments", {}), dict):
        return Message.assistant("", ToolCall(name=value["name"], arguments=value.get("arguments", {})))
    if len(tools) == 1:
        return Message.assistant("", ToolCall(name=tools[0].name, arguments=value))
    raise InputError('a call in JSON is {"name": "…", "arguments": {…}}')


def _arguments(text: str, schema: ToolSchema) -> dict[str, Any]:
    """The arguments in ``text``, in order or by name; the last one in order takes the rest of the line."""
    properties: Mapping[str, Any] = schema.parameters.get("properties", {})
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{error}: put text with quotes or blanks into quotes, or write JSON") from error
    out: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in properties:
            out[name] = _value(value, properties[name])
            continue
        free = [name for name in properties if name not in out]
        if free:
            out[free[0]] = _value(word, properties[free[0]])
        elif out and isinstance(out[last := list(out)[-1]], str):
            out[last] += f" {word}"
        else:
            raise InputError(f"{word!r} is one too many: {call_form(schema)}")
    return out


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """Typed text as the JSON value that the schema may take; whether it does is the environment's to say."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


class Game:
    """One game of a person against an environment.

    Args:
        spec: The environment.
        show_teacher: Say before each reply what the teacher would say; an empty line then says it.
        console: Where to write.
    """

    def __init__(self, spec: EnvSpec, *, show_teacher: bool = False, console: Console | None = None) -> None:
        self.spec, self.show_teacher = spec, show_teacher
        self.console = console or Console(highlight=False)
        self.typed = sys.stdin.isatty()
        """Whether a person types; piped lines are shown as they are read."""

    async def play(self, *, split: str, index: int, seed: int) -> float | None:
        """Play row ``index`` of ``split``; returns the reward, None if the game was left.

        Raises:
            TaskError: There is no such row.
            EnvError: The environment failed.
        """
        task = self._row(split, index)
        session = await self.spec.open(self.spec.limits)
        try:
            play = Play(session, self.spec.limits)
            first = await play.start(task, seed)
            self._line(f"{self.spec.name}", "bold", f"  {split} row {index}, seed {seed}")
            self._show_tools(session.tools, session.has_step)
            for message in first:
                self._show(message)
            while play.stop is None:
                reply = await self._ask(play)
                if reply is None:
                    self._line("left the game", "yellow", f" after {play.turns} turns")
                    return None
                paid = play.paid or 0.0
                for message in await play.say(reply):
                    self._show(message)
                if (gain := (play.paid or 0.0) - paid) != 0:
                    self._line(f"  {gain:+g}", "green" if gain > 0 else "red")
            reward = await play.reward()
        finally:
            await session.close()
        shown = "none" if reward is None else f"{reward:g}"
        turns = f"{play.turns} turn{'s' if play.turns != 1 else ''}"
        self._line(f"reward {shown}", "bold green" if reward and reward > 0 else "bold yellow",
                   f"  {ENDINGS.get(play.stop, play.stop)}, {turns}")  # fmt: skip
        return reward

    def _row(self, split: str, index: int) -> Task:
        rows = list(islice(self.spec.tasks(split), index + 1))
        if len(rows) <= index:
            raise TaskError(f"split {split!r} has {len(rows)} rows; there is no row {index} (from 0)")
        return rows[index]

    async def _ask(self, play: Play) -> Message | None:
        """The next reply; None when there will be none."""
        suggestion: Message | None = None
        if self.show_teacher:
            suggestion = await self._teacher(play)
        while True:
            line = self._read()
            if line is None or line.strip() in ("/quit", "/q"):
                return None
            match line.strip():
                case "" if suggestion is not None:
                    return suggestion
                case "":
                    continue
                case "/teacher":
                    suggestion = await self._teacher(play) or suggestion
                case "/tools":
                    self._show_tools(play.session.tools, play.session.has_step)
                case "/help" | "/h" | "?":
                    self._line(HELP, "dim")
                case text:
                    try:
                        return read_reply(text, play.session.tools)
                    except InputError as error:
                        self._line(f"  {error}", "red")

    async def _teacher(self, play: Play) -> Message | None:
        try:
            said = await play.session.teacher(play.messages)
        except EnvError as error:
            self._line(f"  {error}", "yellow")
            self.show_teacher = False
            return None
        self._line("  teacher: ", "dim", describe_reply(said), "cyan")
        return said

    def _read(self) -> str | None:
        if self.typed:
            try:
                return self.console.input(Text("› ", style="bold cyan"))
            except EOFError:
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        self._line("› ", "bold cyan", line.rstrip("\n"))
        return line

    def _show(self, message: Message) -> None:
        # An escape sequence in an observation is shown, not obeyed.
        text = (message.text or "(nothing)").replace("\x1b", "␛")
        self._indented(text, 2, "dim" if message.role == "system" else "")

    def _show_tools(self, tools: Sequence[ToolSchema], has_step: bool) -> None:
        for tool in tools:
            self._line(f"  {call_form(tool)}", "cyan")
            if tool.description:
                self._indented(tool.description.splitlines()[0], 4, "dim")
        if not tools or has_step:
            self._line("  answer in plain text", "cyan")
        self._line(f"  {HELP}", "dim")

    def _indented(self, text: str, columns: int, style: str) -> None:
        self.console.print(Padding(Text(text, style=style), (0, 0, 0, columns), expand=False))

    def _line(self, text: str, style: str, rest: str = "", rest_style: str = "") -> None:
        self.console.print(Text.assemble((text, style), (rest, rest_style)), soft_wrap=True)


def describe_reply(message: Message) -> str:
    """A reply as it could be typed."""
    calls = [
        " ".join([call.name, *(f"{key}={_typed(value)}" for key, value in call.arguments.items())])
        for call in message.tool_calls
    ]
    return "; ".join([*([message.text] if message.text else []), *calls]) or "(nothing)"


def _typed(value: Any) -> str:
    return shlex.quote(value) if isinstance(value, str) else json.dumps(value)
