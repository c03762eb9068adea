"""`load_renderer`: a model's tokenizer and chat template as a `Renderer`, checked before it is used.

    renderer = load_renderer("Qwen/Qwen3-1.7B", chat_template_kwargs={"enable_thinking": False})
    context = renderer.prompt(messages, tools).ids
    sampled = ...                                        # ids, by an engine
    reply = renderer.parse(sampled, tools)
    result = Message.tool("4", call=reply.tool_calls[0])
    context += sampled + renderer.bridge(context + sampled, [result], tools).ids

Any template renders. One that proves to be append-only is bridged; another starts a new segment at each turn,
which is slower and is said in the log. Nothing of torch is imported by this room; `transformers` is, inside
of functions.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turnwise.chat.bridge import Bridge
from turnwise.chat.check import PROBE_TOOLS, TemplateReport, check_template, common_length
from turnwise.chat.dialects import DIALECTS, Dialect, PlainDialect, ResponseTemplateDialect, find_dialect
from turnwise.chat.template import PROBE, PROBE_TOOL, ChatTemplate, probe_call
from turnwise.errors import TemplateError, boundary
from turnwise.types import Message, Rendered, ToolCall, ToolSchema

log = logging.getLogger(__name__)

_TOOLS_HINT = (
    "use a model whose template writes tools, set model.chat_template to a Jinja file that does, "
    "or play an environment without tools"
)


def builtin_template(name: str) -> str:
    """The Jinja text of a template that comes with Turnwise: ``tiny``.

    Raises:
        TemplateError: There is none of this name.
    """
    folder = importlib.resources.files("turnwise.chat") / "templates"
    file = folder / f"{name}.jinja"
    if not file.is_file():
        known = sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir())
        raise TemplateError(f"there is no built-in template {name!r}; there are: {', '.join(known)}")
    return file.read_text(encoding="utf-8")


def load_renderer(
    tokenizer: Any,
    *,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    revision: str | None = None,
) -> TemplateRenderer:
    """A renderer for a tokenizer, its template looked at and checked.

    Args:
        tokenizer: A fast tokenizer of ``transformers``, or a Hub name or directory to load one from.
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.
        chat_template_kwargs: Handed to the template at every rendering.
        dialect: How tool calls are written; found from the template where it is None.
        revision: Of the Hub repository, when ``tokenizer`` names one.

    Raises:
        TemplateError: There is no template, or it cannot render a user's message, or the dialect is unknown.
    """
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        with boundary(TemplateError, f"the tokenizer of {tokenizer} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), revision=revision)
    # A Jinja template without a brace is no template, and a path with one is no path that anyone has.
    if isinstance(chat_template, Path) or (chat_template is not None and "{" not in chat_template):
        with boundary(TemplateError, f"model.chat_template {chat_template} cannot be read"):
            chat_template = Path(chat_template).read_text(encoding="utf-8")
    return TemplateRenderer(tokenizer, chat_template, dict(chat_template_kwargs or {}), dialect)


class TemplateRenderer:
    """A `Renderer` on a tokenizer's own Jinja template; made by `load_renderer`."""

    def __init__(
        self, tokenizer: Any, chat_template: str | None, kwargs: Mapping[str, Any], dialect: str | None
    ) -> None:
        self.template = ChatTemplate(tokenizer, chat_template, kwargs)
        self.tokenizer = tokenizer
        self._bridge = Bridge(self.template)
        self._encode, self._decode = self.template.encoder.encode, self.template.encoder.decode
        ends = dict.fromkeys(end for end in (self.template.turn_end, self.template.call_turn_end) if end)
        self._turn_end_ids = frozenset(self.template.encoder.added[end] for end in ends)
        eos: int | None = tokenizer.eos_token_id
        stops = [self.template.encoder.added[end] for end in ends] + ([] if eos is None else [eos])
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        if not self.stop_ids:
            raise TemplateError(
                "nothing ends a reply: the chat template writes no token after one and the tokenizer has no "
                "eos_token; set one of them"
            )
        self.can_think = self._can_think()
        self.dialect: Dialect
        self.dialect, self.tools_problem = self._find_dialect(dialect)
        self.template.tags = self.dialect.tags
        self.fingerprint: str = hashlib.sha256(
            json.dumps(
                [
                    self.template.encoder.fingerprint(), self.template.source,
                    json.dumps(dict(kwargs), sort_keys=True, default=str), self.dialect.name,
                ]
            ).encode()
        ).hexdigest()  # fmt: skip
        self.reports: dict[bool, TemplateReport] = self._check()
        """What the check found, without and with tools."""

    # -- the protocol ------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> Rendered:
        """See `Renderer.prompt`.

        Raises:
            TemplateError: The template refuses the conversation, or there are tools and it cannot do with
                them.
        """
        if tools and self.tools_problem is not None:
            raise TemplateError(f"{self.tools_problem}; {_TOOLS_HINT}")
        return Rendered(ids=self._encode(self.template.render(messages, tools, generate=True)))

    def bridge(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> Rendered | None:
        """See `Renderer.bridge`."""
        report = self.reports.get(bool(tools))
        if report is None or not report.bridges:
            return None
        try:
            return self.extend(context_ids, new_messages, tools)
        except TemplateError as cause:
            # `prompt`, which the caller turns to, says it again where it is more than the bridge's own
            # trouble.
            log.debug("a new segment starts: %s", cause)
            return None

    def extend(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> Rendered:
        """`bridge`, proven or not: what the check itself goes by.

        Raises:
            TemplateError: The template refuses the messages, or has no end of turn.
        """
        end = self._bridge.turn_end(new_messages)
        if end is None:
            raise TemplateError("the chat template writes no token after a reply")
        # Encoded together with the token that ends the turn: some tokens take the white space after them.
        ids = self._encode(end + self._bridge.tail(new_messages, tools))
        closed = bool(context_ids) and context_ids[-1] in self._turn_end_ids
        return Rendered(ids=ids[1:] if closed else ids)

    def reply(self, message: Message, tools: Sequence[ToolSchema] = ()) -> list[int]:
        """See `Renderer.reply`.

        Raises:
            TemplateError: This message cannot be said: the template drops part of it, or it would be read
                back as something else (a content that holds ``<tool_call>``).
        """
        ids = self._reply(message)
        said = self.parse(ids, tools)
        if _meaning(said) != _meaning(message):
            raise TemplateError(
                f"this reply cannot be demonstrated: it would be read back differently. Given {message!r}; "
                f"read back {said!r}; written {self.decode(ids)!r}"
            )
        return ids

    def parse(self, ids: Sequence[int], tools: Sequence[ToolSchema] = ()) -> Message:
        """See `Renderer.parse`."""
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.dialect.parse(self._decode(ids), thinking=self.template.opens_thinking, tools=tools)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Renderer.decode`."""
        return self._decode(ids)

    # -- getting there -----------------------------------------------------------------------------

    def _reply(self, message: Message) -> list[int]:
        """The ids of a reply as the template writes it after its generation prompt."""
        if message.role != "assistant":
            raise TemplateError(f"a reply is an assistant's message, not a {message.role}'s")
        if any(call.error for call in message.tool_calls):
            message = self._spelled_out(message)
        question = [Message.user("Hello.")]
        asked = self.template.render(question, generate=True)
        answered = self.template.render([*question, message], generate=False)
        end = self.template.call_turn_end if message.tool_calls else self.template.turn_end
        if end is None:
            raise TemplateError(
                "the chat template writes no token after a reply, so none can be demonstrated"
            )
        if not answered.startswith(asked):
            same = common_length(asked, answered)
            part = slice(max(0, same - 20), same + 40)
            raise TemplateError(
                "the chat template writes a past reply differently from where it asks for one: "
                f"{asked[part]!r} to ask, {answered[part]!r} for a past one"
                + (" (the message has reasoning: is thinking off?)" if message.reasoning else "")
            )
        stop = answered.rfind(end)
        if stop < len(asked):
            raise TemplateError(f"the chat template does not end this reply with {end!r}")
        # Encoded after the generation prompt's last control token, so that what merges there merges as it
        # would in the whole; where it would swallow part of the prompt, which the policy cannot, it is
        # encoded alone.
        tokens = self.template.encoder.find_added(asked)
        lead = asked[tokens[-1].start() :] if tokens else ""
        text, before = answered[len(asked) : stop + len(end)], self._encode(lead)
        together = self._encode(lead + text)
        return together[len(before) :] if together[: len(before)] == before else self._encode(text)

    def _spelled_out(self, message: Message) -> Message:
        """A reply with malformed calls, with all of its calls as the text of one, in their order."""
        raw = "\n".join(call.raw if call.error else self.dialect.format(call) for call in message.tool_calls)
        return Message.assistant(
            message.content,
            ToolCall(name="", arguments={}, error="spelled out", raw=raw),
            reasoning=message.reasoning,
        )

    def _can_think(self) -> bool:
        """Whether a reply may hold thinking after this generation prompt."""
        try:
            ids = self._reply(Message.assistant("Yes.", reasoning=PROBE))
        except TemplateError:
            return False
        return PROBE in self._decode(ids)

    def _find_dialect(self, name: str | None) -> tuple[Dialect, str | None]:
        """The dialect, and why tools cannot be used where they cannot."""
        if name is not None:
            if name not in DIALECTS:
                raise TemplateError(f"model.dialect {name!r} is unknown; there are: {', '.join(DIALECTS)}")
            return DIALECTS[name], self.template.tools_problem
        if self.template.tools_problem is not None:
            return PlainDialect(), self.template.tools_problem
        call = probe_call()
        question = [Message.user("Hello.")]
        asked = self.template.render(question, [PROBE_TOOL], generate=True)
        written = self.template.render([*question, Message.assistant("", call)], [PROBE_TOOL], generate=False)
        written = written[common_length(asked, written) :]
        end = self.template.call_turn_end
        if end is not None:
            written = written[: written.rfind(end)]
        more: tuple[Dialect, ...] = ()
        if getattr(self.tokenizer, "response_template", None) is not None:
            more = (ResponseTemplateDialect(self.tokenizer, asked),)
        found = find_dialect(
            written, (call,), thinking=self.template.opens_thinking, tools=(PROBE_TOOL,), more=more
        )
        if found is not None:
            return found, None
        return PlainDialect(), (
            f"the chat template writes tool calls as {written[-160:]!r}, which no dialect reads (there are: "
            f"{', '.join(DIALECTS)})"
        )

    def _check(self) -> dict[bool, TemplateReport]:
        reports = {False: check_template(self)}
        if self.tools_problem is None:
            reports[True] = check_template(self, PROBE_TOOLS)
        else:
            log.info("no tools with this chat template: %s", self.tools_problem)
        for report in reports.values():
            if not report.bridges:
                log.warning(
                    "the chat template cannot be extended: each turn is a new segment, prefilled whole. %s",
                    report.note,
                )
                break
            if report.keeps_thinking:
                log.info("%s", report.note)
                break
        return reports


def _meaning(message: Message) -> tuple[Any, ...]:
    """A reply up to call ids and to white space around its parts, which templates trim."""
    calls = [
        call.raw.strip() if call.error else (call.name, json.dumps(dict(call.arguments), sort_keys=True))
        for call in message.tool_calls
    ]
    return message.text.strip(), (message.reasoning or "").strip() or None, calls
