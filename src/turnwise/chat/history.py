"""`History`: past turns as a template takes them, where it does not take what a policy may have said.

A policy is freer than its template: it calls twice at once where the template writes one call a message
(Llama 3.1, gpt-oss), it writes what is no call at all and is told so (gpt-oss and Gemma 4 write no result
without a call), it thinks, speaks and calls in one reply (gpt-oss' template refuses that). Bridges keep such
turns as they were sampled. Where a conversation has to be rendered whole, it is given to the template in the
nearest way that it writes, and nothing is left out:

    one reply with two calls    ->  two replies with a call, each followed by its result
    a result without a call     ->  a user's message
    text beside a call          ->  the end of the reply's reasoning
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from turnwise.chat.template import PROBE, PROBE_TOOL, QUESTION, SLOT, ChatTemplate, probe_call
from turnwise.chat.vision import hashes_of
from turnwise.types import Content, ImageBlock, Message, TextBlock


class History:
    """Fits conversations to one template."""

    def __init__(self, template: ChatTemplate) -> None:
        call = probe_call("a")
        said = [*QUESTION, Message.assistant("Well.", reasoning=None), Message.tool(PROBE, call=call)]
        self.single_calls = not template.has_parallel_calls
        """At most one call a message."""
        self.bound_results = PROBE not in template.attempt(said, [PROBE_TOOL])
        """Results are written only after calls."""
        full = Message.assistant(SLOT, call, reasoning=PROBE)
        text = template.attempt([*QUESTION, full], [PROBE_TOOL])
        quiet = template.attempt([*QUESTION, replace(full, content="")], [PROBE_TOOL])
        self.no_text_beside_calls = SLOT not in text and call.name in quiet and PROBE in quiet
        """A reply that thinks and calls may hold no text."""

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """``messages`` as the template takes them; themselves, for most templates."""
        if not (self.single_calls or self.bound_results or self.no_text_beside_calls):
            return list(messages)
        out: list[Message] = []
        position = 0
        while position < len(messages):
            following = position + 1
            while following < len(messages) and messages[following].role == "tool":
                following += 1
            out += self._turn(messages[position], messages[position + 1 : following])
            position = following
        return out

    def _turn(self, message: Message, results: Sequence[Message]) -> list[Message]:
        """A message and the tool results that follow it."""
        made = [call for call in message.tool_calls if call.error is None]
        if made and self.no_text_beside_calls and message.text and message.reasoning:
            message = replace(message, content="", reasoning=f"{message.reasoning}\n\n{message.text}")
        if results and not made and self.bound_results:
            return [message, Message.user(_joined(results))]
        if len(made) < 2 or not self.single_calls:
            return [message, *results]
        out: list[Message] = []
        left = list(results)
        for index, call in enumerate(message.tool_calls):
            first = message if index == 0 else Message.assistant("")
            out.append(replace(first, tool_calls=(call,)))
            out += left[:1]
            del left[:1]
        return out + left


def _joined(results: Sequence[Message]) -> Content:
    """The contents of several messages as that of one."""
    if not hashes_of(results):
        return "\n\n".join(result.text for result in results)
    blocks: list[TextBlock | ImageBlock] = []
    for result in results:
        blocks += [TextBlock(text="\n\n")] if blocks else []
        content = result.content
        blocks += [TextBlock(text=content)] if isinstance(content, str) else content
    return tuple(blocks)
