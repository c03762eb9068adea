"""Turnwise trains language-model agents on whole trajectories.

    from turnwise import Env, Step, tool

Heavy rooms (engines, learn, pipeline) are imported by name where they are needed.
"""

from turnwise.envs.base import Env, tool
from turnwise.types import Message, Step, ToolCall

__version__ = "0.1.0"
__all__ = ["Env", "Message", "Step", "ToolCall", "__version__", "tool"]
