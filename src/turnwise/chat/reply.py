r"""`ReplyWriter`: a reply as the policy would have sampled it, taken from how the template writes a past one.

The template is asked for a small conversation that ends with the reply; what stands behind the generation
prompt, up to the end of the turn, is the reply. Where a past reply is written differently from where one is
asked for, the generation prompt is the truth:

    asked    …<｜Assistant｜><think>\n            (DeepSeek R1: it opens the thinking)
    history  …<｜Assistant｜>Four.<｜end▁of▁sentence｜>       (and drops it later)
    reply                       └ "Two and two.\n</think>\n\nFour.<｜end▁of▁sentence｜>"
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from turnwise.chat.encoding import mend
from turnwise.chat.template import (
    PROBE,
    PROBE_TOOL,
    QUESTION,
    SLOT,
    ChatTemplate,
    End,
    common_length,
    probe_call,
)
from turnwise.chat.thinking import CLOSE, OPEN
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall, ToolSchema


class ReplyWriter:
    """Writes replies for one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        asked = template.render(QUESTION, generate=True)
        tokens = template.encoder.find_control(asked)
        self.lead = asked[tokens[-1].start() :] if tokens else ""
        """The generation prompt from its last control token on: a reply's first letters may merge with it."""
        said = [*QUESTION, Message.assistant(PROBE)]
        self._heads = [_head(asked, template.attempt(one)) for one in (said, [*said, Message.user(SLOT)])]
        """What only the generation prompt has before a reply, and what only a past one has there: the last
        one, or one before others."""
        self.moves_content = self._moves_content()
        """Text beside calls is written behind them, or not at all."""
        self._opening, self._closing = self._find_thinking(asked)

    def whole(self, message: Message, tools: Sequence[ToolSchema] = (), *, opened: bool) -> str:
        """The marked text of a reply with its end, as the template writes it.

        Args:
            message: What to say.
            tools: What the policy was told of.
            opened: The generation prompt in the reply's context begins the thinking.

        Raises:
            TemplateError: The template cannot write it where it asks for a reply.
        """
        if message.role != "assistant":
            raise TemplateError(f"a reply is an assistant's message, not a {message.role}'s")
        if message.text and message.tool_calls and self.moves_content:
            raise TemplateError("the chat template does not write the text of a reply before its calls")
        return self._body(message, tools, opened=opened) + self._end(bool(message.tool_calls)).sampled

    def in_pieces(self, message: Message, tools: Sequence[ToolSchema] = (), *, opened: bool) -> str:
        """The same for text beside calls, each written by itself.

        Raises:
            TemplateError: As for `whole`, or the message has not both.
        """
        if not (message.text and message.tool_calls):
            raise TemplateError("the chat template writes this reply in one way only")
        said = self._body(replace(message, tool_calls=()), tools, opened=opened)
        called = replace(message, content="", reasoning=None)
        return said + self._body(called, tools, opened=False) + self._end(True).sampled

    def _end(self, calls: bool) -> End:
        """What ends a reply that calls, or one that does not."""
        end = self._template.call_end if calls else self._template.end
        if end is None:
            raise TemplateError(
                "the chat template writes no token after a reply, so none can be demonstrated"
            )
        return end

    def _body(self, message: Message, tools: Sequence[ToolSchema], *, opened: bool) -> str:
        """A reply up to its end, as it follows the generation prompt."""
        template = self._template
        calls = any(call.error is None for call in message.tool_calls)
        tools = tools or ((PROBE_TOOL,) if calls else ())
        asked = template.render(QUESTION, tools, generate=True)
        written = self._written(message, tools, asked)
        thought = template.encoder.mark(message.reasoning or "").strip()
        if written.startswith(asked):
            body = written[len(asked) :]
            if thought and not template.opens_thinking and self._closing:
                silent = self._written(replace(message, reasoning=None), tools, asked)
                body = f"{self._opening}{thought}{self._closing}{body}" if silent == written else body
            elif template.opens_thinking and CLOSE not in body:
                # The template takes thinking for content, and so its end too (Nemotron Nano 2).
                body = thought + self._closing + body
        elif template.opens_thinking:
            # Without reasoning the template may leave out the block, or empty it, as nothing sampled would
            # be.
            probed = self._written(replace(message, reasoning=PROBE), tools, asked)
            if not thought and probed.startswith(asked) and PROBE in probed:
                body = probed[len(asked) :].replace(PROBE, "", 1)
            else:
                body = thought + self._closing + self._behind_head(written, asked, message)
        elif thought and asked.rstrip().endswith(CLOSE):
            raise self._differs(written, asked, message)
        else:
            body = self._behind_head(written, asked, message)
        if opened == template.opens_thinking:
            return body
        if opened:
            found = body.startswith(self._opening)
            return body[len(self._opening) :] if found else self._closing.lstrip("\n") + body
        return self._opening + body if thought else body.removeprefix(self._closing)

    def _written(self, message: Message, tools: Sequence[ToolSchema], asked: str) -> str:
        """The conversation up to the reply's end, as the template writes it."""
        answered = self._template.render([*QUESTION, message], tools, generate=False)
        end = self._end(any(call.error is None for call in message.tool_calls))
        if end.borrowed:
            return answered.removesuffix(end.spare)
        stop = answered.find(end.sampled, common_length(asked, answered))
        if stop < 0:
            raise TemplateError(f"the chat template does not end this reply with {end.sampled!r}")
        return answered[:stop]

    def _behind_head(self, written: str, asked: str, message: Message) -> str:
        """A past reply's text, without what stands before it."""
        for asks, past in self._heads:
            head = asked.removesuffix(asks) + past
            if written.startswith(head):
                return written[len(head) :]
        raise self._differs(written, asked, message)

    def _differs(self, written: str, asked: str, message: Message) -> TemplateError:
        same = common_length(asked, written)
        part = slice(max(0, same - 20), same + 40)
        return TemplateError(
            "the chat template writes a past reply differently from where it asks for one: "
            f"{asked[part]!r} to ask, {written[part]!r} for a past one"
            + (" (the message has reasoning: is thinking off?)" if message.reasoning else "")
        )

    # -- looking at what the template does ---------------------------------------------------------

    def _moves_content(self) -> bool:
        text = self._template.attempt([*QUESTION, Message.assistant(SLOT, probe_call())], [PROBE_TOOL])
        return PROBE in text and not 0 <= text.find(SLOT) < text.find(PROBE)

    def _find_thinking(self, asked: str) -> tuple[str, str]:
        """What stands before and after a reply's reasoning; the second is empty where there is none."""
        template = self._template
        opening = asked[asked.rfind("<") :] if template.opens_thinking else ""
        for reply, tools in (
            (Message.assistant(SLOT), []),
            (Message.assistant("", probe_call(SLOT)), [PROBE_TOOL]),
        ):
            try:
                asked = template.render(QUESTION, tools, generate=True)
            except TemplateError:
                continue
            thinking = template.attempt([*QUESTION, replace(reply, reasoning=PROBE)], tools)
            silent = template.attempt([*QUESTION, reply], tools)
            before, found, after = thinking.partition(PROBE)
            if found and before.startswith(asked) and SLOT in after:
                # What follows the reasoning also where there is none belongs to the reply itself.
                shared = common_length(after[::-1], silent[len(asked) :][::-1])
                closing = after[: len(after) - shared] if silent.startswith(asked) else ""
                closing = closing or after.partition(SLOT)[0]
                return opening or before[len(asked) :], closing
        if asked.rstrip().endswith(CLOSE):
            return "", ""
        if template.opens_thinking:
            # As those write it that leave it out of the history: R1 between line breaks, V3.1 without.
            return opening, "\n</think>\n\n" if asked.endswith("\n") else "</think>"
        if OPEN in template.encoder.added and OPEN in template.source:
            # A model that thinks, whose template takes its thinking for content (SmolLM3).
            return f"{OPEN}\n", f"\n{CLOSE}\n\n"
        return "", ""


def _head(asked: str, said: str) -> tuple[str, str]:
    """Where the text that asks for a reply and a past reply that is `PROBE` part: the rest of each."""
    shared = common_length(asked, said)
    return asked[shared:], said[shared:].partition(PROBE)[0]


def mended(message: Message) -> Message:
    """A message whose spelled tokens are whole again."""
    calls = [
        ToolCall(
            name=mend(call.name), arguments=mend(dict(call.arguments)), id=mend(call.id),
            error=mend(call.error), raw=mend(call.raw),
        )
        for call in message.tool_calls
    ]  # fmt: skip
    return Message.assistant(mend(message.text), *calls, reasoning=mend(message.reasoning))


def meaning(message: Message) -> tuple[Any, ...]:
    """A reply up to call ids and to white space around its parts, which templates trim."""
    calls = [
        call.raw.strip() if call.error else (call.name, json.dumps(dict(call.arguments), sort_keys=True))
        for call in message.tool_calls
    ]
    return message.text.strip(), (message.reasoning or "").strip() or None, calls
