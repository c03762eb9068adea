"""TRL's trainers and their arguments, as a thin facade over the pipeline.

    from turnwise import GRPOConfig, GRPOTrainer

Importing this package costs nothing: each name is looked up in its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "GRPOConfig": "turnwise.compat.arguments",
    "GRPOTrainer": "turnwise.compat.grpo",
    "RLOOConfig": "turnwise.compat.arguments",
    "RLOOTrainer": "turnwise.compat.rloo",
    "SFTConfig": "turnwise.compat.arguments",
    "SFTTrainer": "turnwise.compat.sft",
    "RichProgressCallback": "turnwise.compat.callbacks",
    "generate_rollout_completions": "turnwise.compat.generation",
}
"""Public names and the modules that they are defined in."""

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RichProgressCallback",
    "SFTConfig",
    "SFTTrainer",
    "generate_rollout_completions",
]


def __getattr__(name: str) -> Any:
    """A public name from its home."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
