"""Environments: the authoring surface, adapters for other people's classes, and a library to start from."""

from turnwise.envs.base import Env, tool
from turnwise.types import Message, Step, ToolCall

__all__ = ["Env", "Message", "Step", "ToolCall", "tool"]
