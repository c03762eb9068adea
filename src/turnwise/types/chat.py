"""Conversations: messages, tool calls, tool schemas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBlock:
    """A run of text inside a message of several blocks."""

    text: str
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBlock:
    """An image by reference: the bytes are stored once, under their hash."""

    sha256: str
    """Hex digest of the encoded image file."""
    media_type: str = "image/png"
    type: Literal["image"] = "image"


Content = str | tuple[TextBlock | ImageBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that the model made, or tried to make.

    A malformed call is kept, so that the episode can tell the model what was wrong with it:

        ToolCall(name="move", arguments={}, error="arguments are not valid JSON: …", raw='{"name": "move", …')
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """Matches the tool message that answers it; unique within the trajectory when it is not empty."""
    error: str | None = None
    """What makes the call unusable; None for a well-formed one."""
    raw: str = ""
    """The text it was parsed from; only kept when ``error`` is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSchema:
    """A tool as the model sees it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of an object: ``{"type": "object", "properties": {…}, "required": […]}``."""
    shown: Mapping[str, Any] | None = None
    """What the model is shown as `as_function`, where that is not made of the rest; arguments are checked
    against ``parameters`` all the same."""

    def as_function(self) -> dict[str, Any]:
        """The form that chat templates and OpenAI-compatible endpoints take."""
        if self.shown is not None:
            return dict(self.shown)
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: Content
    reasoning: str | None = None
    """Thinking that the template keeps apart from the content; None where there is none."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """On a tool message: the call that it answers."""
    name: str | None = None
    """On a tool message: the tool that answered."""

    @property
    def text(self) -> str:
        """The text of the content, blocks joined; images are left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(block.text for block in self.content if isinstance(block, TextBlock))

    def as_dict(self, image: Callable[[ImageBlock], Any] | None = None) -> dict[str, Any]:
        """The form that chat templates and TRL's reward functions take.

        Content with images is a list: ``[{"type": "text", "text": …}, {"type": "image", "image": …}]``.

        Args:
            image: What is put for an image; its hash, if not given.
        """
        out: dict[str, Any] = {"role": self.role, "content": self.text}
        if any(isinstance(block, ImageBlock) for block in self.content):
            out["content"] = [
                {"type": "text", "text": block.text}
                if isinstance(block, TextBlock)
                else {"type": "image", "image": block.sha256 if image is None else image(block)}
                for block in self.content
                if not isinstance(block, str)
            ]
        if self.tool_calls:
            out["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        if self.role == "tool":
            out["name"] = self.name
        return out

    @classmethod
    def system(cls, content: Content) -> Message:
        """A system message."""
        return cls(role="system", content=content)

    @classmethod
    def user(cls, content: Content) -> Message:
        """A user message."""
        return cls(role="user", content=content)

    @classmethod
    def assistant(cls, content: Content = "", *tool_calls: ToolCall, reasoning: str | None = None) -> Message:
        """A reply: text, tool calls, or both."""
        return cls(role="assistant", content=content, tool_calls=tool_calls, reasoning=reasoning)

    @classmethod
    def tool(cls, content: Content, *, call: ToolCall) -> Message:
        """The answer to ``call``."""
        return cls(role="tool", content=content, tool_call_id=call.id or None, name=call.name)
