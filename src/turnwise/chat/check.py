"""Whether a template can be bridged: a whole conversation must equal prompt + replies + bridges.

    report = check_template(renderer, tools)
    report.bridges      # whether `Renderer.bridge` may be trusted
    report.note         # what was found, in words

The script holds what an episode can hold, as far as the template renders it at all: a system message, a call,
its result, two calls at once, their results, plain answers, and users who go on asking. It is compared at
every point where the policy would speak, so the first message that breaks it is known by name.

One difference is expected and allowed. Reasoning templates drop the thinking of earlier turns (Qwen3: all
before the last question, and the empty block that thinking-off puts into the generation prompt). Tokens that
were sampled are never taken out again here, so the comparison is then made with thinking left out on both
sides, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turnwise.chat.template import PROBE_TOOL
from turnwise.chat.thinking import without_thinking
from turnwise.errors import TemplateError
from turnwise.types import Message, ToolCall, ToolSchema

if TYPE_CHECKING:
    from turnwise.chat.renderer import TemplateRenderer


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateReport:
    """What the check found."""

    bridges: bool
    """Prompt + replies + bridges are what the template writes, thinking of earlier turns apart."""
    exact: bool
    """They are so token for token."""
    keeps_thinking: bool
    """Bridges keep thinking that the template would drop from earlier turns."""
    parallel_calls: bool
    """The script held two calls in one reply."""
    messages: int
    """How long the script was."""
    note: str
    """What was found, for people; names the message at which a template breaks."""


def check_template(renderer: TemplateRenderer, tools: Sequence[ToolSchema] = ()) -> TemplateReport:
    """Play the scripted conversation on a renderer's template.

    Args:
        renderer: Whose template to check.
        tools: What the conversation may call; without any it is a plain one.

    Raises:
        TemplateError: There are tools and the template or the dialect cannot do with them, or it cannot
            render the script's first message.
    """
    script = _script(renderer, tools)
    parallel = any(len(message.tool_calls) > 1 for message in script)

    def report(*, bridges: bool, note: str, exact: bool = False, keeps: bool = False) -> TemplateReport:
        return TemplateReport(
            bridges=bridges, exact=exact, keeps_thinking=keeps, note=note, parallel_calls=parallel,
            messages=len(script),
        )  # fmt: skip

    first = next(index for index, message in enumerate(script) if message.role == "assistant")
    ids = renderer.prompt(script[:first], tools).ids
    exact, position = True, first
    while position < len(script):
        reply = script[position]
        following = position + 1
        while following < len(script) and script[following].role != "assistant":
            following += 1
        new = script[position + 1 : following]
        where = f"message {position + 1} of {len(script)} ({_kind(reply)}, then {', '.join(map(_kind, new))})"
        try:
            ids += renderer.reply(reply, tools)
            ids += renderer.extend(ids, new, tools).ids
            whole = renderer.prompt(script[:following], tools).ids
        except TemplateError as cause:
            return report(bridges=False, note=f"at {where}: {cause}")
        if ids != whole:
            ours, theirs = renderer.decode(ids), renderer.decode(whole)
            canonical = renderer.template.encoder.encode(ours) == ids
            if not canonical or without_thinking(ours) != without_thinking(theirs):
                return report(bridges=False, note=f"at {where}: {_difference(ours, theirs, ids, whole)}")
            exact = False
        position = following
    if exact:
        note = "prompt, replies and bridges equal the whole conversation token for token"
    else:
        note = (
            "the template drops thinking from earlier turns; bridges keep it, because it was sampled there. "
            "Everything else is equal token for token"
        )
    return report(bridges=True, note=note, exact=exact, keeps=not exact)


def _script(renderer: TemplateRenderer, tools: Sequence[ToolSchema]) -> list[Message]:
    """The conversation, without what the template is known not to render."""
    template = renderer.template
    # Thinking that the template cannot put into a reply (thinking off) cannot have been sampled either.
    thinks = template.has_thinking and renderer.can_think

    def say(text: str, *calls: ToolCall, thought: str) -> Message:
        return Message.assistant(text, *calls, reasoning=thought if thinks else None)

    script = [Message.system("You are an agent.")] if template.has_system else []
    script.append(Message.user("What do you see?"))
    if tools:
        one, two, three = (_call(tools[index % len(tools)], index) for index in range(3))
        script += [say("I will look.", one, thought="Look first."), Message.tool("A door, closed.", call=one)]
        if template.has_parallel_calls:
            script += [
                say("", two, three, thought="Look twice."),
                Message.tool('{"door": "open", "n": 2}', call=two),
                Message.tool("Line one.\nLine two.", call=three),
            ]
        else:
            script += [say("", two, thought="Look again."), Message.tool("Line one.\nLine two.", call=two)]
    script += [
        say("An open door.", thought="That is all."), Message.user("Are you sure? Ünï 漢字."),
        say("Yes.\n\nI am.", thought="I am."), Message.user("Go on then."),
    ]  # fmt: skip
    return script


def _call(tool: ToolSchema, index: int) -> ToolCall:
    """A call with an argument for every parameter. The check never runs it, so any value will do."""
    properties = tool.parameters.get("properties", {})
    arguments = dict.fromkeys(properties, ("left", 'a "b" {c}', "ü")[index % 3])
    return ToolCall(name=tool.name, arguments=arguments, id=f"check{index:04}")


def _kind(message: Message) -> str:
    if message.tool_calls:
        return f"{message.role} with {len(message.tool_calls)} calls"
    return message.role


def _difference(ours: str, theirs: str, ids: Sequence[int], whole: Sequence[int]) -> str:
    """Where two renderings part."""
    if ours == theirs:
        return f"the text is equal, its tokens are not from token {common_length(ids, whole)} on"
    same = common_length(ours, theirs)
    start = max(0, same - 30)
    return (
        f"the whole conversation has {theirs[start : same + 40]!r} where prompt and bridges have "
        f"{ours[start : same + 40]!r}"
    )


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences share from the front."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


PROBE_TOOLS = (PROBE_TOOL,)
"""Tools to check a template with before an environment's own are known."""
