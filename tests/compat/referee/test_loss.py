"""The same batch, the same arguments: TRL's loss and every parameter's gradient, and ours.

Theirs is `GRPOTrainer`'s way from rewards to gradients over one accumulation window, ours the pipeline's:
arguments to recipe, rewards to advantages, trajectories to weighed samples, the learner. Both take two
iterations over the batch where the arguments say so, with the same disturbance of the weights in between, so
that ratios are not 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compat.referee.batch import COMPLETION, GROUPS, REWARDS, Batch, G, make_batch, named
from tests.compat.referee.packages import config as config_of
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import EnvConfig
from turnwise.errors import TurnwiseError
from turnwise.learn.learner import Learner, Metrics
from turnwise.learn.model import PolicyModel
from turnwise.pipeline.rl import _learn

Gradients = dict[str, torch.Tensor]
WEIGHTS = [1.0, 0.5]
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Of each iteration: the loss and the gradients."""

    losses: list[float]
    gradients: list[Gradients]


def tiny(seed: int = 0) -> Any:
    return tiny_qwen3(hidden=32, seed=seed)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def disturb(parameters: Sequence[torch.nn.Parameter]) -> None:
    """What an optimizer step would do to the weights, but the same for both."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def settings_of(**changes: Any) -> dict[str, Any]:
    return {
        "num_generations": G,
        "per_device_train_batch_size": G * GROUPS,
        "max_completion_length": COMPLETION,
        "reward_weights": WEIGHTS,
        "max_steps": 2,
        "learning_rate": 1e-3,
        **changes,
    }


def theirs(batch: Batch, model_dir: Path, out: Path, settings: dict[str, Any]) -> Learned:
    from datasets import Dataset
    from trl import GRPOTrainer

    # What is different with vLLM is what comes after generation; that itself needs a server or a GPU.
    use_vllm = settings.get("use_vllm", False)
    own = {name: value for name, value in settings.items() if name != "use_vllm"}
    rows = [{"prompt": f"hi {g}"} for g in range(GROUPS) for _ in range(G)]
    trainer = GRPOTrainer(
        str(model_dir), [named(name) for name in REWARDS],
        config_of("trl", out, model_init_kwargs={"dtype": "float32"}, **own),
        train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), rollout_func=batch.rollout,
    )  # fmt: skip
    args = trainer.args
    trainer.use_vllm, trainer._last_loaded_step = use_vllm, 0
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.model.train()
    losses, gradients = [], []
    for _ in range(args.num_iterations):
        loss = 0.0
        for _ in range(args.steps_per_generation):
            inputs = trainer._prepare_inputs([dict(row) for row in rows])
            part = trainer.compute_loss(trainer.model, inputs)
            part.backward()
            loss += float(part.detach())
            trainer._step += 1
        parameters = list(trainer.model.named_parameters())
        losses.append(loss)
        gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        trainer.model.zero_grad()
        disturb([p for _, p in parameters])
    return Learned(losses=losses, gradients=gradients)


class Watched(Learner):
    """Keeps each update's gradients, and disturbs the weights in place of an optimizer's step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.learned = Learned(losses=[], gradients=[])

    def forward_backward(self, *args: Any, **settings: Any) -> Metrics:
        metrics = super().forward_backward(*args, **settings)
        self.learned.losses.append(metrics["loss"])
        return metrics

    def optim_step(self, moving: Any = None) -> Metrics:
        trainable = self.model.trainable
        self.learned.gradients.append({name: p.grad.clone() for name, p in trainable if p.grad is not None})
        self._forget()
        disturb([p for _, p in trainable])
        self.step, self._published = self.step + 1, False
        return {"grad_norm": 0.0, "lr": 0.0}


def ours(batch: Batch, out: Path, settings: dict[str, Any]) -> Learned:
    from turnwise.compat.translate import rl_recipe

    args = config_of("turnwise", out, **settings)
    plan = rl_recipe(args, model_name="tiny", environments={"e": EnvConfig()}, rows=G * GROUPS)
    config = plan.recipe.rl
    assert config is not None and config.groups == {"e": GROUPS} and config.group_size == G
    learner = Watched(
        PolicyModel(tiny()), tiny_tokenizer(), optimizer=config.optimizer, rows=config.rows,
        total_steps=plan.max_steps,
    )  # fmt: skip
    if config.kl > 0:
        learner.model.keep_reference()
    groups = batch.groups(dict(zip(REWARDS, WEIGHTS, strict=True)))
    _learn(learner, groups, config, plan.recipe.seed, 1)
    return learner.learned


def compare(settings: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(tiny(), apart=0.3 if settings.get("use_vllm") else 0.0)
    their = theirs(batch, model_dir, tmp_path / "trl", settings)
    our = ours(batch, tmp_path / "turnwise", settings)
    assert len(their.losses) == len(our.losses) == settings.get("num_iterations", 1)
    for step, (wanted, found) in enumerate(zip(their.gradients, our.gradients, strict=True)):
        assert our.losses[step] == pytest.approx(their.losses[step], rel=TOLERANCE, abs=TOLERANCE)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            scale = max(1.0, float(gradient.abs().max()))
            gap = float((gradient - found[name]).abs().max())
            assert gap < TOLERANCE * scale, f"iteration {step}: {name} is {gap:.2g} off, of {scale:.2g}"
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        assert largest > 1e-3, "what is compared is not all but zero"


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {},
    "dapo": {},
    "bnpo": {},
    # A cap that two updates reach.
    "cispo": {"epsilon_high": 1.1},
    "sapo": {},
    "luspo": {},
    "vespo": {},
}
CLIPS = {"epsilon": 0.02, "epsilon_high": 0.05}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "off": {"use_vllm": True, "vllm_importance_sampling_correction": False},
    **{
        mode: {
            "use_vllm": True, "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low,
            "vllm_importance_sampling_clip_max": high,
        }
        for mode, low, high in (
            ("token_truncate", None, 1.1), ("token_mask", 0.7, 1.3),
            ("sequence_truncate", None, 1.1), ("sequence_mask", 0.3, 3.0),
        )
    },
}  # fmt: skip
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "beta": {"beta": 0.05},
    "beta without correction": {"beta": 0.05, "use_bias_correction_kl": False},
    "delta": {"delta": 1.06},
}
SCALES = ("group", "batch", "none")


def settings_for(loss: str, level: str, correction: str, extra: str, scale: str) -> dict[str, Any]:
    clips = {**CLIPS, **LOSSES[loss]}
    return settings_of(
        loss_type=loss, importance_sampling_level=level, scale_rewards=scale, num_iterations=2, **clips,
        **CORRECTIONS[correction], **EXTRAS[extra],
    )  # fmt: skip


def refused(loss: str, level: str, correction: str, extra: str) -> str | None:
    """The argument that an error names where Turnwise does not do what is asked."""
    if level == "sequence" and loss in ("cispo", "sapo", "vespo"):
        return "importance_sampling_level"
    return None


def product() -> list[Any]:
    """Everything with everything; the scale of rewards goes round, as it is part of advantages only."""
    cases = []
    every = itertools.product(LOSSES, ("token", "sequence"), CORRECTIONS, EXTRAS)
    for number, (loss, level, correction, extra) in enumerate(every):
        if loss == "vespo" and correction.startswith("sequence"):
            continue  # TRL refuses it too.
        case = (loss, level, correction, extra, SCALES[number % 3])
        fast = FAST.get((loss, level), "") == f"{correction} {extra}".strip()
        cases.append(
            pytest.param(*case, id=" ".join(filter(None, case)), marks=() if fast else pytest.mark.slow)
        )
    return cases


FAST = {
    ("grpo", "token"): "none beta",
    ("grpo", "sequence"): "sequence_mask",
    ("dr_grpo", "token"): "off",
    ("dapo", "token"): "sequence_mask beta without correction",
    ("bnpo", "token"): "token_mask",
    ("cispo", "token"): "token_truncate",
    ("sapo", "token"): "sequence_truncate beta",
    ("luspo", "sequence"): "none",
    ("vespo", "token"): "none beta",
}


@pytest.mark.parametrize(("loss", "level", "correction", "extra", "scale"), product())
def test_loss_and_gradients(
    loss: str, level: str, correction: str, extra: str, scale: str, model_dir: Path, tmp_path: Path
) -> None:
    settings = settings_for(loss, level, correction, extra, scale)
    named = refused(loss, level, correction, extra)
    if named is None:
        compare(settings, model_dir, tmp_path)
    else:
        theirs(make_batch(tiny()), model_dir, tmp_path, settings)
        with pytest.raises(TurnwiseError, match=named):
            ours(make_batch(tiny()), tmp_path, settings)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "bnpo"])
def test_accumulation_is_the_same_update(loss: str, model_dir: Path, tmp_path: Path) -> None:
    """TRL cuts the batch in two and adds up; here rows are packed as they fit."""
    settings = settings_for(loss, "token", "none", "", "group")
    settings |= {"per_device_train_batch_size": G, "gradient_accumulation_steps": 2}
    compare(settings, model_dir, tmp_path)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("together", ["sum_then_normalize", "normalize_then_sum"])
def test_rewards_to_gradients(scale: str, together: str, model_dir: Path, tmp_path: Path) -> None:
    """Two functions with weights, of which one does not apply to all."""
    compare(
        settings_of(scale_rewards=scale, multi_objective_aggregation=together, loss_type="grpo"),
        model_dir, tmp_path,
    )  # fmt: skip
