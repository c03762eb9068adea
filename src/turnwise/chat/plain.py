"""`TextRenderer`: a prompt's text as the tokenizer reads it, and no chat: for models that only go on writing.

    renderer = TextRenderer(tokenizer)
    renderer.prompt([Message.user("Once upon a time")]).ids      # as tokenizer("Once upon a time")

There is one message, whose text is the prompt, and one reply, whose text is what was sampled. Nothing can
follow: without a template nothing says where one speaker ends and another begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turnwise.chat.check import TemplateReport
from turnwise.chat.processing import Processing
from turnwise.errors import TemplateError, boundary
from turnwise.types import Message, Rendered, ToolSchema

TURN_OFF = "with model.prompt=text a prompt is one text and its reply the end; use model.prompt=chat"


def load_text_renderer(tokenizer: Any, *, revision: str | None = None) -> TextRenderer:
    """A renderer of texts for a tokenizer, a processor's tokenizer, or a Hub name or directory of one.

    Raises:
        TemplateError: It cannot be loaded, or has no end-of-sequence token.
    """
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        with boundary(TemplateError, f"the tokenizer of {tokenizer} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), revision=revision)
    return TextRenderer(getattr(tokenizer, "tokenizer", tokenizer))


class TextRenderer:
    """A `Renderer` without a chat template.

    Text that spells a special token becomes that token, as whoever wrote a template into his prompts expects.

    Args:
        tokenizer: Of ``transformers``; it adds the special tokens that it adds to any text.

    Raises:
        TemplateError: It has no end-of-sequence token, so that nothing would end a reply.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise TemplateError("nothing ends a reply: the tokenizer has no eos_token; set one")
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        source = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        self.fingerprint = "text " + hashlib.sha256(source.encode()).hexdigest()
        self.reports: dict[bool, TemplateReport] = {}
        """There is no template that could be checked."""
        self.processing, self.vision = Processing(tokenizer=tokenizer, parts=(tokenizer,)), None

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> Rendered:
        """The ids of the only message's text.

        Raises:
            TemplateError: There are tools, more messages, or other content than text.
        """
        if tools:
            raise TemplateError(f"nothing can tell the policy of tools: {TURN_OFF}")
        if len(messages) != 1 or messages[0].role != "user" or not isinstance(messages[0].content, str):
            found = ", ".join(f"a {message.role} message" for message in messages) or "no message"
            raise TemplateError(f"expected one text; found {found}: {TURN_OFF}")
        return Rendered(ids=list(self.tokenizer(messages[0].content)["input_ids"]))

    def bridge(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> Rendered | None:
        """None: nothing follows a reply."""
        return None

    def reply(
        self, message: Message, tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> list[int]:
        """The ids of a text, and the end."""
        return [*self.tokenizer(message.text, add_special_tokens=False)["input_ids"], *self.stop_ids]

    def parse(
        self, ids: Sequence[int], tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> Message:
        """The text of the ids, without special tokens."""
        return Message.assistant(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))

    def opens_thinking(self, context_ids: Sequence[int]) -> bool:
        """A text has no thinking that would be kept apart."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids)))
