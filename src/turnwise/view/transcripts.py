"""Trajectories to read: who said what, which tools were called, what was paid, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterable

from turnwise.types import Message, ToolCall, Trajectory, Turn
from turnwise.view.rows import duration, short
from turnwise.view.text import escape, shortened


def transcript(trajectory: Trajectory, label: str = "") -> str:
    """One trajectory as an ``<article>``."""
    reward = trajectory.reward
    end = trajectory.stop_reason
    facts = [
        f"{len(trajectory.turns)} turn{'s' if len(trajectory.turns) != 1 else ''}",
        *([f"{trajectory.sampled_tokens} tokens"] if trajectory.sampled_tokens else []),
        end.value.replace("_", " "),
        *([duration(trajectory.seconds)] if trajectory.seconds else []),
    ]
    head = (
        f"<header>{f'<b>{escape(label)}</b>' if label else ''}{reward_chip(reward)}"
        f'<span class="facts">{escape(" · ".join(facts))}</span></header>'
    )
    body = []
    for number, segment in enumerate(trajectory.segments):
        if number:
            body.append('<p class="break">the conversation was rendered anew</p>')
        body += [_message(message) for message in segment.prompt]
        for turn in segment.turns:
            body.append(_reply(turn))
            body += [_message(message) for message in turn.feedback]
    if trajectory.error is not None:
        error = trajectory.error
        body.append(f'<p class="error">{escape(f"{error.where}: {error.kind}: {error.message}")}</p>')
    return f"<article>{head}{''.join(body)}</article>"


def comparison(title: str, parts: Iterable[tuple[str, Trajectory]]) -> str:
    """Trajectories of one task side by side, folded away under a title."""
    parts = list(parts)
    env = parts[0][1].env
    chips = '<span class="arrow">→</span>'.join(reward_chip(trajectory.reward) for _, trajectory in parts)
    articles = "".join(transcript(trajectory, label) for label, trajectory in parts)
    return (
        f"<details><summary><b>{escape(env)}</b> <span>{escape(title)}</span> {chips}</summary>"
        f'<div class="pair">{articles}</div></details>'
    )


def reward_chip(reward: float | None) -> str:
    """A reward, coloured by whether anything was earned."""
    if reward is None:
        return '<span class="chip failed">not scored</span>'
    kind = "good" if reward >= 1 else "some" if reward > 0 else "none"
    return f'<span class="chip {kind}">{short(reward)}</span>'


def _message(message: Message) -> str:
    name = f" {message.name}" if message.name else ""
    return _block(message.role, f"{message.role}{name}", _text(message.text))


def _reply(turn: Turn) -> str:
    parts = []
    if turn.message.reasoning:
        parts.append(f'<pre class="thought">{escape(shortened(turn.message.reasoning))}</pre>')
    if turn.message.text or not turn.message.tool_calls:
        parts.append(_text(turn.message.text))
    parts += [_call(call) for call in turn.message.tool_calls]
    parts += [
        f'<p class="error">{escape(result.call.name)}: {escape(result.error.replace("_", " "))}</p>'
        for result in turn.tool_results
        if result.error
    ]
    facts = [
        *([f"{len(turn.ids)} tokens"] if turn.ids else []),
        *(["cut off"] if turn.finish == "length" else []),
        *([f"reward {short(turn.reward)}"] if turn.reward is not None else []),
    ]
    return _block("assistant", "assistant", "".join(parts), " · ".join(facts))


def _call(call: ToolCall) -> str:
    if call.error is not None:
        return f'<pre class="call bad">{escape(shortened(call.raw or call.name))}</pre>'
    arguments = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()
    )
    return f'<pre class="call">{escape(shortened(f"{call.name}({arguments})"))}</pre>'


def _text(text: str) -> str:
    return f"<pre>{escape(shortened(text))}</pre>" if text.strip() else '<pre class="nothing">(nothing)</pre>'


def _block(role: str, label: str, body: str, facts: str = "") -> str:
    note = f"<small>{escape(facts)}</small>" if facts else ""
    return f'<div class="message {role}"><span class="role">{escape(label)}{note}</span>{body}</div>'
