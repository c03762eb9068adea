"""`ChatTemplate`: a tokenizer's Jinja template as a function from messages to text, and what it does.

Nothing here knows any family of templates. What has to be known (what ends a turn, what asks for a reply,
whether tools, thinking and tool results are written at all) is found by rendering small conversations and
looking.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turnwise.chat.dialects.base import Dialect
from turnwise.chat.encoding import Encoder
from turnwise.chat.thinking import opens_thinking
from turnwise.chat.vision import hashes_of
from turnwise.errors import TemplateError, boundary
from turnwise.types import ImageBlock, Message, Role, ToolCall, ToolSchema

# Plain words that no template writes and no tokenizer holds as an added token. Templates that trim, quote or
# escape what they are given leave them whole.
PROBE = "xqzprobexqz"
SLOT = "xqzslotxqz"
PROBE_TOOL = ToolSchema(
    name="xqztoolxqz",
    description="Look something up.",
    parameters={
        "type": "object",
        "properties": {"key": {"type": "string", "description": "What to look up."}},
        "required": ["key"],
    },
)


def probe_call(key: str = PROBE, *, name: str = PROBE_TOOL.name, id: str = "call00000") -> ToolCall:
    """A call of the probe tool. Its id has nine characters, as some templates demand."""
    return ToolCall(name=name, arguments={"key": key}, id=id)


QUESTION = (Message.user("Hello."),)
"""What probing replies answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How messages are handed to a template, where templates differ."""

    blocks: bool = False
    """Contents are lists of blocks."""
    thinking: str = "reasoning_content"
    """The key of a reply's reasoning."""
    arguments: type = dict
    """A call's arguments: a dict, or the text of its JSON."""
    content: str | None = ""
    """The content of a reply that only calls."""
    nine: bool = False
    """Call ids are of nine letters and digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What stands after a reply."""

    sampled: str
    """The token that the policy ends it with."""
    past: str
    """The token that stands there once the conversation has gone on."""
    borrowed: bool = False
    """Nothing of its own ends a reply: the token begins what follows (GLM's ``<|user|>``)."""
    spare: str = ""
    """What the template writes after a last reply, and leaves out when the conversation goes on."""


class ChatTemplate:
    """Renders messages to text in which control tokens from content are marked (see
    `turnwise.chat.encoding`).

    Args:
        tokenizer: Whose template machinery renders; a tokenizer of ``transformers``.
        source: The template's Jinja text; None takes the tokenizer's own.
        kwargs: Handed to every rendering (``enable_thinking``).
        image_token: What it writes for an image; None where images cannot be read.

    Raises:
        TemplateError: There is no template, or it cannot render even one user message.
    """

    def __init__(
        self, tokenizer: Any, source: str | None, kwargs: Mapping[str, Any], image_token: str | None = None
    ) -> None:
        own = tokenizer.chat_template
        if not (source or own):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise TemplateError(
                f"the tokenizer {name} has no chat template; set model.chat_template to a Jinja file "
                "(a base model needs one to learn to chat)"
            )
        self.source: str = source or (own if isinstance(own, str) else "\n".join(own.values()))
        self._override = source
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs)
        self._image_token = image_token
        self.encoder = Encoder(tokenizer, self.source)
        self.tags: frozenset[str] = frozenset()
        """Tokens of a tool call, which a malformed call keeps as tokens: set with the dialect."""
        self.caller: Dialect | None = None
        """Writes calls as text, where the template itself writes none; see `write_calls_with`."""

        self.form = Form()
        """How the template takes its messages."""
        if not self._writes([Message.user(PROBE)]):
            # Templates of vision models may take contents as lists of blocks alone.
            self.form = Form(blocks=True)
            if not self._writes([Message.user(PROBE)]):
                self.form = Form()
                self.render([Message.user(PROBE)], generate=False)
                raise TemplateError("the chat template does not write the text of a user's message")
        self.opens_thinking = opens_thinking(self.render(QUESTION, generate=True))
        """The generation prompt after a user's message begins the reply's thinking already."""
        self._find_call_form()
        self.has_thinking = self._find_thinking_key()
        """Reasoning is written in some reply at least."""
        self.end: End | None = self._find_end()
        """After a reply's text; None where the template writes no token there."""
        self.has_system = self._writes([Message.system(PROBE), *QUESTION])
        self._look_at_calls()
        self.image_roles = self._find_image_roles()
        """Whose messages may hold images."""

    def write_calls_with(self, dialect: Dialect) -> None:
        """Let a dialect write the calls of past replies, as text: the template leaves them out.

        So do those of LFM2 and SmolLM3, whose models call all the same: there, calls are content.
        """
        self.caller, self.tags = dialect, dialect.tags
        self._look_at_calls()

    def find_call_ids(self) -> re.Pattern[str] | None:
        """Finds the ids that a reply itself gives its calls; None where the template is free in them."""
        if not self.form.nine:
            return None
        text, id = self.attempt([*QUESTION, Message.assistant("", probe_call())], [PROBE_TOOL]), "call00000"
        before, found, after = text.rpartition(id)
        return (
            re.compile(f"{re.escape(before[-7:])}([A-Za-z0-9]{{9}}){re.escape(after[:1])}") if found else None
        )

    def _look_at_calls(self) -> None:
        self.call_end: End | None = self._find_call_end()
        """After a reply that calls tools; None where there is none, or no such reply."""
        self.has_parallel_calls = self._writes(
            [*QUESTION, Message.assistant("", probe_call("a"), probe_call(id="call00001"))], [PROBE_TOOL]
        )
        self.writes_calls = self._writes([*QUESTION, Message.assistant("", probe_call())], [PROBE_TOOL])
        self.tools_problem: str | None = self._find_tools_problem()
        """Why tools cannot be used with this template; None where they can."""

    # -- rendering ---------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, generate: bool) -> str:
        """The text of a whole conversation.

        Args:
            messages: The conversation.
            tools: What the policy may call.
            generate: End with the generation prompt.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        rows = [self._row(message) for message in messages]
        schemas = [self.encoder.mark_all(tool.as_function()) for tool in tools] or None
        roles = " ".join(message.role for message in messages)
        if len(roles) > 60:
            roles = "… " + roles[-60:]
        with boundary(TemplateError, f"the chat template cannot render this conversation ({roles})"):
            text: str = self._tokenizer.apply_chat_template(
                rows,
                tools=schemas,
                chat_template=self._override,
                add_generation_prompt=generate,
                tokenize=False,
                **self._kwargs,
            )
        token, wanted = self._image_token, len(hashes_of(messages))
        if token is not None and (found := text.count(token)) != wanted:
            raise TemplateError(
                f"the chat template wrote {found} placeholders {token} for the {wanted} images of this "
                f"conversation ({roles}); set model.chat_template to one that writes each where it stands"
            )
        return text

    def content(self, message: Message) -> str:
        """The marked text of a message's content; images are left to `_blocks`."""
        return self.encoder.mark(message.text)

    def _blocks(self, message: Message) -> list[dict[str, Any]]:
        """The content of a message with images.

        Raises:
            TemplateError: Images cannot be read, or not from this role.
        """
        if self._image_token is None:
            raise TemplateError(
                f"a {message.role} message holds an image, and there is no image processor that is known "
                "here: use a model such as Qwen2.5-VL or Qwen3-VL with its processor, or leave images out"
            )
        if message.role not in ("user", "tool"):
            raise TemplateError(
                f"a {message.role} message holds an image; users' messages and tool results may"
            )
        return [
            {"type": "image"}
            if isinstance(block, ImageBlock)
            else {"type": "text", "text": self.encoder.mark(block.text)}
            for block in message.content
            if not isinstance(block, str)
        ]

    def _row(self, message: Message) -> dict[str, Any]:
        """A message as this template takes it."""
        mark = self.encoder.mark
        content: str | None = self.content(message)
        row: dict[str, Any] = {"role": message.role}
        if message.reasoning:
            row[self.form.thinking] = mark(message.reasoning)
        made = [call for call in message.tool_calls if call.error is None]
        calls: list[dict[str, Any]] = []
        if self.caller is None:
            calls = [self._call(call) for call in made]
        else:
            written = [self._written(self.caller, call) for call in made]
            content = "\n".join([*([content] if content else []), *written])
        # A malformed call has no name and arguments to render. It is shown as it was said, tags as tokens.
        said = [mark(call.raw, allow=self.tags) for call in message.tool_calls if call.error]
        if said:
            content = "\n".join([*([content] if content else []), *said])
        if calls:
            row["tool_calls"] = calls
            content = content or self.form.content
        row["content"] = [{"type": "text", "text": content or ""}] if self.form.blocks else content
        if hashes_of([message]):
            row["content"] = self._blocks(message)
        if message.tool_call_id is not None or (message.role == "tool" and self.form.nine):
            row["tool_call_id"] = self._call_id(message.tool_call_id or "")
        if message.name is not None:
            row["name"] = mark(message.name)
        return row

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = self.encoder.mark_all(dict(call.arguments))
        if self.form.arguments is str:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": self.encoder.mark(call.name), "arguments": arguments}
        return {"id": self._call_id(call.id), "type": "function", "function": function}

    def _written(self, caller: Dialect, call: ToolCall) -> str:
        arguments = self.encoder.mark_all(dict(call.arguments))
        return caller.format(ToolCall(name=self.encoder.mark(call.name), arguments=arguments))

    def _call_id(self, id: str) -> str:
        if not self.form.nine:
            return id
        return "".join(letter for letter in id if letter.isascii() and letter.isalnum())[-9:].rjust(9, "0")

    # -- looking at what it does -------------------------------------------------------------------

    def attempt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The rendering without a generation prompt, or nothing where the template refuses."""
        try:
            return self.render(messages, tools, generate=False)
        except TemplateError:
            return ""

    def _writes(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> bool:
        return PROBE in self.attempt(messages, tools)

    def _find_call_form(self) -> None:
        """Set the form in which calls are written; the first, where none is."""
        first = self.form
        call = probe_call(id="t0c0")
        for arguments, content, nine in itertools.product((dict, str), ("", None), (False, True)):
            self.form = replace(first, arguments=arguments, content=content, nine=nine)
            written = self.attempt([*QUESTION, Message.assistant("", call)], [PROBE_TOOL])
            answered = [*QUESTION, Message.assistant("", call), Message.tool(SLOT, call=call)]
            # A dict that was written as Python shows it was not meant to be one.
            if PROBE in written and "{'key'" not in written and SLOT in self.attempt(answered, [PROBE_TOOL]):
                return
        self.form = first

    def _find_thinking_key(self) -> bool:
        """Set the key of a reply's reasoning; whether any is written."""
        call = probe_call("a")
        for key in ("reasoning_content", "thinking", "reasoning"):
            self.form = replace(self.form, thinking=key)
            for reply in (
                Message.assistant("Yes.", reasoning=PROBE),
                Message.assistant("", call, reasoning=PROBE),
            ):
                if self._writes([*QUESTION, reply], [PROBE_TOOL] if reply.tool_calls else []):
                    return True
        self.form = replace(self.form, thinking="reasoning_content")
        return False

    def _find_end(self) -> End | None:
        said = [*QUESTION, Message.assistant(PROBE)]
        last, going = self.attempt(said), self.attempt([*said, Message.user(SLOT)])
        after = self._tokens_after(PROBE, last)
        past = self._tokens_after(PROBE, going.partition(SLOT)[0])
        if after:
            return End(sampled=after[0], past=past[0] if past else after[0])
        if past:
            return End(sampled=past[0], past=past[0], borrowed=True, spare=_beyond(last, going))
        return None

    def _find_call_end(self) -> End | None:
        called = [*QUESTION, Message.assistant("", probe_call())]
        last = self.attempt(called, [PROBE_TOOL])
        if PROBE not in last or self.end is None:
            return None
        after = self._tokens_after(PROBE, last)
        if self.end.borrowed or (after and after[-1] in self._tokens_between_calls()):
            going = self.attempt([*called, Message.tool(SLOT, call=probe_call())], [PROBE_TOOL])
            spare = _beyond(last, going)
            found = self.encoder.find_control(going, len(last) - len(spare))
            if not found:
                return None
            token = found[0].group()
            return End(sampled=token, past=token, borrowed=True, spare=spare)
        if self.end.sampled in after:
            return self.end
        # The call's own closing tags come first; what ends the turn comes last.
        return End(sampled=after[-1], past=after[-1]) if after else None

    def _tokens_between_calls(self) -> list[str]:
        """The control tokens between two calls of one reply: those are not its end."""
        twice = Message.assistant("", probe_call(SLOT), probe_call(id="call00001"))
        text = self.attempt([*QUESTION, twice], [PROBE_TOOL])
        return self._tokens_after(SLOT, text.partition(PROBE)[0]) if PROBE in text else []

    def _tokens_after(self, mark: str, text: str) -> list[str]:
        """The control tokens after the last ``mark`` in ``text``, in order."""
        start = text.rfind(mark)
        return [] if start < 0 else [found.group() for found in self.encoder.find_control(text, start)]

    def _find_image_roles(self) -> frozenset[Role]:
        if self._image_token is None:
            return frozenset()
        picture, call = (ImageBlock(sha256=PROBE),), probe_call("a")
        tried: dict[Role, list[Message]] = {
            "user": [Message.user(picture)],
            "tool": [*QUESTION, Message.assistant("", call), Message.tool(picture, call=call)],
        }
        return frozenset(role for role, script in tried.items() if self.attempt(script, [PROBE_TOOL]))

    def _find_tools_problem(self) -> str | None:
        if PROBE_TOOL.name not in self.attempt(QUESTION, [PROBE_TOOL]):
            return "the chat template does not write the tools that it is given"
        call = probe_call("a")
        answered = [*QUESTION, Message.assistant("", call), Message.tool(PROBE, call=call)]
        if not self._writes(answered, [PROBE_TOOL]):
            return "the chat template does not write tool results"
        if not self.writes_calls:
            return "the chat template does not write an assistant message's tool calls"
        return None


def _beyond(last: str, going: str) -> str:
    """The end of ``last`` that ``going`` does not have."""
    return last[common_length(last, going) :]


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences share from the front."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
