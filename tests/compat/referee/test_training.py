"""Whole runs on the same episodes: after each update the same loss, and at the end the same weights.

A ``rollout_func`` says what was said, and with which probabilities under the weights of the moment. All else
is each package's own: rewards to advantages, ratios, gradients, accumulation, clipping, the optimizer and its
schedule, what is logged.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compat.referee.packages import PACKAGES, PackageName, Run, agree, train
from tests.compat.referee.scripted import tokenizer, user
from tests.compat.referee.scripts import place
from tests.support.models import tiny_qwen3

ROWS = [{"prompt": [user(f"Row {n}")], "answer": n} for n in range(6)]


def played(prompts: Sequence[Any], trainer: Any, *, masks: bool = True) -> dict[str, Any]:
    """TRL's ``rollout_func``: words by the prompt and the sibling's place, scored by the model as it is."""
    speaker = trainer.processing_class
    model = getattr(trainer.model, "module", trainer.model)
    out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    was = model.training
    model.eval()
    for prompt, sibling in zip(prompts, place(prompts), strict=True):
        rng = np.random.default_rng([zlib.crc32(str(prompt).encode()), sibling])
        context = speaker.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        length = int(rng.integers(3, 12))
        ids = rng.integers(400, size=length).tolist()
        own = (rng.random(length) < 0.7).astype(int) if masks else np.ones(length, dtype=int)
        own[0] = own[-1] = 1
        with torch.no_grad():
            logits = model(torch.tensor([list(context) + ids])).logits[0, len(context) - 1 : -1].float()
        logprobs = logits.log_softmax(-1)[torch.arange(length), torch.tensor(ids)].tolist()
        for name, value in (
            ("prompt_ids", list(context)), ("completion_ids", ids), ("logprobs", logprobs),
            ("env_mask", own.tolist()),
        ):  # fmt: skip
            out[name].append(value)
    model.train(was)
    return out


def words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean(ids)) / 400 for ids in completion_ids]


def lengths(completion_ids: list[list[int]], answer: list[int], **_: Any) -> list[float | None]:
    return [None if n == 1 else len(ids) / 12 for ids, n in zip(completion_ids, answer, strict=True)]


def learn(package: PackageName, out: Path, **settings: Any) -> Run:
    # By its path: TRL loads the reference model from where the policy came from.
    path = out / "model"
    tiny_qwen3(hidden=32, tie=False).save_pretrained(path)
    return train(
        package, str(path), out / "run", rows=ROWS,
        given={"reward_funcs": [words, lengths], "rollout_func": played},
        **{
            "model_init_kwargs": {"dtype": "float32"},
            "learning_rate": 1e-2, "max_steps": 4, "max_completion_length": 12, "reward_weights": [1.0, 0.5],
            # Otherwise the sign of a gradient that is 0 but for rounding would be a step of its own.
            "adam_epsilon": 1e-3,
            **settings,
        },
    )  # fmt: skip


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "grpo in parts": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "grpo",
    },
    "iterations": {"num_iterations": 2, "epsilon": 0.02},
    "reference": {"beta": 0.1, "num_iterations": 2},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "batch scale": {"scale_rewards": "batch"},
    "gspo": {
        "importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "epsilon": 3e-3,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "vespo": {"loss_type": "vespo", "num_iterations": 2},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "entropy": {"entropy_coef": 0.01},
    "schedule": {
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.1,
        "adam_beta2": 0.95,
    },
    "no clipping of gradients": {"max_grad_norm": 0.0},
    "constant rate": {"lr_scheduler_type": "constant"},
    "two sides": {"delta": 1.05, "epsilon": 0.02, "num_iterations": 2},
    "temperature": {"temperature": 0.7},
}  # fmt: skip
SHARES: dict[str, tuple[str, ...]] = {
    "gspo": ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    "vespo": ("vespo/phi_seq_mean",),
}
"""Means over sequences in TRL, where a sequence has one ratio; ours are over tokens, as all others are."""
FAST = ("accumulation", "iterations", "schedule")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_the_same_weights_after_the_same_episodes(
    name: str, both: Callable[[Callable[[PackageName, Path], Run]], tuple[Run, Run]]
) -> None:
    theirs, ours = both(lambda package, out: learn(package, out, **SETTINGS[name]))
    agree(theirs.log, ours.log, tolerance=1e-4, apart=SHARES.get(name, ()))
    start = tiny_qwen3(hidden=32, tie=False).state_dict()
    moved = 0.0
    found = ours.weights()
    for parameter, wanted in theirs.weights().items():
        moved = max(moved, float((wanted - start[parameter]).abs().max()))
        torch.testing.assert_close(found[parameter], wanted, rtol=1e-4, atol=2e-5, msg=parameter)
    assert moved > 1e-3, "something was learned"


@pytest.mark.slow
def test_a_warm_up_is_one_update_ahead_of_transformers(
    both: Callable[[Callable[[PackageName, Path], Run]], tuple[Run, Run]],
) -> None:
    """There the first update has a rate of 0 and is lost; ours is already a part of the rise."""
    theirs, ours = both(lambda package, out: learn(package, out, warmup_steps=4, max_steps=8))
    their, our = ([line["learning_rate"] for line in run.steps] for run in (theirs, ours))
    assert (their[0], our[0]) == (0.0, pytest.approx(0.0025))
    assert our[:4] == pytest.approx(their[1:5])
    assert our[4:] == pytest.approx(their[4:])


@pytest.mark.slow
def test_other_fields_of_a_rollout_reach_the_reward_functions(tmp_path: Path) -> None:
    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        return {
            **played(prompts, trainer, masks=False),
            "steps_taken": [float(sibling) for sibling in place(prompts)],
            "shared": "one for all",
        }

    def taken(steps_taken: list[float], shared: list[str], **_: Any) -> list[float]:
        assert set(shared) == {"one for all"}
        return steps_taken

    for package in PACKAGES:
        run = train(
            package, tiny_qwen3(hidden=32), tmp_path / package, rows=ROWS, max_steps=1,
            given={"reward_funcs": taken, "rollout_func": rollout},
        )  # fmt: skip
        assert run.steps[0]["rewards/taken/mean"] == 1.5, package


def test_a_rollout_that_lacks_something_is_told_what(tmp_path: Path) -> None:
    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        found = played(prompts, trainer)
        del found["logprobs"]
        return found

    for package in PACKAGES:
        with pytest.raises(Exception, match="logprobs"):
            train(
                package, tiny_qwen3(hidden=32), tmp_path / package, rows=ROWS, max_steps=1,
                given={"reward_funcs": words, "rollout_func": rollout},
            )  # fmt: skip


def test_the_function_is_asked_for_every_sibling(tmp_path: Path) -> None:
    """Prompts come repeated, once for each completion that is wanted, whatever TRL's docstring says."""
    for package in PACKAGES:
        asked: list[Any] = []

        def rollout(prompts: Sequence[Any], trainer: Any, asked: list[Any] = asked) -> dict[str, Any]:
            asked.extend(prompts)
            return played(prompts, trainer)

        train(
            package, tiny_qwen3(hidden=32), tmp_path / package, rows=ROWS, max_steps=1,
            given={"reward_funcs": words, "rollout_func": rollout},
        )  # fmt: skip
        assert sorted(map(str, asked)) == sorted(str(row["prompt"]) for row in ROWS[:2] for _ in range(4))
        assert tokenizer().apply_chat_template(asked[0], tokenize=False)
