"""`RlConfig`: the stage of online reinforcement learning, each of its choices a key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.credit import AdvantageName, CreditConfig, Scale
from turnwise.config.loss import (
    CorrectionConfig,
    DppoConfig,
    KlEstimator,
    LossName,
    SapoConfig,
    VespoConfig,
    own_clips,
)
from turnwise.config.overlong import OverlongConfig
from turnwise.config.parts import BatchConfig, OptimizerConfig, SamplingConfig
from turnwise.config.section import Section


class RlConfig(Section):
    """Online reinforcement learning."""

    steps: int = Field(ge=1)
    groups: dict[str, int]
    """Groups of each environment per step."""
    group_size: int = Field(8, ge=2)
    flat_groups: Literal["keep", "drop", "refill"] = "keep"
    """Groups whose siblings nothing sets apart. keep: they count in ``normalise``; drop: they do not; refill:
    others are played in their place."""
    refill_limit: int = Field(4, ge=2)
    """With ``flat_groups: refill``, a step plays at most so many times its ``groups``; then it goes on with
    what it has."""
    overlong: OverlongConfig = OverlongConfig()
    advantage: AdvantageName = "grpo"
    """How much better a reward was than what it is compared with (docs/algorithms.md)."""
    scale: Scale | None = None
    """What ``grpo`` and ``rloo`` divide by: the deviation of the group, that of the environment's whole step,
    or nothing. If not set: group for grpo, none for rloo."""
    rewards: Literal["sum", "separately"] = "sum"
    """Compare the weighted sum of an episode's rewards, or each by itself and add up (GDPO)."""
    credit: CreditConfig = CreditConfig()
    loss: LossName = "ppo"
    clip_low: float | None = Field(None, gt=0)
    """How far a bad token's ratio may fall; if not set, the loss's own (docs/algorithms.md), for most 0.2."""
    clip_high: float | None = Field(None, gt=0)
    """How far a good token's ratio may rise; if not set, the loss's own, for most 0.2."""
    ratio_cap: float | None = Field(None, gt=1)
    """Bound on the ratio of tokens of negative advantage, which no clip stops from rising (INTELLECT-2)."""
    sapo: SapoConfig = SapoConfig()
    dppo: DppoConfig = DppoConfig()
    vespo: VespoConfig = VespoConfig()
    correction: CorrectionConfig = CorrectionConfig()
    off_policy_kl: float | None = Field(None, gt=0)
    """No policy term where the advantage is negative and the sequence's tokens have become rarer by more than
    this on average, in nats (DeepSeek-V3.2)."""
    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the model that RL started from."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: an estimate at each token is a part of the loss; reward: the sum over an episode's tokens is
    taken off its reward, and so off what its siblings are compared with (RLOO)."""
    kl_estimator: KlEstimator = "k3_ratio"
    """How the divergence is estimated at one token; the gradients differ (docs/algorithms.md)."""
    entropy: float = Field(0.0, ge=0)
    """Weight of the policy's entropy, which is raised; it is averaged as the loss is."""
    normalise: Literal["token", "sequence", "constant", "sum"] = "token"
    """token: the step's mean; sequence: mean of trajectories' means; sum: mean of their sums; constant: that
    over ``sampling.max_tokens``."""
    normalise_by_env: bool = False
    """Do so for each environment apart and give each the same weight."""
    minibatches: int = Field(1, ge=1)
    """Updates per step, each on its share of the step."""
    minibatch_of: Literal["groups", "episodes"] = "groups"
    """What is dealt out to ``minibatches``: whole groups, or episodes, whatever group they are of."""
    normalise_over: Literal["update", "step"] = "update"
    """Whether a mean is over each of the ``minibatches``' own tokens and episodes, or over the step's."""
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

    @property
    def clips(self) -> tuple[float, float]:
        """``clip_low`` and ``clip_high``, the loss's own where they are not set."""
        low, high = own_clips(self.loss, self.dppo)
        return low if self.clip_low is None else self.clip_low, (
            high if self.clip_high is None else self.clip_high
        )
