"""`ChatTemplate`: a tokenizer's Jinja template as a function from messages to text, and what it does.

Nothing here knows any family of templates. What has to be known (what ends a turn, what asks for a reply,
whether tools, thinking and tool results are written at all) is found by rendering small conversations and
looking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.chat.encoding import Encoder
from turnwise.errors import TemplateError, boundary
from turnwise.types import ImageBlock, Message, ToolCall, ToolSchema

# Plain words that no template writes and no tokenizer holds as an added token. Templates that trim, quote or
# escape what they are given leave them whole.
PROBE = "xqzprobexqz"
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


class ChatTemplate:
    """Renders messages to text in which control tokens from content are marked (see
    `turnwise.chat.encoding`).

    Args:
        tokenizer: Whose template machinery renders; a tokenizer of ``transformers``.
        source: The template's Jinja text; None takes the tokenizer's own.
        kwargs: Handed to every rendering (``enable_thinking``).

    Raises:
        TemplateError: There is no template, or it cannot render even one user message.
    """

    def __init__(self, tokenizer: Any, source: str | None, kwargs: Mapping[str, Any]) -> None:
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
        self.encoder = Encoder(tokenizer, self.source)
        self.tags: frozenset[str] = frozenset()
        """Tokens of a tool call, which a malformed call keeps as tokens: set with the dialect."""

        self._in_blocks = False
        if not self._writes([Message.user(PROBE)]):
            # Templates of vision models may take contents as lists of blocks alone.
            self._in_blocks = True
            if not self._writes([Message.user(PROBE)]):
                self._in_blocks = False
                self.render([Message.user(PROBE)], generate=False)
                raise TemplateError("the chat template does not write the text of a user's message")
        user = [Message.user("Hello.")]
        asked, unasked = self.render(user, generate=True), self.render(user, generate=False)
        self.generation_prompt: str | None = asked[len(unasked) :] if asked.startswith(unasked) else None
        """What asks for a reply; None where asking changes the text before."""
        self.opens_thinking = asked.rstrip().endswith("<think>")
        """The generation prompt begins the reply's thinking already."""
        self.turn_end: str | None = self._find_turn_end()
        """The token after a reply's text; None where the template writes none."""
        self.call_turn_end: str | None = self._find_call_turn_end()
        """The token after a reply that calls tools; None where there is none, or no such reply."""
        self.has_system = self._writes([Message.system(PROBE), *user])
        self.has_thinking = self._writes([*user, Message.assistant("Yes.", reasoning=PROBE)])
        self.has_parallel_calls = self.call_turn_end is not None and self._writes(
            [*user, Message.assistant("", probe_call("a"), probe_call(id="call00001"))]
        )
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
        return text

    def content(self, message: Message) -> str:
        """The marked text of a message's content.

        Raises:
            TemplateError: The content holds an image.
        """
        if isinstance(message.content, str):
            return self.encoder.mark(message.content)
        if any(isinstance(block, ImageBlock) for block in message.content):
            raise TemplateError(
                f"a {message.role} message holds an image, and this renderer writes text alone; "
                "leave images out of the environment's observations"
            )
        return self.encoder.mark(message.text)

    def _row(self, message: Message) -> dict[str, Any]:
        """A message as templates take it."""
        row: dict[str, Any] = {"role": message.role, "content": self.content(message)}
        if message.reasoning:
            row["reasoning_content"] = self.encoder.mark(message.reasoning)
        if message.tool_calls:
            row["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": self.encoder.mark(call.name),
                        "arguments": self.encoder.mark_all(dict(call.arguments)),
                    },
                }
                for call in message.tool_calls
                if call.error is None
            ]
            # A malformed call has no name and arguments to render. It is shown as it was said, tags as
            # tokens.
            said = [self.encoder.mark(call.raw, allow=self.tags) for call in message.tool_calls if call.error]
            if said:
                row["content"] = "\n".join([*([row["content"]] if row["content"] else []), *said])
            if not row["tool_calls"]:
                del row["tool_calls"]
        if self._in_blocks:
            row["content"] = [{"type": "text", "text": row["content"]}]
        if message.tool_call_id is not None:
            row["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            row["name"] = self.encoder.mark(message.name)
        return row

    # -- looking at what it does -------------------------------------------------------------------

    def _try(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The rendering, or nothing where the template refuses."""
        try:
            return self.render(messages, tools, generate=False)
        except TemplateError:
            return ""

    def _writes(self, messages: Sequence[Message]) -> bool:
        return PROBE in self._try(messages)

    def _find_turn_end(self) -> str | None:
        text = self._try([Message.user("Hello."), Message.assistant(PROBE)])
        found = self.encoder.find_added(text, text.find(PROBE) + len(PROBE)) if PROBE in text else []
        return found[0].group() if found else None

    def _find_call_turn_end(self) -> str | None:
        text = self._try([Message.user("Hello."), Message.assistant("", probe_call())], [PROBE_TOOL])
        if PROBE not in text or self.turn_end is None:
            return None
        start = text.rfind(PROBE) + len(PROBE)
        if self.turn_end in text[start:]:
            return self.turn_end
        # The call's own closing tags come first; what ends the turn comes last.
        found = self.encoder.find_added(text, start)
        return found[-1].group() if found else None

    def _find_tools_problem(self) -> str | None:
        user = Message.user("Hello.")
        if PROBE_TOOL.name not in self._try([user], [PROBE_TOOL]):
            return "the chat template does not write the tools that it is given"
        call = probe_call()
        if PROBE not in self._try([user, Message.assistant("", call)], [PROBE_TOOL]):
            return "the chat template does not write an assistant message's tool calls"
        answered = [user, Message.assistant("", probe_call("a")), Message.tool(PROBE, call=call)]
        if PROBE not in self._try(answered, [PROBE_TOOL]):
            return "the chat template does not write tool results"
        return None
