"""`opening`: the first messages of an episode, from a row's ``prompt`` and what ``reset`` returned.

Rows are TRL's: a prompt is text or chat messages, in which images of the row's columns have their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from turnwise.envs.observe import BadResultError, blocks
from turnwise.errors import EnvError
from turnwise.images import is_image
from turnwise.types import Content, Message, Role, Task, TextBlock, ToolCall


def opening(prompt: Any, returned: Any, shown: Sequence[Any] = ()) -> Content | list[Message]:
    """The first messages: the prompt, with what ``reset`` returned appended to its last one.

    Images of the row's own columns fill the prompt's empty ``{"type": "image"}``; where it is text alone,
    they stand before the first user's.
    """
    said: Any = _blocks(returned)
    if prompt is None:
        if said is None:
            raise EnvError("reset returned None and the row has no 'prompt': the policy is told nothing")
        return said  # type: ignore[no-any-return]  # checked by the host, as every reset's result is
    entries = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [_message(entry) for entry in _illustrated(entries, shown)]
    if not messages:
        raise EnvError("the row's 'prompt' is an empty list")
    if said is not None:
        last = messages[-1]
        messages[-1] = Message(role=last.role, content=_joined(last.content, said), name=last.name)
    return messages


def _joined(content: Content, said: Any) -> Content:
    if isinstance(content, str) and isinstance(said, str):
        return content + said
    return (*_parts(content), *_parts(said))


def _parts(content: Any) -> tuple[Any, ...]:
    return (TextBlock(text=content),) if isinstance(content, str) else tuple(content)


def _blocks(value: Any) -> Any:
    """TRL's ``[{"type": "text", "text": …}, {"type": "image", "image": …}]`` as ours; else as it is."""
    found = blocks(value, text=True)
    return value if found is None else found


def images_of(task: Task) -> list[Any]:
    """The images of a row's columns ``images`` or ``image``."""
    one, several = task.get("image"), task.get("images")
    shown = several if several is not None else [] if one is None else [one]
    return list(shown) if isinstance(shown, list | tuple) and all(map(is_image, shown)) else []


def _illustrated(entries: list[Any], shown: Sequence[Any]) -> list[Any]:
    """A prompt's messages with images where their places are."""
    plain = all(isinstance(entry, Mapping) and isinstance(entry.get("content"), str) for entry in entries)
    if shown and plain:
        first = next((i for i, entry in enumerate(entries) if entry.get("role") == "user"), None)
        if first is None:
            raise EnvError("the row has images, and its 'prompt' has no user's message to show them in")
        parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": entries[first]["content"]}]
        entries = [*entries[:first], {**entries[first], "content": parts}, *entries[first + 1 :]]
    left = list(shown)
    out, places = [], 0
    for entry in entries:
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), list):
            content = list(entry["content"])
            for index, part in enumerate(content):
                if isinstance(part, Mapping) and part.keys() == {"type"} and part["type"] == "image":
                    places += 1
                    content[index] = left.pop(0) if left else part
            entry = {**entry, "content": content}
        out.append(entry)
    if places != len(shown):
        raise EnvError(f"the row has {len(shown)} images, and its 'prompt' has {places} places for them")
    return out


def _message(entry: Any) -> Message:
    """A chat message written as a mapping, as datasets hold them."""
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping) or entry.get("role") not in get_args(Role):
        raise EnvError(
            f"the row's 'prompt' holds {entry!r}; expected {{'role': …, 'content': …}} "
            f"with a role among {', '.join(get_args(Role))}"
        )
    calls = []
    for index, call in enumerate(entry.get("tool_calls") or ()):
        function = call.get("function", call)
        calls.append(
            ToolCall(
                name=function["name"], arguments=function.get("arguments", {}), id=call.get("id", f"p{index}")
            )
        )
    try:
        content = _blocks(entry.get("content") or "")
    except BadResultError as cause:
        raise EnvError(f"the row's 'prompt' holds {cause}") from cause
    if not isinstance(content, str | tuple):
        raise EnvError(f"the row's 'prompt' holds content that is neither text nor text blocks: {content!r}")
    return Message(
        role=entry["role"],
        content=content,
        tool_calls=tuple(calls),
        tool_call_id=entry.get("tool_call_id"),
        name=entry.get("name"),
        reasoning=entry.get("reasoning_content"),
    )
