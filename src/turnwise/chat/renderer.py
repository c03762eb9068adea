"""`load_renderer`: a model's tokenizer and chat template as a `Renderer`, checked before it is used.

    renderer = load_renderer("Qwen/Qwen3-1.7B", chat_template_kwargs={"enable_thinking": False})
    context = renderer.prompt(messages, tools).ids
    sampled = ...                                        # ids, by an engine
    reply = renderer.parse(sampled, tools)
    result = Message.tool("4", call=reply.tool_calls[0])
    context += sampled + renderer.bridge(context + sampled, [result], tools).ids

Any template renders. Where it proves to be append-only it is bridged; where it rewrites what came before, a
new segment starts, which is slower and is said in the log. Nothing of torch is imported by this room;
`transformers` is, inside of functions.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from turnwise.chat.bridge import Bridge
from turnwise.chat.check import PROBE_TOOLS, TemplateReport, check_template, kind_of
from turnwise.chat.dialects import DIALECTS, Dialect, PlainDialect, ResponseTemplateDialect, find_dialect
from turnwise.chat.history import History
from turnwise.chat.processing import Processing
from turnwise.chat.reply import ReplyWriter, meaning, mended
from turnwise.chat.template import PROBE, ChatTemplate, probe_call
from turnwise.chat.thinking import CLOSE, OPEN, opens_thinking
from turnwise.chat.vision import hashes_of
from turnwise.errors import TemplateError, boundary
from turnwise.types import Message, Rendered, ToolCall, ToolSchema

log = logging.getLogger(__name__)

_TOOLS_HINT = (
    "use a model whose template writes tools, set model.chat_template to a Jinja file that does, "
    "or play an environment without tools"
)
_ASKS = 16
"""Tokens at a context's end in which the generation prompt stands."""
_ENDS = ("<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")
"""What models end on though their template never writes it there: Llama 3.1 after a call, base models."""
Thinking = Literal["keep", "template"]
"""What becomes of earlier turns' thinking where the template drops it; see `load_renderer`."""


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
    thinking: Thinking = "keep",
) -> TemplateRenderer:
    """A renderer for a tokenizer, its template looked at and checked.

    Args:
        tokenizer: A fast tokenizer or a processor of ``transformers``, a `Processing`, or a Hub name or
            directory to load one from.
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.
        chat_template_kwargs: Handed to the template at every rendering.
        dialect: How tool calls are written; found from the template where it is None.
        revision: Of the Hub repository, when ``tokenizer`` names one.
        thinking: Where the template drops the thinking of earlier turns: ``keep`` bridges and so keeps what
            was sampled, ``template`` starts a new segment with the template's own rendering, which is what
            inference servers would send.

    Raises:
        TemplateError: There is no template, or it cannot render a user's message, or the dialect is unknown,
            or ``thinking="template"`` would do nothing.
    """
    processing = Processing.of(tokenizer, revision)
    # A Jinja template without a brace is no template, and a path with one is no path that anyone has.
    if isinstance(chat_template, Path) or (chat_template is not None and "{" not in chat_template):
        with boundary(TemplateError, f"model.chat_template {chat_template} cannot be read"):
            chat_template = Path(chat_template).read_text(encoding="utf-8")
    return TemplateRenderer(processing, chat_template, dict(chat_template_kwargs or {}), dialect, thinking)


class TemplateRenderer:
    """A `Renderer` on a tokenizer's own Jinja template; made by `load_renderer`."""

    def __init__(
        self,
        processing: Processing,
        chat_template: str | None,
        kwargs: Mapping[str, Any],
        dialect: str | None,
        thinking: Thinking = "keep",
    ) -> None:
        self.processing, self.tokenizer, self.vision = processing, processing.tokenizer, processing.vision
        self.template = ChatTemplate(
            self.tokenizer,
            chat_template or processing.chat_template,
            kwargs,
            None if self.vision is None else self.vision.token,
        )
        self.thinking = thinking
        self._encode, self._decode = self.template.encoder.encode, self.template.encoder.decode
        self.stop_ids: tuple[int, ...] = self._stop_ids()
        self._writer = ReplyWriter(self.template)
        self.dialect: Dialect
        self.dialect, self.tools_problem = self._find_dialect(dialect)
        self.template.tags = self.dialect.tags
        self._tokens = self.template.encoder.control | (
            (self.dialect.tags | {OPEN, CLOSE}) & self.template.encoder.added.keys()
        )
        """What counts as a token where its id was sampled, and as text where it was spelled."""
        self._bridge, self._history = Bridge(self.template), History(self.template)
        self._call_ids = self.template.find_call_ids()
        self.can_think = self._says(Message.assistant("Yes.", reasoning=PROBE))
        """A reply may hold thinking after this generation prompt."""
        self.speaks_beside_calls = self._says(Message.assistant(PROBE, probe_call("a")))
        """Text beside calls is written where it is said."""
        self.fingerprint: str = hashlib.sha256(
            json.dumps(
                [
                    self.template.encoder.fingerprint(), self.template.source,
                    json.dumps(dict(kwargs), sort_keys=True, default=str), self.dialect.name, thinking,
                    *([] if self.vision is None else [self.vision.fingerprint()]),
                ]
            ).encode()
        ).hexdigest()  # fmt: skip
        self.reports: dict[bool, TemplateReport] = self._check()
        """What the check found, without and with tools."""
        self.image_reports: dict[bool, TemplateReport] = {}
        """The same for conversations that show images, where any can be read."""
        if self.template.image_roles:
            self.image_reports = {
                tools: check_template(self, PROBE_TOOLS if tools else (), images=True)
                for tools in self.reports
            }

    # -- the protocol ------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> Rendered:
        """See `Renderer.prompt`.

        Raises:
            TemplateError: The template refuses the conversation, or there are tools and it cannot do with
                them.
        """
        if tools and self.tools_problem is not None:
            raise TemplateError(f"{self.tools_problem}; {_TOOLS_HINT}")
        fitted = self._history.fitted(messages)
        return self._rendered(self._encode(self.template.render(fitted, tools, generate=True)), messages)

    def bridge(
        self, context_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> Rendered | None:
        """See `Renderer.bridge`."""
        shown = self.vision is not None and (
            hashes_of(new_messages) or self.vision.token_id in set(context_ids)
        )
        report = (self.image_reports if shown else self.reports).get(bool(tools))
        if report is None or kind_of(new_messages) in report.new_segments:
            return None
        if any(message.role == "system" for message in new_messages):
            # Some templates move these to the front, and the check has none on the way.
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
        return self._rendered(self._bridge.ids(context_ids, new_messages, tools), new_messages)

    def _rendered(self, ids: list[int], messages: Sequence[Message]) -> Rendered:
        """Ids with a placeholder an image as the model reads them, and the images."""
        if self.vision is None:
            return Rendered(ids=ids)
        shown = hashes_of(messages)
        return Rendered(ids=self.vision.expand(ids, shown), images=shown)

    def reply(
        self, message: Message, tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> list[int]:
        """See `Renderer.reply`.

        Raises:
            TemplateError: This message cannot be said: the template drops part of it, or it would be read
                back as something else (Llama's calls are plain JSON, and so may a content be).
        """
        problem: TemplateError | None = None
        for write in (self._writer.whole, self._writer.in_pieces):
            try:
                return self._demonstrated(write, message, tools, context_ids)
            except TemplateError as cause:
                problem = problem or cause
        assert problem is not None
        raise problem

    def parse(
        self, ids: Sequence[int], tools: Sequence[ToolSchema] = (), context_ids: Sequence[int] = ()
    ) -> Message:
        """See `Renderer.parse`."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        text = self.template.encoder.decode_marked(ids[:-1] if ended else ids, self._tokens)
        message = self.dialect.parse(text, thinking=self.opens_thinking(context_ids), tools=tools)
        if ended and message.reasoning and not message.tool_calls and not message.text.strip():
            message = self._with_calls_thought(message.reasoning, tools) or message
        message = mended(message)
        written = self._call_ids.findall(text) if self._call_ids is not None else ()
        if len(written) != len(message.tool_calls):
            return message
        calls = [replace(call, id=id) for call, id in zip(message.tool_calls, written, strict=True)]
        return replace(message, tool_calls=tuple(calls))

    def _with_calls_thought(self, thought: str, tools: Sequence[ToolSchema]) -> Message | None:
        """A reply that ended and said nothing: calls in its thinking were meant, and are malformed."""
        if not any(tag in thought for tag in self.dialect.tags):
            return None
        read = self.dialect.parse(thought, tools=tools)
        calls = [
            replace(
                call, arguments={}, raw=call.raw or self.dialect.format(call),
                error="it stands within the thinking, where no call is made: close the thinking before it",
            )
            for call in read.tool_calls
        ]  # fmt: skip
        return Message.assistant("", *calls, reasoning=read.text.strip() or None) if calls else None

    def opens_thinking(self, context_ids: Sequence[int]) -> bool:
        """See `Renderer.opens_thinking`."""
        if not context_ids:
            return self.template.opens_thinking
        return opens_thinking(self._decode(context_ids[-_ASKS:]))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Renderer.decode`."""
        return self._decode(ids)

    # -- getting there -----------------------------------------------------------------------------

    def _stop_ids(self) -> tuple[int, ...]:
        ends = [end.sampled for end in (self.template.end, self.template.call_end) if end is not None]
        added = self.template.encoder.added
        stops: list[int] = [added[end] for end in ends]
        if self.tokenizer.eos_token_id is not None:
            stops.append(self.tokenizer.eos_token_id)
        if not stops:
            raise TemplateError(
                "nothing ends a reply: the chat template writes no token after one and the tokenizer has no "
                "eos_token; set one of them"
            )
        return tuple(dict.fromkeys([*stops, *(added[end] for end in _ENDS if end in added)]))

    def _after_lead(self, text: str) -> list[int]:
        """The ids of a reply's text.

        Encoded after the generation prompt's last control token, so that what merges there merges as it
        would in the whole; where it would swallow part of the prompt, which the policy cannot, it is encoded
        alone.
        """
        before, together = self._encode(self._writer.lead), self._encode(self._writer.lead + text)
        return together[len(before) :] if together[: len(before)] == before else self._encode(text)

    def _spelled_out(self, message: Message) -> Message:
        """A reply with malformed calls, with all of its calls as the text of one, in their order."""
        raw = "\n".join(call.raw if call.error else self.dialect.format(call) for call in message.tool_calls)
        return Message.assistant(
            message.content,
            ToolCall(name="", arguments={}, error="spelled out", raw=raw),
            reasoning=message.reasoning,
        )

    def _demonstrated(
        self,
        write: Callable[..., str],
        message: Message,
        tools: Sequence[ToolSchema] = (),
        context_ids: Sequence[int] = (),
    ) -> list[int]:
        """The ids of a reply as ``write`` writes it, read back."""
        spelled = self._spelled_out(message) if any(call.error for call in message.tool_calls) else message
        ids = self._after_lead(write(spelled, tools, opened=self.opens_thinking(context_ids)))
        said = self.parse(ids, tools, context_ids)
        if meaning(said) != meaning(message):
            raise TemplateError(
                f"this reply cannot be demonstrated: it would be read back differently. Given {message!r}; "
                f"read back {said!r}; written {self.decode(ids)!r}"
            )
        return ids

    def _says(self, message: Message) -> bool:
        """Whether the template writes a message that reads back as it was."""
        try:
            self._demonstrated(self._writer.whole, message, PROBE_TOOLS if message.tool_calls else ())
        except TemplateError:
            return False
        return True

    def _find_dialect(self, name: str | None) -> tuple[Dialect, str | None]:
        """The dialect, and why tools cannot be used where they cannot."""
        if name is not None and name not in DIALECTS:
            raise TemplateError(f"model.dialect {name!r} is unknown; there are: {', '.join(DIALECTS)}")
        template = self.template
        if not template.writes_calls:
            # The model's calls are content to its template. Whose they are, its tokenizer tells.
            added = self.template.encoder.added.keys()
            able = [DIALECTS[name]] if name else [one for one in DIALECTS.values() if one.tags]
            caller = next((one for one in able if name or one.tags <= added), None)
            if caller is not None:
                template.write_calls_with(caller)
                if template.tools_problem is None:
                    log.info("the chat template writes no calls: they are written as %s content", caller.name)
                    return caller, None
        if name is not None:
            return DIALECTS[name], template.tools_problem
        if template.tools_problem is not None:
            return PlainDialect(), template.tools_problem
        return self._recognised()

    def _recognised(self) -> tuple[Dialect, str | None]:
        """The dialect that reads what the template writes."""
        calls: tuple[ToolCall, ...] = (probe_call(id="call00001"),)
        if self.template.has_parallel_calls:
            calls = (probe_call("a"), *calls)
        opened = self.template.opens_thinking
        try:
            written = self._writer.whole(Message.assistant("", *calls), PROBE_TOOLS, opened=opened)
        except TemplateError as cause:
            return PlainDialect(), str(cause)
        assert self.template.call_end is not None
        written = written.removesuffix(self.template.call_end.sampled)
        more: tuple[Dialect, ...] = ()
        if getattr(self.tokenizer, "response_template", None) is not None:
            asked = self.template.render([Message.user("Hello.")], PROBE_TOOLS, generate=True)
            more = (ResponseTemplateDialect(self.tokenizer, asked),)
        found = find_dialect(written, calls, thinking=opened, tools=PROBE_TOOLS, more=more)
        if found is not None:
            return found, None
        return PlainDialect(), (
            f"the chat template writes tool calls as {written[-160:]!r}, which no dialect reads (there are: "
            f"{', '.join(DIALECTS)}); a dialect is one small class, see docs/chat.md"
        )

    def _check(self) -> dict[bool, TemplateReport]:
        reports = {False: check_template(self)}
        if self.tools_problem is None:
            reports[True] = check_template(self, PROBE_TOOLS)
        else:
            log.info("no tools with this chat template: %s", self.tools_problem)
        if self.thinking == "template" and not any(report.drops_thinking for report in reports.values()):
            raise TemplateError(
                "model.thinking: template does nothing with this chat template, which drops no thinking that "
                f"could be kept ({reports[max(reports)].note}); remove it"
            )
        for report in reports.values():
            if report.new_segments == {"tool", "user"} or (report.new_segments and True not in reports):
                log.warning(
                    "the chat template cannot be extended: each turn is a new segment, prefilled whole. %s",
                    report.note,
                )
                break
            if report.new_segments or report.keeps_thinking:
                log.info("%s", report.note)
                break
        return reports
