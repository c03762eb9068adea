"""`RlConfig`: the stage of online reinforcement learning, each of its choices a key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.parts import BatchConfig, OptimizerConfig, SamplingConfig
from turnwise.config.section import Section


class RlConfig(Section):
    """Online reinforcement learning."""

    steps: int = Field(ge=1)
    groups: dict[str, int]
    """Groups of each environment per step."""
    group_size: int = Field(8, ge=2)
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    loss: Literal["ppo", "dapo", "reinforce"] = "ppo"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the model that RL started from."""
    normalise: Literal["token", "sequence", "constant"] = "token"
    """token: the step's mean; sequence: mean of trajectories' means; constant: sum over ``max_tokens``."""
    normalise_by_env: bool = False
    """Do so for each environment apart and give each the same weight."""
    minibatches: int = Field(1, ge=1)
    """Updates per step, each on its share of the step's groups."""
    epochs: int = Field(1, ge=1)
    """Passes over the step's samples."""
    staleness: int = Field(0, ge=0)
    """How many versions old a sample may be when it is learned from; 0 is synchronous."""
    concurrency: int = Field(256, ge=1)
    """Episodes in flight."""
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rows: BatchConfig = BatchConfig()
    max_failures: int = Field(64, ge=1)
    """Episodes in a row that may fail, with none succeeding, before the run stops."""
    checkpoint_every: int = Field(10, ge=1)
    control: Literal["shuffled_rewards"] | None = None
    """A control run: rewards are shuffled over the step's trajectories, so there is nothing to learn."""
