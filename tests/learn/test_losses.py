"""Values and gradients of every loss against its paper's formula in float64, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from turnwise.config import LossName, RlConfig
from turnwise.errors import LearnError
from turnwise.learn.losses import Loss, LossInputs, cross_entropy, make_loss, policy_loss, ppo, reinforce
from turnwise.learn.losses.kl import ESTIMATORS
from turnwise.learn.losses.terms import Terms, gspo

N = 64
LENGTHS = (20, 1, 30, 6, 7)
SEQUENCES = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))


def inputs(dtype: torch.dtype = torch.float32, *, seed: int = 2, drift: float = 0.3) -> LossInputs:
    """Five sequences, each with one advantage and one weight for all of its tokens. Their ratios lie within
    and beyond clips of 0.02, on both sides.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0, n: int = N) -> Tensor:
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    logprobs = -normal().abs() - 0.05
    return LossInputs(
        logprobs_N=logprobs.clone().to(dtype).requires_grad_(),
        entropies_N=normal().abs().to(dtype).requires_grad_(),
        sampler_logprobs_N=(logprobs + normal(drift)).clamp(max=-0.01).to(dtype),
        advantages_N=torch.tensor([1.5, -0.7, -1.2, 0.4, 0.9], dtype=dtype)[SEQUENCES],
        weights_N=(normal(n=5).abs() / N)[SEQUENCES].to(dtype),
        sequences_N=SEQUENCES,
        fresh_N=torch.arange(N) % 2 == 0,
        reference_logprobs_N=(logprobs + normal(0.3)).to(dtype),
    )


def by_turn(x: LossInputs) -> LossInputs:
    """The same with an advantage of its own for each token."""
    generator = torch.Generator().manual_seed(3)
    advantages = torch.randn(N, generator=generator, dtype=torch.float64)
    return replace(x, advantages_N=advantages.to(x.logprobs_N.dtype))


def rl(**settings: object) -> RlConfig:
    return RlConfig.model_validate({"steps": 1, "groups": {"catch": 1}, **settings})


# -- formulas ---------------------------------------------------------------------------------------------


def ratio(x: LossInputs) -> Tensor:
    return torch.exp(x.logprobs_N - x.sampler_logprobs_N)


def clipped(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    """The clipped objective, case by case: past its bound the term is constant."""
    if a >= 0:
        return -a * (ratio if ratio < 1 + high else torch.tensor(1 + high, dtype=ratio.dtype))
    return -a * (ratio if ratio > 1 - low else torch.tensor(1 - low, dtype=ratio.dtype))


def exact_ppo(x: LossInputs) -> Tensor:
    return torch.stack([clipped(r, a, 0.2, 0.28) for r, a in zip(ratio(x), x.advantages_N, strict=True)])


def exact_gspo(x: LossInputs, low: float = 0.02, high: float = 0.03) -> Tensor:
    """Equation 5 to 7: the sequence's own ratio, through which the gradient goes."""
    terms = []
    for one in range(5):
        at = one == SEQUENCES
        s = (ratio(x)[at].prod()) ** (1 / int(at.sum()))
        terms += [clipped(s, a, low, high) for a in x.advantages_N[at]]
    return torch.stack(terms)


def exact_rloo(x: LossInputs) -> Tensor:
    """The clipped objective of each sequence's whole ratio, dealt out to its tokens."""
    terms = []
    for one in range(5):
        at = one == SEQUENCES
        n = int(at.sum())
        terms += [clipped(ratio(x)[at].prod(), a, 0.2, 0.2) / n for a in x.advantages_N[at]]
    return torch.stack(terms)


def exact_capped(x: LossInputs) -> Tensor:
    """Two-sided clipping, INTELLECT-2 §3.4: a bad token's ratio is worth 1.4 at most."""
    terms = exact_ppo(x)
    high = (ratio(x) > 1.4) & (x.advantages_N < 0)
    assert high.any() and not high.all()
    return torch.where(high, -1.4 * x.advantages_N, terms)


def exact_off_policy(x: LossInputs) -> Tensor:
    """DeepSeek-V3.2, equation 9."""
    keep = []
    for one in range(5):
        at = one == SEQUENCES
        apart = float((x.sampler_logprobs_N - x.logprobs_N)[at].mean().detach())
        keep += [float(a >= 0 or apart <= 0.02) for a in x.advantages_N[at]]
    assert 0 < sum(keep) < N
    return exact_ppo(x) * torch.tensor(keep, dtype=torch.float64) + 0.1 * exact_k3_ratio(x)


def exact_cispo(x: LossInputs) -> Tensor:
    weight = torch.minimum(ratio(x), torch.tensor(1.3, dtype=torch.float64)).detach()
    return -weight * x.advantages_N * x.logprobs_N


def exact_sapo(x: LossInputs) -> Tensor:
    def term(r: Tensor, a: Tensor) -> Tensor:
        tau = 1.0 if a > 0 else 1.05
        return -a * (4 / tau) / (1 + torch.exp(-tau * (r - 1)))

    return torch.stack([term(r, a) for r, a in zip(ratio(x), x.advantages_N, strict=True)])


def exact_dppo(x: LossInputs, divergence: str, bound: float) -> Tensor:
    def term(logprob: Tensor, before: Tensor, a: Tensor) -> Tensor:
        p, m = float(logprob.detach().exp()), float(before.exp())
        if divergence == "tv":
            apart = (abs(p - m) + abs((1 - p) - (1 - m))) / 2
        else:
            apart = m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p))
        away = (a > 0 and p > m) or (a < 0 and p < m)
        return 0 * logprob if away and apart > bound else -min(p / m, 20.0) * a * logprob

    return torch.stack(
        [term(*one) for one in zip(x.logprobs_N, x.sampler_logprobs_N, x.advantages_N, strict=True)]
    )


def exact_vespo(x: LossInputs) -> Tensor:
    terms = []
    for one in range(5):
        at = one == SEQUENCES
        w = float(ratio(x)[at].prod().detach())
        k, fall = (2.0, 3.0) if x.advantages_N[at][0] >= 0 else (3.0, 2.0)
        phi = math.exp(fall) * w**k * math.exp(-fall * w)
        terms.append(-phi * x.advantages_N[at] * x.logprobs_N[at])
    return torch.cat(terms)


def exact_k3_ratio(x: LossInputs) -> Tensor:
    assert x.reference_logprobs_N is not None
    d = x.reference_logprobs_N - x.logprobs_N
    return ratio(x) * (torch.exp(d) - d - 1)


def exact_k2(x: LossInputs) -> Tensor:
    assert x.reference_logprobs_N is not None
    return (x.logprobs_N - x.reference_logprobs_N) ** 2 / 2


CASES: dict[str, tuple[dict[str, Any], Callable[[LossInputs], Tensor]]] = {
    "ppo": ({"clip_high": 0.28}, exact_ppo),
    "dapo": ({"loss": "dapo"}, exact_ppo),
    "dr_grpo": ({"loss": "dr_grpo", "clip_high": 0.28, "normalise": "constant"}, exact_ppo),
    "bnpo": ({"loss": "bnpo", "clip_high": 0.28}, exact_ppo),
    "gspo": ({"loss": "gspo", "clip_low": 0.02, "clip_high": 0.03}, exact_gspo),
    "gspo, the paper's clips": ({"loss": "gspo"}, partial(exact_gspo, low=3e-4, high=4e-4)),
    "luspo": (
        {"loss": "luspo", "clip_low": 0.02, "clip_high": 0.03, "normalise": "sum"},
        exact_gspo,
    ),
    "rloo": ({"loss": "rloo", "normalise": "sum"}, exact_rloo),
    "ratio_cap": ({"clip_high": 0.28, "ratio_cap": 1.4}, exact_capped),
    "off_policy_kl": ({"clip_high": 0.28, "off_policy_kl": 0.02, "kl": 0.1}, exact_off_policy),
    "cispo": ({"loss": "cispo", "clip_high": 0.3}, exact_cispo),
    "sapo": ({"loss": "sapo"}, exact_sapo),
    "dppo": ({"loss": "dppo"}, partial(exact_dppo, divergence="tv", bound=0.15)),
    "dppo with kl divergence": (
        {"loss": "dppo", "dppo": {"divergence": "kl"}},
        partial(exact_dppo, divergence="kl", bound=0.05),
    ),
    "vespo": ({"loss": "vespo"}, exact_vespo),
    "reinforce": ({"loss": "reinforce"}, lambda x: -x.advantages_N * x.logprobs_N),
    "kl": ({"clip_high": 0.28, "kl": 0.1}, lambda x: exact_ppo(x) + 0.1 * exact_k3_ratio(x)),
    "kl k2": (
        {"loss": "reinforce", "kl": 0.5, "kl_estimator": "k2"},
        lambda x: -x.advantages_N * x.logprobs_N + 0.5 * exact_k2(x),
    ),
    "entropy": (
        {"loss": "reinforce", "entropy": 0.05},
        lambda x: -x.advantages_N * x.logprobs_N - 0.05 * x.entropies_N,
    ),
}


def check(loss: Loss, exact: Callable[[LossInputs], Tensor], *, made: Callable[..., LossInputs]) -> None:
    ours, theirs = made(torch.float32), made(torch.float64)
    got = loss(ours).loss
    wanted = (theirs.weights_N * exact(theirs)).sum()
    got.backward()
    wanted.backward()
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert ours.logprobs_N.grad is not None and theirs.logprobs_N.grad is not None
    assert theirs.logprobs_N.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.logprobs_N.grad.double(), theirs.logprobs_N.grad, atol=1e-5, rtol=1e-5)
    if theirs.entropies_N.grad is not None:
        assert ours.entropies_N.grad is not None
        torch.testing.assert_close(ours.entropies_N.grad.double(), theirs.entropies_N.grad)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    settings, exact = CASES[name]
    check(make_loss(rl(**settings)), exact, made=inputs)


def test_every_loss_is_checked() -> None:
    assert {settings.get("loss", "ppo") for settings, _ in CASES.values()} == set(get_args(LossName))


def test_cross_entropy() -> None:
    check(cross_entropy, lambda x: -x.logprobs_N, made=inputs)


def test_gspo_moves_each_turn_by_its_own_advantage() -> None:
    """GSPO-token, equations 13 and 14: the sequence's ratio is the value, each token has its own gradient."""

    def exact(x: LossInputs) -> Tensor:
        terms = []
        for one in range(5):
            at = one == SEQUENCES
            s = ratio(x)[at].prod().detach() ** (1 / int(at.sum()))
            own = x.logprobs_N[at].exp() / x.logprobs_N[at].exp().detach()
            terms += [clipped(s * p, a, 0.02, 0.03) for p, a in zip(own, x.advantages_N[at], strict=True)]
        return torch.stack(terms)

    loss = make_loss(rl(loss="gspo", clip_low=0.02, clip_high=0.03))
    check(loss, exact, made=lambda dtype: by_turn(inputs(dtype)))


@pytest.mark.parametrize("name", get_args(LossName))
def test_on_policy_every_loss_has_the_plain_policy_gradient(name: str) -> None:
    """At ratios of 1 nothing is clipped, gated or weighed."""
    x = by_turn(inputs())
    x = replace(x, sampler_logprobs_N=x.logprobs_N.detach().clone())
    make_loss(rl(loss=name))(x).loss.backward()
    assert x.logprobs_N.grad is not None
    torch.testing.assert_close(x.logprobs_N.grad, -x.weights_N * x.advantages_N, atol=1e-7, rtol=1e-5)


# -- the divergence to the reference, by enumeration ------------------------------------------------------


def kl_gradients(estimate: Callable[[Tensor, Tensor], Tensor], *, on_policy: bool) -> dict[str, Tensor]:
    """Over a whole vocabulary: the estimate's expected gradient, and those of the two divergences."""
    generator = torch.Generator().manual_seed(1)
    start, old, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    reference = reference.log_softmax(-1)

    def gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
        logits = start.clone().requires_grad_()
        value(logits.log_softmax(-1)).backward()
        assert logits.grad is not None
        return logits.grad

    old = start.log_softmax(-1) if on_policy else old.log_softmax(-1)
    return {
        "estimate": gradient(lambda p: (old.exp() * estimate(p - reference, (p - old).exp())).sum()),
        "reverse": gradient(lambda p: (p.exp() * (p - reference)).sum()),
        "forward": gradient(lambda p: (reference.exp() * (reference - p)).sum()),
    }


@pytest.mark.parametrize(
    ("name", "on_policy"),
    [("k1_ratio", True), ("k1_ratio", False), ("k3_ratio", True), ("k3_ratio", False), ("k2", True)],
)
def test_the_estimates_expected_gradient_is_the_divergences(name: Any, on_policy: bool) -> None:
    found = kl_gradients(ESTIMATORS[name], on_policy=on_policy)
    torch.testing.assert_close(found["estimate"], found["reverse"])


def test_what_the_other_estimates_do() -> None:
    found = kl_gradients(ESTIMATORS["k3"], on_policy=True)
    torch.testing.assert_close(found["estimate"], found["forward"])
    found = kl_gradients(
        lambda difference, ratio: difference, on_policy=True
    )  # k1, which no recipe may choose.
    torch.testing.assert_close(found["estimate"], torch.zeros(6, dtype=torch.float64))
    found = kl_gradients(ESTIMATORS["k2"], on_policy=False)
    assert (found["estimate"] - found["reverse"]).abs().max() > 1e-2


# -- what is reported, and what is refused ----------------------------------------------------------------


def mean(output: dict[str, tuple[Tensor, Tensor]], name: str) -> float:
    total, count = output[name]
    return float(total / count)


def test_metrics() -> None:
    x = inputs()
    out = make_loss(rl(clip_high=0.28, kl=0.1))(x)
    r = ratio(x).detach()
    assert mean(out.means, "clip_low") == float(((r < 0.8) & (x.advantages_N < 0)).float().mean())
    assert mean(out.means, "clip_high") == float(((r > 1.28) & (x.advantages_N > 0)).float().mean())
    assert mean(out.means, "clip_low") > 0 and mean(out.means, "clip_high") > 0
    assert mean(out.means, "ratio") == pytest.approx(float(r.mean()))
    assert float(out.maxima["ratio_max"]) == pytest.approx(float(r.max()))
    assert mean(out.means, "entropy") == pytest.approx(float(x.entropies_N.detach().mean()))
    kl = float(exact_k3_ratio(x).detach().mean())
    assert mean(out.means, "kl_reference") == pytest.approx(kl, rel=1e-5)
    # The sampler's mismatch is over the tokens that the present weights drew: the even ones.
    gap = r.log().abs()[::2]
    assert mean(out.means, "mismatch") == pytest.approx(float(gap.mean()), rel=1e-5)
    assert float(out.maxima["mismatch_max"]) == pytest.approx(float(gap.max()), rel=1e-5)


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_reports_entropy_ratio_and_mismatch(name: str) -> None:
    x = inputs(seed=6 if name == "rloo" else 2)
    out = make_loss(rl(loss=name, **({"clip_high": 0.3} if name == "cispo" else {})))(x)
    assert {"entropy", "ratio", "approx_kl", "mismatch", "mismatch_kl"} <= out.means.keys()
    clipped = name in ("ppo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "rloo")
    assert out.maxima.keys() == {
        "ratio_max", "mismatch_max", *(("spared_low_max", "clip_high_max") if clipped else ())
    }  # fmt: skip
    share = [mean(out.means, key) for key in out.means if key.startswith("clip_")]
    assert all(0 < one < 1 for one in share), "the inputs are far enough off for every clip"
    assert bool(share) == (name not in ("sapo", "vespo", "reinforce"))


@pytest.mark.parametrize("name", get_args(LossName))
def test_a_hopeless_ratio_gives_no_nan(name: str) -> None:
    x = LossInputs(
        logprobs_N=torch.tensor([-1.0, -500.0, 0.0, -1e-9], requires_grad=True),
        entropies_N=torch.zeros(4),
        sampler_logprobs_N=torch.tensor([-500.0, -1.0, -3.0, 0.0]),
        advantages_N=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        weights_N=torch.ones(4),
        sequences_N=torch.tensor([0, 1, 1, 2]),
        fresh_N=torch.zeros(4, dtype=torch.bool),
        reference_logprobs_N=torch.tensor([-500.0, -1.0, 0.0, -2.0]),
    )
    for settings in ({}, {"dppo": {"divergence": "kl"}} if name == "dppo" else {"kl": 1.0}):
        make_loss(rl(loss=name, **settings))(x).loss.backward()
    assert x.logprobs_N.grad is not None and x.logprobs_N.grad.isfinite().all()


def test_no_tokens_give_no_nan() -> None:
    empty = torch.zeros(0)
    x = LossInputs(
        logprobs_N=empty, entropies_N=empty, sampler_logprobs_N=empty, advantages_N=empty, weights_N=empty,
        sequences_N=torch.zeros(0, dtype=torch.long), fresh_N=empty.bool(),
    )  # fmt: skip
    for name in get_args(LossName):
        assert float(make_loss(rl(loss=name))(x).loss) == 0


def test_kl_needs_reference_logprobs() -> None:
    with pytest.raises(LearnError, match="needs samples with reference_logprobs_T"):
        policy_loss(replace(inputs(), reference_logprobs_N=None), term=reinforce, kl=0.1)


def test_an_entropy_bonus_needs_entropies_that_carry_gradients() -> None:
    x = inputs()
    with pytest.raises(LearnError, match="entropy_gradient=True"):
        policy_loss(replace(x, entropies_N=x.entropies_N.detach()), term=reinforce, entropy=0.1)


def test_each_loss_has_the_clips_of_its_paper() -> None:
    clips = {name: rl(loss=name).clips for name in ("ppo", "dapo", "gspo", "luspo", "dppo")}
    assert clips == {
        "ppo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "luspo": (3e-4, 4e-4),
        "dppo": (0.15, 0.15),
    }  # fmt: skip
    assert rl(loss="cispo").clips[1] == 4.0
    assert rl(loss="dppo", dppo={"divergence": "kl"}).clips == (0.05, 0.05)
    assert rl(loss="gspo", clip_low=0.1).clips == (0.1, 4e-4)


def test_a_sequences_tokens_may_lie_anywhere() -> None:
    """Sequence statistics go by index, not by place."""
    x = inputs()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    mixed = replace(
        x,
        **{
            name: getattr(x, name)[order]
            for name in ("logprobs_N", "sampler_logprobs_N", "advantages_N", "sequences_N")
        },
    )

    def terms(of: LossInputs) -> Tensor:
        found: Terms = gspo(of, of.logprobs_N - of.sampler_logprobs_N, clip_low=0.02, clip_high=0.03)
        return found.terms_N

    torch.testing.assert_close(terms(mixed), terms(x)[order])
    # ppo takes no notice of sequences at all.
    one = replace(x, sequences_N=torch.zeros(N, dtype=torch.long))
    loss = partial(policy_loss, term=partial(ppo, clip_low=0.2, clip_high=0.2))
    assert torch.equal(loss(one).loss, loss(x).loss)
    assert not torch.equal(terms(one), terms(x))
