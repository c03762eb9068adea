"""Runs whose policy sees: sampled, learned from, stored and resumed with images."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.end_to_end.tiny import Child, Trap, play
from tests.pipeline import gallery
from tests.support.tokenizers import tiny_tokenizer
from tests.support.vision import ending, vl_model, vl_processing, vl_renderer

from turnwise import images
from turnwise.chat.vision import hashes_of
from turnwise.config import BatchConfig, EnvConfig, ModelConfig, OptimizerConfig, Recipe
from turnwise.engines.scripted import ScriptedEngine
from turnwise.engines.transformers import TransformersEngine
from turnwise.envs import Env, tool
from turnwise.envs.registry import make
from turnwise.learn.learner import Learner
from turnwise.learn.losses.cross_entropy import cross_entropy
from turnwise.learn.model import PolicyModel, load_model
from turnwise.learn.normalise import weigh
from turnwise.learn.samples import Demonstrations
from turnwise.pipeline.rl import _with_old_logprobs
from turnwise.pipeline.updates import Update
from turnwise.rollout.arena import Arena
from turnwise.rollout.play import play_all
from turnwise.rollout.policies import ModelPolicy, ScriptedPolicy
from turnwise.rollout.policy import Context
from turnwise.rollout.record import EpisodeOrder
from turnwise.store import RunDir
from turnwise.types import ImageBlock, Message, Sample, Sampling, StopReason, Task, ToolCall, Trajectory

HERE = "tests.pipeline.gallery"


def saved(path: Path) -> str:
    ending(vl_model()).save_pretrained(path)
    vl_processing().save_pretrained(path)
    return str(path)


def recipe(model: dict[str, Any], **rl: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "seeing",
            "threads": 1,
            "model": model,
            "environments": {
                "mirror": {"env": f"{HERE}:Mirror", "rewards": {f"{HERE}:pictured": 1.0}},
            },
            "engine": {"max_sequences": 8, "max_context": 512, "prefill_tokens": 40},
            "rl": {
                "steps": 2, "groups": {"mirror": 2}, "group_size": 3, "minibatches": 2,
                "sampling": {"max_tokens": 60}, "optimizer": {"lr": 1e-3}, "kl": 0.01, **rl,
            },
        }
    )  # fmt: skip


def weights(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForImageTextToText

    return dict(AutoModelForImageTextToText.from_pretrained(path).named_parameters())


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_a_run_learns_from_what_it_was_shown(lora: Any, tmp_path: Path) -> None:
    name = saved(tmp_path / "model")
    play(recipe({"name": name, "lora": lora}), tmp_path / "seeing")
    run = RunDir(tmp_path / "seeing")
    trajectories = list(run.read("rl"))
    assert len(trajectories) == 12
    for one in trajectories:
        assert not one.stop_reason.failed and len(one.segments) == 1, "bridged throughout"
        (segment,) = one.segments
        read = [*segment.prompt, *(message for turn in segment.turns[:-1] for message in turn.feedback)]
        assert segment.images == hashes_of(read) and len(segment.images) >= 2
        (first,) = one.segments[0].prompt
        assert [block.type for block in first.content] == ["text", "image", "image"]  # type: ignore[union-attr]
    assert sum(one.stop_reason is StopReason.MAX_TURNS for one in trajectories) >= 6
    assert sum(one.metrics["cached_tokens"] for one in trajectories) > 12 * 30
    named = {sha256 for one in trajectories for sha256 in images.named_in(one)}
    assert {path.stem for path in run.images.iterdir()} == named

    for line in run.read_metrics("rl"):
        # What the engine sampled with is what the learner scores with, tokens behind images included.
        assert line["mismatch_max"] < 1e-4
    after, before = weights(run.latest("rl-model").path), weights(Path(name))  # type: ignore[union-attr]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".visual.blocks." in name for name in moved) and any(
        ".language_model." in name for name in moved
    )
    assert (run.latest("rl-model").path / "preprocessor_config.json").is_file()  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_images_that_it_left(tmp_path: Path) -> None:
    """A step is redone from disk, by a process that never saw its images."""
    made = recipe({"name": saved(tmp_path / "model")}, steps=3, checkpoint_every=50)
    path = tmp_path / "seeing"
    for trap in (
        Trap("trajectories/rl.jsonl", line=4),
        Trap("steps.jsonl", line=1),
        Trap("steps.jsonl", line=2),
    ):
        assert Child(made, path, trap=trap).wait() == -9
        run = RunDir(path)
        there = {file.stem for file in run.images.iterdir()}
        assert {sha256 for one in run.read("rl") for sha256 in images.named_in(one)} <= there
    child = Child(made, path)
    assert child.wait() == 0, child.said()
    ids = [one.id for one in RunDir(path).read("rl")]
    assert len(ids) == len(set(ids)) == 18 and len(list(RunDir(path).steps("rl"))) == 3


# ---------------------------------------------------------------------------------------------------


def painter(context: Context) -> Message:
    """Looks, sees, and says what it saw."""
    if context.turn == 0:
        return Message.assistant("", ToolCall(name="look", arguments={"closer": True}))
    (shown,) = [block for block in context.messages[-1].content if isinstance(block, ImageBlock)]
    pixel = images.load(shown.sha256).convert("RGB").getpixel((0, 0))
    color = next(color for color in gallery.COLORS if gallery.square(color).getpixel((0, 0)) == pixel)
    return Message.assistant("", ToolCall(name="answer", arguments={"color": color}))


async def played(policy: Any, count: int, sampling: Sampling) -> list[Trajectory]:
    """Episodes of TRL's kind of environment, by the run's own machinery."""
    config = EnvConfig.model_validate({"rewards": {f"{HERE}:colored": 1.0}})
    arena = Arena.of("painting", make(gallery.Painting), config)
    orders = [
        EpisodeOrder(
            id=f"rl/0/painting/{n}/s0", group_id=f"rl/0/painting/{n}", env="painting", seed=n,
            task={"color": gallery.COLORS[n % 3], "prompt": "Which colour?"},
        )
        for n in range(count)
    ]  # fmt: skip
    found = [
        one
        async for one in play_all(
            orders, arenas={"painting": arena}, policy=policy, sampling=sampling, sink=lambda one: None
        )
    ]
    return sorted(found, key=lambda one: one.task["color"])


def trained(learner: Learner, demonstrations: Sequence[Trajectory], steps: int) -> None:
    rows = [row for one in demonstrations for row in Demonstrations(vl_renderer()).samples(one)]
    assert all(len(row.images) == 1 for row in rows)
    for _ in range(steps):
        learner.forward_backward(weigh(rows, "token"), cross_entropy)
        learner.optim_step()


@pytest.mark.slow
def test_a_policy_learns_to_see(tmp_path: Path) -> None:
    """From demonstrations, the colour of a square that a tool shows: guessing it would pay a third."""
    shown = asyncio.run(played(ScriptedPolicy(painter), 3, Sampling()))
    for one in shown:
        assert one.stop_reason is StopReason.TERMINATED, one.error
        assert {name: reward.value for name, reward in one.rewards.items()} == {"reward": 1.0, "colored": 1.0}
    model = load_model(ModelConfig(name=saved(tmp_path)), device="cpu", vision=vl_renderer().vision)
    learner = Learner(
        model, vl_processing(), rows=BatchConfig(), total_steps=150,
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
    )  # fmt: skip
    trained(learner, shown, 150)

    async def answers() -> list[Trajectory]:
        async with TransformersEngine(model.module, vision=vl_renderer().vision, max_context=512) as engine:
            policy = ModelPolicy(engine, vl_renderer())
            return await played(policy, 6, Sampling(max_tokens=60, temperature=0.0))

    for one in asyncio.run(answers()):
        assert one.stop_reason is StopReason.TERMINATED, one.error
        assert [turn.message.tool_calls[0].name for turn in one.turns] == ["look", "answer"]
        assert one.rewards["reward"].value == 1.0 and one.rewards["colored"].value == 1.0
        logprobs = np.concatenate([turn.logprobs for turn in one.turns if turn.logprobs is not None])
        assert len(logprobs) == one.sampled_tokens


class Crop(Env):
    """Shows a part of its picture: of whatever shape the policy asks for."""

    inline = True

    def reset(self, task: Task) -> str:
        return "Look."

    @tool
    def crop(self, width: int, height: int) -> list[Any]:
        """Show a part."""
        return [{"type": "image", "image": gallery.square("red", (width, height))}]

    def reward(self) -> float:
        return 0.5


async def finished(
    orders: list[EpisodeOrder], arenas: dict[str, Arena], policy: ModelPolicy
) -> list[Trajectory]:
    playing = play_all(
        orders, arenas=arenas, policy=policy, sampling=Sampling(max_tokens=200), sink=lambda _: None
    )
    return [one async for one in playing]


def test_a_picture_that_the_processor_refuses_is_the_policy_s_doing() -> None:
    renderer = vl_renderer()
    call = ToolCall(name="crop", arguments={"width": 1, "height": 400})
    engine = ScriptedEngine(lambda _: renderer.reply(Message.assistant("", call)))
    arena = Arena.of("crop", make(Crop), EnvConfig())
    order = EpisodeOrder(id="rl/0/crop/0/s0", group_id="rl/0/crop/0", env="crop", seed=1, task={})
    policy = ModelPolicy(engine, renderer)
    (one,) = asyncio.run(finished([order], {"crop": arena}, policy))
    assert one.stop_reason is StopReason.FORFEITED and not one.stop_reason.failed
    assert one.error is not None and "1 × 400 pixels" in one.error.message
    assert one.reward is not None


def test_segments_of_the_same_ids_and_other_images_have_logprobs_of_their_own() -> None:
    renderer = vl_renderer()
    rows = []
    for color in ("red", "blue"):
        prompt = renderer.prompt([Message.user((images.put(gallery.square(color)),))], ())
        ids = np.array([*prompt.ids, 50, 60], dtype=np.int32)
        mask = np.arange(len(ids)) >= len(prompt.ids)
        zeros = np.zeros(len(ids), dtype=np.float32)
        rows.append(
            Sample(
                token_ids_T=ids, loss_mask_T=mask, logprobs_T=zeros, advantages_T=zeros + 1,
                weights_T=zeros + 1, versions_T=np.full(len(ids), -1, dtype=np.int32), trajectory_id="t",
                group_id="g", env="e", images=tuple(prompt.images),
            )
        )  # fmt: skip
    np.testing.assert_array_equal(rows[0].token_ids_T, rows[1].token_ids_T)
    learner = Learner(
        PolicyModel(vl_model(), vision=renderer.vision), tiny_tokenizer(), optimizer=OptimizerConfig(),
        rows=BatchConfig(), total_steps=1,
    )  # fmt: skip
    (update,) = _with_old_logprobs(learner, [Update(samples=tuple(rows), left_out=0, credit={})])
    wanted = learner.logprobs(rows)
    assert not np.allclose(wanted[0], wanted[1])
    for one, logprobs in zip(update.samples, wanted, strict=True):
        assert one.old_logprobs_T is not None
        np.testing.assert_allclose(one.old_logprobs_T, logprobs, atol=1e-5)
