"""Losses: pure functions on the policy's own tokens, each a plain weighted sum.

Everything is flat over the N tokens that carry loss, whatever rows they came from. Normalisation is in
``weights_N`` (`turnwise.learn.normalise`), so a micro-batch's losses and gradients simply add up. What others
call a loss is here a term and a normalisation: docs/algorithms.md has both, and TRL's names for them.
"""

from turnwise.learn.losses.base import Loss, LossInputs, LossOutput
from turnwise.learn.losses.cross_entropy import cross_entropy
from turnwise.learn.losses.policy import make_loss, policy_loss
from turnwise.learn.losses.terms import cispo, dppo, gspo, ppo, reinforce, rloo, sapo, vespo

__all__ = [
    "Loss",
    "LossInputs",
    "LossOutput",
    "cispo",
    "cross_entropy",
    "dppo",
    "gspo",
    "make_loss",
    "policy_loss",
    "ppo",
    "reinforce",
    "rloo",
    "sapo",
    "vespo",
]
