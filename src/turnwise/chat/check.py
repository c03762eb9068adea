"""Whether a template can be bridged: a whole conversation must equal prompt + replies + bridges.

    report = check_template(renderer, tools)
    report.bridges         # whether `Renderer.bridge` may be trusted after any message
    report.new_segments    # after which kinds of messages it may not
    report.note            # what was found, in words

The script holds what an episode can hold, as far as the template renders it at all: a system message, a call,
its result, two calls at once, their results, plain answers, and users who go on asking. It is compared at
every point where the policy would speak, so the first message that breaks it is known by name.

Tokens that were sampled are never taken out or changed, so three differences are expected and told apart:

- Reasoning templates drop the thinking of earlier turns (Qwen3: all before the last question, and the empty
  block that thinking-off puts into the generation prompt). With ``thinking="keep"`` the comparison is made
  with thinking left out on both sides; with ``"template"`` a new segment starts there.
- A last reply may end with another token than a past one (gpt-oss: ``<|return|>``, later ``<|end|>``).
- Text beside calls may be written elsewhere than it was said (Gemma 4: behind the calls' results).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from turnwise.chat.template import PROBE_TOOL, common_length
from turnwise.chat.thinking import without_thinking
from turnwise.errors import TemplateError
from turnwise.images import put
from turnwise.types import Message, Role, TextBlock, ToolCall, ToolSchema

if TYPE_CHECKING:
    from turnwise.chat.renderer import TemplateRenderer

Kind = Literal["tool", "user"]
"""What follows a reply: tool results alone, or anything else."""

RANKS = ("exact", "end", "thinking", "other")
"""How two renderings differ, from not at all to in what no bridge may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateReport:
    """What the check found."""

    bridges: bool
    """Every continuation of the script is bridged."""
    new_segments: frozenset[Kind]
    """What a new segment starts after: the template rewrites there what came before."""
    exact: bool
    """Prompt + replies + bridges are what the template writes, token for token."""
    drops_thinking: bool
    """The template leaves thinking out of earlier turns."""
    keeps_thinking: bool
    """It does, and bridges keep it."""
    parallel_calls: bool
    """The script held two calls in one reply."""
    messages: int
    """How long the script was."""
    note: str
    """What was found, for people; names the message at which a template breaks."""


def kind_of(new_messages: Sequence[Message]) -> Kind:
    """What kind of continuation ``new_messages`` are."""
    return "tool" if new_messages and all(one.role == "tool" for one in new_messages) else "user"


def check_template(
    renderer: TemplateRenderer, tools: Sequence[ToolSchema] = (), *, images: bool = False
) -> TemplateReport:
    """Play the scripted conversation on a renderer's template.

    Args:
        renderer: Whose template to check.
        tools: What the conversation may call; without any it is a plain one.
        images: Show images wherever the template takes them.

    Raises:
        TemplateError: There are tools and the template or the dialect cannot do with them, or it cannot
            render the script's first message.
    """
    script = _script(renderer, tools)
    if images:
        script = _illustrated(script, renderer.template.image_roles)
    position = next(index for index, message in enumerate(script) if message.role == "assistant")
    # What an episode would hold that is bridged throughout; and what the template itself wrote before each
    # reply, so that every step answers for its own difference alone.
    held = fresh = renderer.prompt(script[:position], tools).ids
    ranks: dict[Kind, str] = {}
    broken = ""
    while position < len(script):
        following = position + 1
        while following < len(script) and script[following].role != "assistant":
            following += 1
        new = script[position + 1 : following]
        problem, rank = "", "other"
        try:
            said = renderer.reply(script[position], tools, fresh)
            said = said + renderer.extend(said, new, tools).ids
            held, fresh = held + said, fresh + said
        except TemplateError as cause:
            problem = str(cause)
        whole = renderer.prompt(script[:following], tools).ids
        if not problem:
            rank = difference(renderer, fresh, whole)
            ours = fresh if rank == "other" else held
            if difference(renderer, ours, whole) == "other":
                problem, rank = _parting(renderer, ours, whole), "other"
        if problem:
            held = whole
            named = f"{_named(script[position])}, then {', '.join(map(_named, new))}"
            broken = broken or f"at message {position + 1} of {len(script)} ({named}): {problem}"
        fresh = whole
        kind = kind_of(new)
        ranks[kind] = max(ranks.get(kind, "exact"), rank, key=RANKS.index)
        position = following
    return _report(renderer, script, ranks, broken)


def difference(renderer: TemplateRenderer, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """How what is held differs from the whole rendering: one of `RANKS`."""
    if ours == theirs:
        return "exact"
    encoder = renderer.template.encoder
    text, whole = (encoder.decode_marked(ids, encoder.control) for ids in (ours, theirs))
    if encoder.encode(text) != ours:
        return "other"
    end = renderer.template.end
    if end is not None and end.sampled != end.past:
        text, whole = (one.replace(end.sampled, end.past) for one in (text, whole))
        if text == whole:
            return "end"
    return "thinking" if without_thinking(text) == without_thinking(whole) else "other"


def _report(
    renderer: TemplateRenderer, script: Sequence[Message], ranks: dict[Kind, str], broken: str
) -> TemplateReport:
    allowed = RANKS.index("end" if renderer.thinking == "template" else "thinking")
    new = frozenset(kind for kind, rank in ranks.items() if RANKS.index(rank) > allowed)
    drops = "thinking" in ranks.values()
    notes = [broken] if broken else []
    if drops and renderer.thinking == "keep":
        notes.append(
            "the template drops thinking from earlier turns; bridges keep it, because it was sampled there"
        )
    elif drops:
        notes.append(
            f"the template drops thinking from earlier turns; a new segment starts after {_after(new)}"
        )
    end = renderer.template.end
    if end is not None and end.sampled != end.past:
        notes.append(f"a reply that ended with {end.sampled} is written with {end.past} later; it stays")
    if not renderer.speaks_beside_calls and any(message.tool_calls for message in script):
        notes.append("text beside calls is not written where it was said; it stays where it was sampled")
    if not broken:
        exact = not drops and "end" not in ranks.values()
        notes.append(
            "prompt, replies and bridges equal the whole conversation token for token"
            if exact
            else "everything else is equal token for token"
        )
    return TemplateReport(
        bridges=not new,
        new_segments=new,
        exact=set(ranks.values()) == {"exact"},
        drops_thinking=drops,
        keeps_thinking=drops and renderer.thinking == "keep",
        parallel_calls=any(len(message.tool_calls) > 1 for message in script),
        messages=len(script),
        note=". ".join(notes),
    )


def _after(kinds: frozenset[Kind]) -> str:
    """What new segments start after, for people."""
    if len(kinds) > 1:
        return "every turn"
    return "tool results" if kinds == {"tool"} else "a user's message"


def _script(renderer: TemplateRenderer, tools: Sequence[ToolSchema]) -> list[Message]:
    """The conversation, without what the template is known not to render."""
    template = renderer.template
    # Thinking that the template cannot put into a reply (thinking off) cannot have been sampled either.
    thinks = renderer.can_think

    def say(text: str, *calls: ToolCall, thought: str) -> Message:
        return Message.assistant(text, *calls, reasoning=thought if thinks else None)

    script = [Message.system("You are an agent.")] if template.has_system else []
    script.append(Message.user("What do you see?"))
    if tools:
        one, two, three = (_call(tools[index % len(tools)], index) for index in range(3))
        text = "I will look." if renderer.speaks_beside_calls else ""
        script += [say(text, one, thought="Look first."), Message.tool("A door, closed.", call=one)]
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


def _illustrated(script: Sequence[Message], roles: frozenset[Role]) -> list[Message]:
    """The script with images of several sizes before, behind and between its words."""
    from PIL import Image

    small, wide = (put(Image.new("RGB", size)) for size in ((64, 64), (160, 96)))
    out = []
    for index, message in enumerate(script):
        if message.role in roles:
            text = TextBlock(text=message.text)
            shown = ((text, small), (wide, text), (small, text, wide, small))[index % 3]
            message = replace(message, content=shown)
        out.append(message)
    return out


def _call(tool: ToolSchema, index: int) -> ToolCall:
    """A call with an argument for every parameter. The check never runs it, so any value will do."""
    properties = tool.parameters.get("properties", {})
    arguments = dict.fromkeys(properties, ("left", 'a "b" {c}', "ü")[index % 3])
    return ToolCall(name=tool.name, arguments=arguments, id=f"check{index:04}")


def _named(message: Message) -> str:
    if message.tool_calls:
        return f"{message.role} with {len(message.tool_calls)} calls"
    return message.role


def _parting(renderer: TemplateRenderer, ids: Sequence[int], whole: Sequence[int]) -> str:
    """Where two renderings part."""
    ours, theirs = renderer.decode(ids), renderer.decode(whole)
    if ours == theirs:
        return f"the text is equal, its tokens are not from token {common_length(ids, whole)} on"
    same = common_length(ours, theirs)
    start = max(0, same - 30)
    return (
        f"the whole conversation has {theirs[start : same + 40]!r} where prompt and bridges have "
        f"{ours[start : same + 40]!r}"
    )


PROBE_TOOLS = (PROBE_TOOL,)
"""Tools to check a template with before an environment's own are known."""
