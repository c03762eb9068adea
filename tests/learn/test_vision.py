"""The learner sees: rows with images are scored as the plain module scores them, however they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import tiny_qwen3
from tests.support.vision import (
    FAMILIES,
    VlFamily,
    picture_block,
    plain_logits,
    plain_logprobs,
    vl_model,
    vl_processing,
    vl_renderer,
)

from turnwise.config import LoraConfig, ModelConfig
from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import LearnError, RecipeError
from turnwise.learn.batch import pack
from turnwise.learn.model import PolicyModel, load_model
from turnwise.learn.weights import LiveWeights
from turnwise.types import ImageBlock, Message, Sample, TextBlock

RENDERER = vl_renderer()
VISION = RENDERER.vision
assert VISION is not None
RED, WIDE, DOT = (
    picture_block("red", (16, 24)),
    picture_block("green", (64, 16)),
    picture_block("white", (8, 8)),
)


def sample(id: str, *shown: ImageBlock | str, replies: int = 2, temperature: float = 1.0) -> Sample:
    """A row that shows images before and between replies of random tokens."""
    rng = np.random.default_rng(len(id) + len(shown))
    blocks = tuple(TextBlock(text=one) if isinstance(one, str) else one for one in shown)
    rendered = RENDERER.prompt([Message.user(blocks)])
    ids, mask, images = list(rendered.ids), [False] * len(rendered.ids), list(rendered.images)
    for number in range(replies):
        if number:
            bridge = RENDERER.bridge(ids, [Message.user((TextBlock(text="And?"), *blocks[:1]))])
            assert bridge is not None
            ids, mask, images = ids + bridge.ids, mask + [False] * len(bridge.ids), [*images, *bridge.images]
        # Any id but the placeholders', which are the last.
        said = [*rng.integers(0, 400, 6).tolist(), RENDERER.stop_ids[0]]
        ids, mask = ids + said, mask + [True] * len(said)
    mask_T = np.array(mask)
    return Sample(
        token_ids_T=np.array(ids, dtype=np.int32),
        loss_mask_T=mask_T,
        logprobs_T=np.zeros(len(ids), dtype=np.float32),
        advantages_T=mask_T.astype(np.float32),
        weights_T=mask_T.astype(np.float32),
        versions_T=np.where(mask_T, 0, -1).astype(np.int32),
        trajectory_id=id,
        group_id="g",
        env="e",
        temperature=temperature,
        images=tuple(images),
    )


SAMPLES = [
    sample("one", RED, "What is this?"),
    sample("other", "Two: ", WIDE, " and ", DOT, replies=3),
    sample("words", "No picture."),
    sample("hot", DOT, RED, "?", temperature=0.7),
    sample("last", "Look: ", RED, replies=1),
]


def logprobs(model: PolicyModel, samples: Sequence[Sample], **packing: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for batch in pack(samples, together=model.packs, **packing):
        scored = model.logprobs(batch, chunk=16).logprobs_N
        owners = batch.documents_BT[batch.loss_mask_BT]
        for document, one in enumerate(batch.samples):
            found[one.trajectory_id] = scored[torch.from_numpy(owners == document)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", [{"micro_tokens": 4096, "row_tokens": 256}, {"micro_tokens": 1}])
def test_logprobs_are_the_plain_module_s(family: VlFamily, packing: dict[str, int]) -> None:
    module = vl_model(family)
    model = PolicyModel(vl_model(family), vision=VISION)
    assert model.packs
    with torch.no_grad():
        found = logprobs(model, SAMPLES, **packing)
    for one in SAMPLES:
        expected = plain_logprobs(module, one.token_ids_T, one.images, one.temperature)[one.loss_mask_T[1:]]
        np.testing.assert_allclose(found[one.trajectory_id], expected, atol=1e-4, rtol=0)


def gradients(model: PolicyModel, **packing: Any) -> dict[str, torch.Tensor]:
    model.module.zero_grad()
    model.training_mode(True)
    for one in logprobs(model, SAMPLES, **packing).values():
        one.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    model.training_mode(False)
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = float(other[name].abs().max()) + 1e-6
        torch.testing.assert_close(one[name] / scale, other[name] / scale, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_tower_whatever_the_packing(family: VlFamily) -> None:
    module = vl_model(family)
    for one in SAMPLES:
        logits = plain_logits(module, one.token_ids_T.tolist(), one.images) / one.temperature
        rows = logits.log_softmax(-1)[:-1][one.loss_mask_T[1:]]
        said = torch.from_numpy(one.token_ids_T[one.loss_mask_T]).long()
        rows[torch.arange(len(said)), said].sum().backward()
    plain = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    model = PolicyModel(vl_model(family), vision=VISION)
    packed = gradients(model, micro_tokens=4096, row_tokens=256)
    assert_close(packed, plain)
    assert packed["model.visual.patch_embed.proj.weight"].abs().max() > 0
    assert_close(gradients(model, micro_tokens=1), packed)
    model.checkpoint_activations()
    assert_close(gradients(model, micro_tokens=4096, row_tokens=256), packed)


def saved(path: Path, family: VlFamily = "qwen3_vl") -> str:
    vl_model(family).save_pretrained(path)
    vl_processing().save_pretrained(path)
    return str(path)


def test_the_tower_can_be_frozen(tmp_path: Path) -> None:
    name = saved(tmp_path)
    free = load_model(ModelConfig(name=name), device="cpu", vision=VISION)
    frozen = load_model(ModelConfig(name=name, freeze_vision=True), device="cpu", vision=VISION)
    names = {name for name, _ in frozen.trainable}
    assert (
        names == {name for name, _ in free.trainable if ".visual." not in name} < dict(free.trainable).keys()
    )
    for freeze in (False, True):
        config = ModelConfig(name=name, freeze_vision=freeze, lora=LoraConfig(r=4))
        adapted = [name for name, _ in load_model(config, device="cpu", vision=VISION).trainable]
        assert any(".visual." in name for name in adapted) is not freeze
        assert any(".language_model." in name for name in adapted)
    tiny_qwen3(hidden=32).save_pretrained(tmp_path / "blind")
    with pytest.raises(RecipeError, match="freeze_vision does nothing: Qwen3ForCausalLM has no vision tower"):
        load_model(ModelConfig(name=str(tmp_path / "blind"), freeze_vision=True), device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_adapters_are_what_the_engine_then_samples_with(family: VlFamily, tmp_path: Path) -> None:
    config = ModelConfig(name=saved(tmp_path, family), lora=LoraConfig(r=4))
    model = load_model(config, device="cpu", vision=VISION)
    with torch.no_grad():
        for _, parameter in model.trainable:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        found = logprobs(model, SAMPLES, micro_tokens=4096)
    engine_side = vl_model(family, seed=3)
    TransformersEngine(engine_side, vision=VISION)  # a copy runs on slots, this one stays plain
    engine_side.load_state_dict(dict(LiveWeights(model).tensors()), strict=False)
    one = SAMPLES[1]
    expected = plain_logprobs(engine_side, one.token_ids_T, one.images)[one.loss_mask_T[1:]]
    np.testing.assert_allclose(found["other"], expected, atol=1e-4, rtol=0)


def test_images_that_cannot_be_read_are_refused() -> None:
    model = PolicyModel(vl_model(), vision=VISION)
    for images, found in (
        (("0" * 64,), "trajectory one: image 0{64} is not stored here"),
        ((WIDE.sha256,) * 2, "trajectory one: a row of 12 image placeholders does not fit its 2 images"),
    ):
        (batch,) = pack([replace(SAMPLES[0], images=images)], micro_tokens=512)
        with pytest.raises(LearnError, match=found):
            model.logprobs(batch, chunk=8)
    (batch,) = pack([SAMPLES[0]], micro_tokens=512)
    with pytest.raises(LearnError, match="trajectory one has images, and the learner was given no image"):
        PolicyModel(vl_model()).logprobs(batch, chunk=8)
    with pytest.raises(RecipeError, match="that of Qwen3ForCausalLM unknown"):
        PolicyModel(tiny_qwen3(hidden=32), vision=VISION)
