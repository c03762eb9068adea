"""Messages and rows of tasks as JSON, their images with them, between Turnwise peers.

Each has an inverse that stores the images it reads: `message` and `read_message`, `task` and `read_task`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, get_args

from turnwise import images
from turnwise.errors import ActionError, ImageError, said
from turnwise.types import Content, ImageBlock, Message, Role, TextBlock, ToolCall


def message(one: Message) -> dict[str, Any]:
    """A message as JSON, in the form of OpenAI's chat API; `read_message` is its inverse."""
    out: dict[str, Any] = {"role": one.role, "content": content(one.content)}
    if one.tool_calls:
        out["tool_calls"] = [_call(call) for call in one.tool_calls]
    for name in ("reasoning", "tool_call_id", "name"):
        value = getattr(one, name)
        if value is not None:
            out[name] = value
    return out


def content(value: Content) -> str | list[dict[str, Any]]:
    """Text as it is; blocks as a list, images as data URLs."""
    if isinstance(value, str):
        return value
    return [
        {"type": "text", "text": block.text}
        if isinstance(block, TextBlock)
        else {"type": "image_url", "image_url": {"url": data_url(block)}}
        for block in value
    ]


def data_url(block: ImageBlock) -> str:
    """An image's file, whole."""
    return f"data:{block.media_type};base64,{base64.b64encode(images.STORE.read(block.sha256)).decode()}"


def read_message(data: Mapping[str, Any]) -> Message:
    """The message that `message` wrote.

    Raises:
        ActionError: It is none.
        ImageError: An image in it is none.
    """
    if not isinstance(data, Mapping) or data.get("role") not in get_args(Role):
        raise ActionError(f"a message is a JSON object with a role of {', '.join(get_args(Role))}")
    calls = data.get("tool_calls") or []
    try:
        return Message(
            role=data["role"],
            content=read_content(data.get("content")),
            reasoning=data.get("reasoning"),
            tool_calls=tuple(
                ToolCall(
                    name=call["function"]["name"],
                    arguments=call["function"]["arguments"],
                    id=call.get("id") or "",
                    error=call.get("error"),
                    raw=call.get("raw") or "",
                )
                for call in calls
            ),
            tool_call_id=data.get("tool_call_id"),
            name=data.get("name"),
        )
    except (KeyError, TypeError, AttributeError) as cause:
        raise ActionError(
            'a tool call is {"function": {"name": …, "arguments": {…}}}; ' + said(cause, 100)
        ) from cause


def read_content(value: Any) -> Content:
    """Content that `content` wrote; images are stored.

    Raises:
        ActionError, ImageError: As for `read_message`.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ActionError(f"a message's content is text or a list of blocks; found {type(value).__name__}")
    return tuple(_read_block(block) for block in value)


def task(row: Any) -> Any:
    """A task's row as JSON, the files of the images that it names with it; `read_task` is its inverse."""

    def with_file(block: ImageBlock) -> dict[str, Any]:
        file = base64.b64encode(images.STORE.read(block.sha256)).decode()
        return {"type": "image", "sha256": block.sha256, "media_type": block.media_type, "file": file}

    return _mapped(row, with_file)


def read_task(row: Any) -> Any:
    """The row that `task` wrote; images are stored.

    Raises:
        ImageError: An image in it is none.
    """

    def without_file(block: ImageBlock) -> dict[str, Any]:
        return {"type": "image", "sha256": block.sha256, "media_type": block.media_type}

    return _mapped(row, without_file)


def _mapped(value: Any, image: Callable[[ImageBlock], Any]) -> Any:
    if isinstance(value, Mapping):
        block = images.named(value)
        if block is not None:
            if isinstance(value.get("file"), str):
                images.receive(_decoded(value["file"]))
            return image(block)
        return {name: _mapped(part, image) for name, part in value.items()}
    return [_mapped(part, image) for part in value] if isinstance(value, list | tuple) else value


def _read_block(block: Any) -> TextBlock | ImageBlock:
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return TextBlock(text=block["text"])
    if isinstance(block, Mapping) and block.get("type") == "image_url":
        try:
            media_type, file = images.read_url(block.get("image_url"))
        except ImageError as wrong:
            raise ActionError(str(wrong)) from wrong
        return _stored(file, as_it_is=media_type == "image/png")
    raise ActionError(
        'a block is {"type": "text", "text": …} or {"type": "image_url", "image_url": '
        f'{{"url": "data:image/png;base64,…"}}}}; found {str(block)[:80]}'
    )


def _stored(file: bytes, *, as_it_is: bool) -> ImageBlock:
    if not as_it_is:
        return images.put(file)
    images.receive(file)  # Under the hash that its maker knows it by.
    return ImageBlock(sha256=hashlib.sha256(file).hexdigest())


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ActionError("an image whose base64 is broken") from None


def _call(call: ToolCall) -> dict[str, Any]:
    out: dict[str, Any] = {"function": {"name": call.name, "arguments": dict(call.arguments)}}
    out["type"] = "function"
    for name in ("id", "error", "raw"):
        if value := getattr(call, name):
            out[name] = value
    return out
