"""Sampler correction: each formula in float64; a corrected gradient is that of the learner's policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.learn.test_losses import SEQUENCES, N, inputs, ratio, rl
from tests.support.models import tiny_qwen3
from tests.support.samples import random_sample
from tests.support.tokenizers import tiny_tokenizer
from tests.support.trajectories import trajectory
from torch import Tensor

from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.engines.sampling import Draws, draw, key_of
from turnwise.errors import LearnError
from turnwise.learn.learner import Learner
from turnwise.learn.losses import LossInputs, make_loss, policy_loss, ppo, reinforce
from turnwise.learn.losses.correction import CORRECTIONS
from turnwise.learn.model import PolicyModel
from turnwise.learn.normalise import weigh
from turnwise.learn.samples import rl_samples
from turnwise.types import Sampling


def three_policies(dtype: torch.dtype) -> LossInputs:
    """The sampler's, the learner's before the step and its present one, all apart."""
    x = inputs(dtype)
    generator = torch.Generator().manual_seed(9)
    moved = 0.2 * torch.randn(N, generator=generator, dtype=torch.float64)
    return replace(x, old_logprobs_N=(x.logprobs_N.detach().double() + moved).to(dtype))


def own(r: list[float], low: float, high: float, kind: str) -> list[float]:
    """Weights of one sequence's tokens, by the definition."""
    whole, mean = math.prod(r), math.prod(r) ** (1 / len(r))
    return {
        "tis": [min(max(one, low), high) for one in r],
        "icepop": [one if low <= one <= high else 0.0 for one in r],
        "sequence_truncate": [min(max(whole, low), high)] * len(r),
        "sequence_mask": [whole if low <= whole <= high else 0.0] * len(r),
        "geometric_mask": [1.0 if low <= mean <= high else 0.0] * len(r),
    }[kind]


BOUNDS = {
    "tis": (0.0, 1.2), "icepop": (0.8, 1.3), "sequence_truncate": (0.9, 1.5), "sequence_mask": (0.8, 2.0),
    "geometric_mask": (0.96, 1.2),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOUNDS)
def test_value_and_gradient(kind: Any) -> None:
    low, high = BOUNDS[kind]
    ours, exact = three_policies(torch.float32), three_policies(torch.float64)
    assert exact.old_logprobs_N is not None
    r = (exact.old_logprobs_N - exact.sampler_logprobs_N).exp()
    weights = torch.tensor(
        [w for one in range(5) for w in own(r[one == SEQUENCES].tolist(), low, high, kind)],
        dtype=torch.float64,
    )
    assert float((weights != r).double().mean()) > 0 and weights.std() > 0, "the bounds bite"
    against_old = replace(exact, sampler_logprobs_N=exact.old_logprobs_N)
    a = exact.advantages_N
    terms = -torch.minimum(ratio(against_old) * a, ratio(against_old).clamp(0.8, 1.2) * a)
    wanted = (exact.weights_N * weights * terms).sum()

    out = make_loss(rl(correction={"kind": kind, "low": low, "high": max(high, 1.0)}))(ours)
    out.loss.backward()
    wanted.backward()
    assert ours.logprobs_N.grad is not None and exact.logprobs_N.grad is not None
    torch.testing.assert_close(out.loss.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.logprobs_N.grad.double(), exact.logprobs_N.grad, atol=1e-5, rtol=1e-5)
    assert exact.logprobs_N.grad.abs().max() > 1e-3

    def mean(name: str) -> float:
        total, count = out.means[name]
        return float(total / count)

    assert mean("correction") == pytest.approx(float(weights.mean()), rel=1e-4)
    assert mean("correction_rejected") == pytest.approx(float((weights == 0).double().mean()))
    assert float(out.maxima["correction_max"]) == pytest.approx(float(weights.max()), rel=1e-4)


def test_every_correction_is_checked() -> None:
    assert {"ignore", *BOUNDS} == set(CORRECTIONS)


def test_what_is_ignored_is_how_tokens_were_drawn() -> None:
    x = three_policies(torch.float32)
    assert x.old_logprobs_N is not None
    out = make_loss(rl(correction={"kind": "ignore"}))(x)
    plain = make_loss(rl())(replace(x, sampler_logprobs_N=x.old_logprobs_N))
    assert torch.equal(out.loss, plain.loss) and not torch.equal(out.loss, make_loss(rl())(x).loss)


def test_without_old_logprobs_the_present_weights_are_the_old_ones() -> None:
    x = inputs()
    loss = make_loss(rl(correction={"kind": "tis"}))
    scored = replace(x, old_logprobs_N=x.logprobs_N.detach().clone())
    assert torch.equal(loss(x).loss, loss(scored).loss)
    # And without a correction they are not read: the ratio is to the sampler.
    plain = make_loss(rl())
    assert torch.equal(plain(x).loss, plain(scored).loss)


def test_what_the_sampler_did_is_told_apart_from_what_the_updates_did() -> None:
    x = three_policies(torch.float32)
    out = make_loss(rl(correction={"kind": "tis"}))(x)
    assert x.old_logprobs_N is not None
    total, count = out.means["ratio"]
    assert float(total / count) == pytest.approx(float((x.logprobs_N - x.old_logprobs_N).exp().mean()))
    total, count = out.means["mismatch"]
    gap = (x.logprobs_N - x.sampler_logprobs_N).detach().abs()[::2]
    assert float(total / count) == pytest.approx(float(gap.mean()), rel=1e-5)


# -- by enumeration ---------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.2, 0.3, -0.5, 2.0, -1.5, 0.9, 0.0, -3.0])
ADVANTAGES = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7, 1.1, -0.2, 4.0])
TEMPERATURE = 0.8


def expected_gradient(
    sampler_N: Tensor, recorded_N: Tensor, loss: Callable[[LossInputs], Any], logits: Tensor = LOGITS
) -> Tensor:
    """Of the loss over everything that a sampler could have drawn as one token, each with its probability."""
    logits = logits.clone().requires_grad_()
    logprobs_N = (logits / TEMPERATURE).log_softmax(-1)
    drawn = sampler_N > 0
    count = int(drawn.sum())
    out = loss(
        LossInputs(
            logprobs_N=logprobs_N[drawn],
            entropies_N=torch.zeros(count),
            sampler_logprobs_N=recorded_N[drawn],
            advantages_N=ADVANTAGES[drawn],
            weights_N=sampler_N[drawn],
            sequences_N=torch.arange(count),
            fresh_N=torch.ones(count, dtype=torch.bool),
        )
    )
    out.loss.backward()
    assert logits.grad is not None
    return logits.grad


def policy_gradient(kept: Tensor) -> Tensor:
    """``-Σ π A ∇ log π`` over the kept tokens: what a sampler of the learner's own policy would give."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    (-(logprobs.detach().exp() * ADVANTAGES * logprobs)[kept]).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.2}])
@pytest.mark.parametrize("term", [reinforce, partial(ppo, clip_low=0.2, clip_high=0.2)])
def test_the_gradient_from_a_cut_distribution_is_unbiased_on_what_was_kept(
    cut: dict[str, Any], term: Any
) -> None:
    """The engine draws, its records become samples, the corrected loss has the uncut policy's gradient."""
    rows = 512
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut}
    draws = Draws(
        temperature=np.full(rows, TEMPERATURE, np.float32),
        top_k=np.full(rows, settings["top_k"], np.int64),
        top_p=np.full(rows, settings["top_p"], np.float32),
        min_p=np.full(rows, settings["min_p"], np.float32),
        key=np.array([key_of(seed) for seed in range(rows)], np.uint64),
    )
    drawn = draw(LOGITS.repeat(rows, 1), draws, np.zeros(rows, np.int64))
    assert drawn.kept_mass is not None
    one = trajectory(moves=("left",))
    recorded_N, sampler_N = torch.zeros(8), torch.zeros(8)
    for id, logprob, mass in zip(drawn.ids, drawn.logprobs, drawn.kept_mass, strict=True):
        turn = replace(one.segments[0].turns[0], ids=[id], logprobs=[logprob], versions=[0], kept_mass=[mass])
        played = replace(
            one,
            sampling=Sampling(temperature=TEMPERATURE, **cut),
            segments=(replace(one.segments[0], turns=(turn,)),),
        )
        (sample,) = rl_samples(played, 1.0, allow_cuts=True)
        recorded_N[id] = float(sample.logprobs_T[-1])
        sampler_N[id] = recorded_N[id].exp()
    kept = sampler_N > 0
    assert 1 < int(kept.sum()) < 8
    # Every kept token was drawn, and with the probabilities that the samples say.
    torch.testing.assert_close(sampler_N.sum(), torch.tensor(1.0))
    counts = torch.bincount(torch.tensor(drawn.ids), minlength=8) / rows
    assert (counts - sampler_N).abs().max() < 0.07

    corrected = partial(policy_loss, term=term, correct=CORRECTIONS["tis"], bounds=(0.0, 2.0))
    wanted = policy_gradient(kept)
    torch.testing.assert_close(expected_gradient(sampler_N, recorded_N, corrected), wanted)
    # Taken for the uncut distribution's, the same records give another gradient.
    uncut_N = (LOGITS / TEMPERATURE).log_softmax(-1)
    assert (expected_gradient(sampler_N, uncut_N, corrected) - wanted).abs().max() > 1e-2


def test_the_gradient_from_another_policys_tokens_is_unbiased() -> None:
    """A stale sampler: importance weights within the cap give the learner's own policy gradient."""
    other = torch.tensor([0.9, 0.5, -0.2, 1.6, -1.0, 1.1, 0.2, -2.0])
    recorded_N = (other / TEMPERATURE).log_softmax(-1)
    corrected = partial(policy_loss, term=reinforce, correct=CORRECTIONS["tis"], bounds=(0.0, 5.0))
    everything = torch.ones(8, dtype=torch.bool)
    found = expected_gradient(recorded_N.exp(), recorded_N, corrected)
    torch.testing.assert_close(found, policy_gradient(everything))
    capped = partial(policy_loss, term=reinforce, correct=CORRECTIONS["tis"], bounds=(0.0, 1.0))
    assert (expected_gradient(recorded_N.exp(), recorded_N, capped) - found).abs().max() > 1e-2


def test_a_cut_without_its_kept_mass_is_refused() -> None:
    played = replace(trajectory(), sampling=Sampling(top_p=0.9))
    with pytest.raises(LearnError, match="the kept mass was not recorded for each token"):
        rl_samples(played, 1.0, allow_cuts=True)


# -- the learner ------------------------------------------------------------------------------------------


def learner(**rows: Any) -> Learner:
    return Learner(
        PolicyModel(tiny_qwen3(hidden=32)), tiny_tokenizer(), optimizer=OptimizerConfig(lr=1e-2),
        rows=BatchConfig(**rows), total_steps=4,
    )  # fmt: skip


def test_old_logprobs_reach_the_loss_in_their_places() -> None:
    rng = np.random.default_rng(3)
    rows = [random_sample(rng, n, id=f"g/t{n}") for n in (9, 20, 5, 12)]
    trained = learner(micro_tokens=64, row_tokens=32)
    scored = trained.logprobs(rows)
    samples = [replace(row, old_logprobs_T=own) for row, own in zip(rows, scored, strict=True)]
    for batch in trained._pack(samples):
        x = trained._inputs(batch)
        assert x.old_logprobs_N is not None
        torch.testing.assert_close(x.old_logprobs_N, x.logprobs_N.detach(), atol=1e-5, rtol=1e-5)
    for batch in trained._pack([samples[0], rows[1]]):
        assert trained._inputs(batch).old_logprobs_N is None, "they are of all or of none"


def test_scoring_before_the_first_update_is_what_the_loss_takes_without() -> None:
    rng = np.random.default_rng(3)
    rows = weigh([random_sample(rng, n, id=f"g/t{n}") for n in (9, 20, 5, 12)], "token")
    loss = make_loss(rl(correction={"kind": "tis"}))
    once, scored = learner(), learner()
    own = scored.logprobs(rows)
    a = once.forward_backward(rows, loss)
    b = scored.forward_backward(
        [replace(row, old_logprobs_T=old) for row, old in zip(rows, own, strict=True)], loss
    )
    assert a["ratio"] == 1 and b["ratio"] == pytest.approx(1, abs=1e-6)
    for (name, p), (_, q) in zip(once.model.trainable, scored.model.trainable, strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_entropys_gradient_is_the_models_own(chunk: int) -> None:
    """Against autograd through the whole logits in float64, and nothing of it unless it is asked for."""
    rng = np.random.default_rng(3)
    rows = weigh(
        [random_sample(rng, n, id=f"g/t{n}", advantage=0.0, temperature=0.7) for n in (9, 20, 5)], "token"
    )
    trained = learner(logprob_chunk=chunk)
    metrics = trained.forward_backward(rows, make_loss(rl(entropy=1.0)), entropy_gradient=True)
    exact = tiny_qwen3(hidden=32).double()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row.token_ids_T.astype(np.int64))[None]
        probabilities = (exact(ids).logits[0] / 0.7).softmax(-1)
        entropies = -(probabilities * probabilities.log()).sum(-1)
        before = torch.from_numpy(np.flatnonzero(row.loss_mask_T) - 1)
        total = total + entropies[before].sum() * float(row.weights_T.max())
    (-total).backward()
    assert metrics["loss"] == pytest.approx(-float(total.detach()), rel=1e-5)
    theirs = dict(exact.named_parameters())
    for name, parameter in trained.model.trainable:
        assert parameter.grad is not None
        wanted = theirs[name].grad
        assert wanted is not None
        torch.testing.assert_close(parameter.grad.double(), wanted, atol=1e-6, rtol=1e-4)
