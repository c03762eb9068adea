"""Turnwise trains language-model agents on whole trajectories.

    from turnwise import Env, Step, tool
    from turnwise import GRPOConfig, GRPOTrainer        # TRL's signatures (docs/trl.md)
    from turnwise import connect                        # an OpenEnv server, by hand (docs/openenv.md)

Heavy rooms (engines, learn, pipeline) are imported by name where they are needed, the trainers when their
name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from turnwise.envs.base import Env, tool
from turnwise.types import Message, Step, ToolCall

if TYPE_CHECKING:
    from turnwise.compat.arguments import GRPOConfig, RLOOConfig, SFTConfig
    from turnwise.compat.callbacks import RichProgressCallback
    from turnwise.compat.generation import generate_rollout_completions
    from turnwise.compat.grpo import GRPOTrainer
    from turnwise.compat.rloo import RLOOTrainer
    from turnwise.compat.sft import SFTTrainer
    from turnwise.openenv.client.connect import connect

__version__ = "0.1.0"
__all__ = [
    "Env",
    "GRPOConfig",
    "GRPOTrainer",
    "Message",
    "RLOOConfig",
    "RLOOTrainer",
    "RichProgressCallback",
    "SFTConfig",
    "SFTTrainer",
    "Step",
    "ToolCall",
    "__version__",
    "connect",
    "generate_rollout_completions",
    "tool",
]


def __getattr__(name: str) -> Any:
    """The trainers and their arguments, which need torch and transformers; `connect`, which needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'turnwise' has no attribute {name!r}")
    room = "turnwise.openenv.client.connect" if name == "connect" else "turnwise.compat"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return __all__
