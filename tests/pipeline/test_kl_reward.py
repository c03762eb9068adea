"""The KL divergence as a reward: what it is, who is compared with it, and that the loss has none then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.pipeline.test_updates import config, group
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.learn.learner import Learner
from turnwise.learn.losses import make_loss
from turnwise.learn.model import PolicyModel
from turnwise.pipeline.kl_reward import KL, with_kl_reward
from turnwise.pipeline.rl import _learn
from turnwise.pipeline.updates import updates_of

GROUPS = [group("a", 0, 0.0, 1.0, 0.5, None), group("a", 1, 1.0, 1.0)]
REWARDED = config(kl=0.05, kl_in="reward", advantage="rloo", loss="rloo", normalise="sum")


@pytest.fixture
def learner() -> Learner:
    model = PolicyModel(tiny_qwen3(hidden=32))
    model.keep_reference()
    return Learner(model, tiny_tokenizer(), optimizer=OptimizerConfig(), rows=BatchConfig(), total_steps=1)


def test_what_a_policy_has_moved_is_taken_off_its_reward(learner: Learner) -> None:
    with torch.no_grad():  # Ids 1 2 3 4, of which the last two were sampled, with a logprob of -0.5 each.
        logits = learner.model.causal(torch.tensor([[1, 2, 3, 4]])).logits[0].log_softmax(-1)
    apart = -1.0 - float(logits[1, 3] + logits[2, 4])
    assert apart > 1
    paid, metrics = with_kl_reward(learner, GROUPS, REWARDED)
    assert metrics["kl_reference"] == pytest.approx(apart / 2, rel=1e-4)
    for before, after in zip(GROUPS[0].trajectories, paid[0].trajectories, strict=True):
        if before.reward is None:
            assert after is before
        else:
            assert after.rewards[KL].value == pytest.approx(-apart, rel=1e-4)
            assert after.reward == pytest.approx(before.reward - 0.05 * apart, rel=1e-4)


def test_siblings_are_compared_with_it_and_the_loss_has_none(learner: Learner) -> None:
    """Two siblings of one reward, one of which says what the reference would not."""
    (even,) = [one for one in GROUPS if one.id.endswith("/1")]
    short, long = even.trajectories
    (segment,) = long.segments
    (turn,) = segment.turns
    turn = replace(turn, logprobs=[-0.1, -0.1])
    long = replace(long, segments=(replace(segment, turns=(turn,)),))
    groups = [replace(even, trajectories=(short, long))]
    (update,) = updates_of(with_kl_reward(learner, groups, REWARDED)[0], REWARDED, seed=0, step=1)
    found = {one.trajectory_id: float(one.advantages_T[-1]) for one in update.samples}
    assert found[short.id] == pytest.approx(0.05 * 0.8, rel=1e-3) == -found[long.id]

    alone = make_loss(REWARDED.model_copy(update={"kl": 0.0}))
    loss = learner.forward_backward(update.samples, alone)["loss"]
    learner.optim_step()
    with torch.no_grad():  # Back to where the reference is.
        learner.model.causal.load_state_dict(tiny_qwen3(hidden=32).state_dict())
    metrics = _learn(learner, groups, REWARDED, 0, 1)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5) and abs(loss) > 1e-3
    assert metrics["kl_reference"] > 0 and metrics["updates"] == 1
