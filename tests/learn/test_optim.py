import pytest
import torch
from tests.support.models import tiny_qwen3

from turnwise.config import OptimizerConfig
from turnwise.learn.model import PolicyModel
from turnwise.learn.optim import Optimizer, schedule


def factors(total: int, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate(settings)
    return [schedule(config, step, total) for step in range(total)]


def test_schedules() -> None:
    assert factors(4) == [1, 1, 1, 1]
    assert factors(6, schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors(4, schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert factors(5, schedule="linear", floor=0.2) == pytest.approx([1, 0.84, 0.68, 0.52, 0.36])
    assert factors(4, schedule="cosine", floor=0.5)[2] == pytest.approx(0.75)
    assert factors(3, warmup_steps=2) == [0.5, 1, 1]
    # Past the planned end the rate stays at zero rather than rising again.
    assert schedule(OptimizerConfig(schedule="cosine"), 9, 4) == pytest.approx(0)


def gradients(policy: PolicyModel, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, parameter in policy.trainable:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    ours, theirs = PolicyModel(tiny_qwen3(hidden=32)), tiny_qwen3(hidden=32)
    config = OptimizerConfig(kind="muon", lr=3e-3, muon_lr=0.03, weight_decay=0.1, max_grad_norm=None)
    optimizer = Optimizer(ours, config, total_steps=10)
    gradients(ours, 1.0)
    rates = optimizer.step(0)
    assert rates == {"lr": 3e-3, "lr_muon": 0.03}

    names = dict(theirs.named_parameters())
    matrices = [p for n, p in names.items() if p.ndim == 2 and "embed" not in n]
    assert len(matrices) == 14
    norms = [p for p in names.values() if p.ndim == 1]
    for (_, source), target in zip(ours.trainable, names.values(), strict=True):
        target.grad = source.grad.clone() if source.grad is not None else None
    torch.optim.Muon(matrices, lr=0.03, weight_decay=0.1).step()
    torch.optim.AdamW([names["model.embed_tokens.weight"]], lr=3e-3, weight_decay=0.1).step()
    torch.optim.AdamW(norms, lr=3e-3, weight_decay=0.0).step()
    for name, parameter in ours.trainable:
        torch.testing.assert_close(parameter, names[name], atol=1e-6, rtol=1e-5)


def test_an_untied_head_is_no_hidden_matrix() -> None:
    policy = PolicyModel(tiny_qwen3(hidden=32, tie=False))
    optimizer = Optimizer(policy, OptimizerConfig(kind="muon"), total_steps=1)
    muon, _ = optimizer._parts["muon"]
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    assert id(policy.causal.lm_head.weight) not in inside and len(inside) == 14


def test_clipping_reports_the_norm_before_it() -> None:
    policy = PolicyModel(tiny_qwen3(hidden=32))
    optimizer = Optimizer(policy, OptimizerConfig(max_grad_norm=1.0), total_steps=1)
    gradients(policy, 3.0)
    norm = torch.cat([p.grad.flatten() for _, p in policy.trainable if p.grad is not None]).norm()
    assert float(optimizer.clip()) == pytest.approx(float(norm), rel=1e-5)
    after = torch.cat([p.grad.flatten() for _, p in policy.trainable if p.grad is not None]).norm()
    assert float(after) == pytest.approx(1.0, rel=1e-4)
