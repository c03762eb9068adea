r"""`Bridge`: what a template writes between the end of one reply and the beginning of the next.

It is taken from the template itself: a small conversation with a dummy reply is rendered, and what follows
the dummy, from its end of turn on, is the bridge. For ChatML, Hermes tool results:

    …xqzprobexqz<|im_end|>\n<|im_start|>user\n<tool_response>\nThe ball is at 2.\n</tool_response><|im_end|>\n
                └──────────────────────────── the bridge's text ────────────────────────────┘  (and so on)

Rendering Jinja for each turn would be slow, and most templates only put contents between constant text. So
the constants of each sequence of roles are taken once, with contents that no template changes, and are used
from then on if filling them in gives the template's own text for contents that templates like to change
(padded, empty, JSON, tags, other names and ids, other tools). Where it does not, each bridge is rendered, and
so is each that shows images.
"""

from __future__ import annotations

from collections.abc import Sequence

from turnwise.chat.template import PROBE, PROBE_TOOL, QUESTION, ChatTemplate, probe_call
from turnwise.chat.vision import hashes_of
from turnwise.errors import TemplateError
from turnwise.types import Message, Role, ToolCall, ToolSchema

_TRYING = (
    "", "  padded \n", "\n\nlines\n\n", '{"a": [1, "two"], "b": null}', "Ünï — 漢字 🙂",
    "<b>&amp;</b> 'quoted'", "<tool_response>\nx\n</tool_response>",
    "<think>\nhm\n</think>\n\nyes", "/no_think", "[1, 2]", "7",
)  # fmt: skip
"""Contents that templates are known to strip, escape, parse or look into."""


class Bridge:
    """What follows a reply, by the roles of what follows it."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._constants: dict[tuple[Role, ...], list[str] | None] = {}

    def ids(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> list[int]:
        """What to append to ``context_ids``, so that ``new_messages`` follow and the policy may speak.

        The first token ends the reply; it is left out where it was sampled. So is it where the policy ended
        with a token that the template writes after a last reply alone (gpt-oss' ``<|return|>``).

        Raises:
            TemplateError: The template refuses the messages, or its text after a reply cannot be found.
        """
        # Encoded together with the token that ends the turn: some tokens take the white space after them.
        ids = self._template.encoder.encode(self.text(new_messages, tools))
        last = context_ids[-1] if context_ids else None
        end, added = self._template.end, self._template.encoder.added
        closed = last == ids[0]
        if end is not None and end.sampled != end.past:
            closed = closed or (ids[0] == added[end.past] and last == added[end.sampled])
        return ids[1:] if closed else ids

    def text(self, new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The marked text from the token that ends a reply to where the policy speaks again.

        Raises:
            TemplateError: As for `ids`.
        """
        if hashes_of(new_messages):
            return self.rendered(new_messages, tools)
        roles = tuple(message.role for message in new_messages)
        if roles not in self._constants:
            self._constants[roles] = self._find_constants(roles)
        constants = self._constants[roles]
        if constants is None:
            return self.rendered(new_messages, tools)
        parts = [constants[0]]
        for message, constant in zip(new_messages, constants[1:], strict=True):
            parts += [self._template.content(message), constant]
        return "".join(parts)

    def rendered(self, new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The same, from the template itself.

        Raises:
            TemplateError: As for `ids`.
        """
        template = self._template
        calls: list[ToolCall] = []
        for message in new_messages:
            if message.role != "tool":
                break
            calls.append(
                probe_call(
                    name=message.name or PROBE_TOOL.name, id=message.tool_call_id or f"call{len(calls):05}"
                )
            )
        # Several results after what a template of single calls can only show as one.
        calls = calls if template.has_parallel_calls else calls[:1]
        end = template.call_end if calls else template.end
        if end is None:
            raise TemplateError("the chat template writes no token after a reply")
        reply = Message.assistant("", *calls) if calls else Message.assistant(PROBE)
        text = template.render([*QUESTION, reply, *new_messages], tools, generate=True)
        # The new messages may hold the probe too, so each is looked for from the front.
        start = -1
        for _ in range(max(1, len(calls))):
            start = text.find(PROBE, start + 1)
        if end.borrowed and not calls:
            # The token that follows is that of whoever speaks next.
            found = template.encoder.find_control(text, start)
            position = found[0].start() if start >= 0 and found else -1
        else:
            position = text.find(end.past, start) if start >= 0 else -1
        if position < 0:
            raise TemplateError("the chat template does not keep a reply's text and its end of turn")
        return text[position:]

    def _find_constants(self, roles: tuple[Role, ...]) -> list[str] | None:
        """The constant text around the contents of such messages; None where there is no such thing."""
        if "assistant" in roles:
            return None
        slots = [f"xqzslot{index}xqz" for index in range(len(roles))]
        text = self.rendered(_filled(roles, slots), [PROBE_TOOL])
        constants: list[str] = []
        for slot in slots:
            before, found, text = text.partition(slot)
            if not found or slot in text:
                return None
            constants.append(before)
        constants.append(text)

        other = ToolSchema(name="other", description="", parameters={"type": "object", "properties": {}})
        for trial, first in enumerate(_TRYING):
            contents = [first, *(_TRYING[(trial + i) % len(_TRYING)] for i in range(1, len(roles)))]
            messages = _filled(roles, contents[: len(roles)], name=f"tool{trial}", id=f"id{trial:07}")
            try:
                wanted = self.rendered(messages, ([], [other], [PROBE_TOOL, other])[trial % 3])
            except TemplateError:
                return None
            filled = [constants[0]]
            for message, constant in zip(messages, constants[1:], strict=True):
                filled += [self._template.content(message), constant]
            if "".join(filled) != wanted:
                return None
        return constants


def _filled(
    roles: Sequence[Role], contents: Sequence[str], *, name: str = "lookup", id: str = "idididid0"
) -> list[Message]:
    """Messages of these roles and contents."""
    return [
        Message(role="tool", content=content, name=name, tool_call_id=id[:-1] + str(index % 10))
        if role == "tool"
        else Message(role=role, content=content)
        for index, (role, content) in enumerate(zip(roles, contents, strict=True))
    ]
