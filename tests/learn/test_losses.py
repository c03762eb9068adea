"""Values and gradients against the formulas in float64, and what a loss refuses."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from turnwise.config import RlConfig
from turnwise.errors import RecipeError
from turnwise.learn.losses import Loss, LossInputs, cross_entropy, kl_to_reference, make_loss, ppo, reinforce

N = 64


def inputs(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(N, generator=generator, dtype=torch.float64)

    logprobs = normal() - 3
    return LossInputs(
        logprobs_N=logprobs.clone().to(dtype).requires_grad_(),
        entropies_N=normal().abs().to(dtype),
        old_logprobs_N=(logprobs + normal(0.3)).to(dtype),
        advantages_N=normal().to(dtype),
        weights_N=(normal().abs() / N).to(dtype),
        fresh_N=torch.arange(N) % 2 == 0,
        reference_logprobs_N=(logprobs + normal(0.3)).to(dtype),
    )


def reference_kl(x: LossInputs) -> Tensor:
    assert x.reference_logprobs_N is not None
    d = x.reference_logprobs_N - x.logprobs_N
    return torch.exp(x.logprobs_N - x.old_logprobs_N) * (torch.exp(d) - d - 1)


def test_on_policy_the_kl_term_has_the_gradient_of_the_divergence() -> None:
    """Over a whole vocabulary: the expected gradient of the estimate is that of KL(policy ‖ reference)."""
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)
    (logprobs.exp() * (logprobs - reference.log_softmax(-1))).sum().backward()
    assert logits.grad is not None
    wanted, logits.grad = logits.grad, None
    probabilities = logits.detach().softmax(-1)
    logprobs = logits.log_softmax(-1)
    estimates = kl_to_reference(logprobs, logprobs.detach(), reference.log_softmax(-1))
    (probabilities * estimates).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logits.grad, wanted)


def reference_ppo(x: LossInputs) -> Tensor:
    terms = []
    for logprob, old, a in zip(x.logprobs_N, x.old_logprobs_N, x.advantages_N, strict=True):
        ratio = torch.exp(logprob - old)
        # The clipped objective, case by case: past its bound the term is constant.
        if a >= 0:
            terms.append(-a * (ratio if ratio < 1.28 else torch.tensor(1.28, dtype=ratio.dtype)))
        else:
            terms.append(-a * (ratio if ratio > 0.8 else torch.tensor(0.8, dtype=ratio.dtype)))
    return torch.stack(terms)


CASES: dict[str, tuple[Loss, Callable[[LossInputs], Tensor]]] = {
    "ppo": (partial(ppo, clip_low=0.2, clip_high=0.28), reference_ppo),
    "ppo with kl": (
        partial(ppo, clip_low=0.2, clip_high=0.28, kl=0.1),
        lambda x: reference_ppo(x) + 0.1 * reference_kl(x),
    ),
    "reinforce": (reinforce, lambda x: -x.advantages_N * x.logprobs_N),
    "reinforce with kl": (
        partial(reinforce, kl=0.5),
        lambda x: -x.advantages_N * x.logprobs_N + 0.5 * reference_kl(x),
    ),
    "cross-entropy": (cross_entropy, lambda x: -x.logprobs_N),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    loss, reference = CASES[name]
    ours, exact = inputs(), inputs(torch.float64)
    got = loss(ours).loss
    wanted = (exact.weights_N * reference(exact)).sum()
    got.backward()  # type: ignore[no-untyped-call]
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert ours.logprobs_N.grad is not None and exact.logprobs_N.grad is not None
    assert exact.logprobs_N.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.logprobs_N.grad.double(), exact.logprobs_N.grad, atol=1e-5, rtol=1e-5)


def mean(output: dict[str, tuple[Tensor, Tensor]], name: str) -> float:
    total, count = output[name]
    return float(total / count)


def test_metrics() -> None:
    x = inputs()
    out = ppo(x, clip_low=0.2, clip_high=0.28, kl=0.1)
    ratio = (x.logprobs_N - x.old_logprobs_N).detach().exp()
    assert mean(out.means, "clip_low") == float(((ratio < 0.8) & (x.advantages_N < 0)).float().mean())
    assert mean(out.means, "clip_high") == float(((ratio > 1.28) & (x.advantages_N > 0)).float().mean())
    assert mean(out.means, "clip_low") > 0 and mean(out.means, "clip_high") > 0
    assert mean(out.means, "ratio") == pytest.approx(float(ratio.mean()))
    assert float(out.maxima["ratio_max"]) == pytest.approx(float(ratio.max()))
    assert mean(out.means, "entropy") == pytest.approx(float(x.entropies_N.mean()))
    assert mean(out.means, "kl_reference") == pytest.approx(float(reference_kl(x).detach().mean()), rel=1e-5)
    # The sampler's mismatch is over the tokens that the present weights drew: the even ones.
    gap = ratio.log().abs()[::2]
    assert mean(out.means, "mismatch") == pytest.approx(float(gap.mean()), rel=1e-5)
    assert float(out.maxima["mismatch_max"]) == pytest.approx(float(gap.max()), rel=1e-5)


def test_a_hopeless_ratio_gives_no_nan() -> None:
    x = LossInputs(
        logprobs_N=torch.tensor([-1.0, -500.0], requires_grad=True),
        entropies_N=torch.zeros(2),
        old_logprobs_N=torch.tensor([-500.0, -1.0]),
        advantages_N=torch.tensor([1.0, 1.0]),
        weights_N=torch.ones(2),
        fresh_N=torch.zeros(2, dtype=torch.bool),
        reference_logprobs_N=torch.tensor([-500.0, -1.0]),
    )
    ppo(x, clip_low=0.2, clip_high=0.2, kl=1.0).loss.backward()  # type: ignore[no-untyped-call]
    assert x.logprobs_N.grad is not None and x.logprobs_N.grad.isfinite().all()


def test_kl_needs_reference_logprobs() -> None:
    x = inputs()
    without = LossInputs(
        **{name: getattr(x, name) for name in LossInputs.__slots__ if name != "reference_logprobs_N"}
    )
    with pytest.raises(RecipeError, match="needs samples with reference_logprobs_T"):
        reinforce(without, kl=0.1)


def rl(**settings: object) -> RlConfig:
    return RlConfig.model_validate({"steps": 1, "groups": {"catch": 1}, **settings})


def test_dapo_is_ppo_held_to_its_setting() -> None:
    x = inputs()
    dapo = make_loss(rl(loss="dapo", clip_high=0.28))
    same = make_loss(rl(loss="ppo", clip_high=0.28))
    assert torch.equal(dapo(x).loss, same(x).loss)
    with pytest.raises(RecipeError, match=r"set rl\.clip_high \(0\.28 in the paper\)"):
        make_loss(rl(loss="dapo"))
    with pytest.raises(RecipeError, match=r"rl\.normalise is 'sequence'"):
        make_loss(rl(loss="dapo", clip_high=0.28, normalise="sequence"))


def test_a_clip_that_does_nothing_is_refused() -> None:
    assert torch.equal(make_loss(rl(loss="reinforce"))(inputs()).loss, reinforce(inputs()).loss)
    with pytest.raises(RecipeError, match=r"rl\.clip_low does nothing with rl\.loss=reinforce"):
        make_loss(rl(loss="reinforce", clip_low=0.1))
