"""Promise 1 with images: what a processor would write whole is what prompt, replies and bridges are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support.tokenizers import tiny_tokenizer, trl_template
from tests.support.vision import (
    FAMILIES,
    VISION_TOKENS,
    TinyProcessor,
    VlFamily,
    picture_block,
    vl_image_processor,
    vl_model,
    vl_processing,
    vl_renderer,
)

from turnwise import images
from turnwise.chat.processing import Processing
from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.chat.vision import Placed, hashes_of, positions
from turnwise.errors import ImageError, TemplateError
from turnwise.types import ImageBlock, Message, TextBlock, ToolCall, ToolSchema

LOOK = ToolSchema(
    name="look",
    description="Look.",
    parameters={"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
)
PICTURES = [picture_block("red", size) for size in ((8, 8), (16, 24), (64, 16), (40, 40))]
TEMPLATES = ("qwen3_vl", "qwen2_5_vl", "qwen3_5_nothink", "qwen3_6")


@functools.cache
def renderer(template: str, **kwargs: Any) -> TemplateRenderer:
    return load_renderer(vl_processing(), chat_template=trl_template(template), chat_template_kwargs=kwargs)


blocks = st.lists(
    st.sampled_from(PICTURES)
    | st.sampled_from(["Look:", " ", "<|image_pad|>", "<|vision_start|>", "Ünï\n漢字", "a"]).map(
        lambda text: TextBlock(text=text)
    ),
    min_size=1,
    max_size=5,
).map(tuple)


def whole(made: TemplateRenderer, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
    """As processors do it: in the template's text each placeholder is repeated, which is then tokenised."""
    text = made.template.render(messages, tools, generate=True)
    for sha256 in hashes_of(messages):
        image = images.load(sha256).convert("RGB")
        grid = vl_image_processor()(images=[image], return_tensors="np")["image_grid_thw"][0]
        text = text.replace("<|image_pad|>", "<|done|>" * int(grid.prod() // 4), 1)
    return made.template.encoder.encode(text.replace("<|done|>", "<|image_pad|>"))


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(first=blocks, results=st.lists(blocks, min_size=1, max_size=2), then=blocks)
def test_prompt_and_bridges_are_the_whole_conversation(
    template: str, first: Any, results: Any, then: Any
) -> None:
    made = renderer(template)
    tools = [] if made.tools_problem else [LOOK]
    messages = [Message.user(first)]
    rendered = made.prompt(messages, tools)
    assert rendered.ids == whole(made, messages, tools) and rendered.images == hashes_of(messages)
    held = list(rendered.ids)
    told: list[Message] = []
    calls = [ToolCall(name="look", arguments={"at": "a"}, id=f"call_{n}") for n in range(len(results))]
    turns = [(Message.assistant("Yes."), [Message.user(then)])]
    if tools:
        answers = [Message.tool(shown, call=call) for shown, call in zip(results, calls, strict=True)]
        turns.insert(0, (Message.assistant("", *calls), answers))
    for reply, new in turns:
        bridge = made.bridge(held + made.reply(reply, tools, held), new, tools)
        if bridge is None:
            assert not made.image_reports[bool(tools)].bridges
            return
        held += [*made.reply(reply, tools, held), *bridge.ids]
        assert bridge.images == hashes_of(new)
        told += [reply, *new]
        if made.image_reports[bool(tools)].exact:
            assert (
                held == made.prompt([*messages, *told], tools).ids == whole(made, [*messages, *told], tools)
            )
    shown = [*messages, *told]
    assert held.count(made.vision.token_id) == sum(made.vision.tokens(one) for one in hashes_of(shown))  # type: ignore[union-attr]


def test_a_template_that_numbers_its_pictures_cannot_be_bridged() -> None:
    made = renderer("qwen3_vl", add_vision_id=True)
    assert made.reports[True].bridges and not made.image_reports[True].bridges
    assert "Picture" in made.image_reports[True].note
    prompt = made.prompt([Message.user((PICTURES[0],))], [LOOK])
    held = [*prompt.ids, *made.reply(Message.assistant("Yes."), [LOOK], prompt.ids)]
    assert made.bridge(held, [Message.user((PICTURES[0],))], [LOOK]) is None
    blind = made.prompt([Message.user("Hello.")], [LOOK]).ids
    held = [*blind, *made.reply(Message.assistant("Yes."), [LOOK], blind)]
    assert made.bridge(held, [Message.user("And?")], [LOOK]) is not None, "without pictures it can"


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_model_s(family: VlFamily) -> None:
    model, vision = vl_model(family), vl_renderer().vision
    assert vision is not None
    rendered = vl_renderer().prompt([Message.user((*PICTURES, TextBlock(text="and"), *PICTURES[1:3]))])
    placed = vision.place(rendered.ids, rendered.images)
    ids = torch.tensor([rendered.ids])
    theirs, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([one.grid for one in placed]),
    )
    assert np.array_equal(positions(len(rendered.ids), placed, vision.merge), theirs[:, 0].numpy())


def test_the_worked_example() -> None:
    placed = [Placed(sha256="0", start=2, grid=(1, 4, 6), tokens=6)]
    assert positions(9, placed, 2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_tokens_of_a_size_are_those_of_the_pixels() -> None:
    vision = vl_renderer().vision
    assert vision is not None
    for size in ((8, 8), (9, 31), (100, 20), (300, 200), (1, 3)):
        block = picture_block("red", (max(size[0], 2), max(size[1], 3)))
        count = vision.tokens(block.sha256)
        pixels = vision.pixels(block.sha256)
        assert count == len(pixels.patches) // 4 == vision.tokens(block.sha256)
        assert vision.grid(block.sha256) == pixels.grid
    with pytest.raises(ImageError, match=r"2 × 900 pixels"):
        vision.tokens(images.put(Image.new("RGB", (2, 900))).sha256)


def test_images_that_are_not_written_are_refused() -> None:
    user = Message.user((PICTURES[0],))
    blind = load_renderer(tiny_tokenizer(trl_template("qwen3_vl"), specials=VISION_TOKENS))
    with pytest.raises(TemplateError, match="a user message holds an image, and there is no image processor"):
        blind.prompt([user])
    made = renderer("qwen3_vl")
    for role, message in (
        ("system", Message.system((PICTURES[0],))),
        ("assistant", Message.assistant((PICTURES[0],))),
    ):
        with pytest.raises(TemplateError, match=f"a {role} message holds an image; users' messages"):
            made.prompt([message, user])
    deaf = trl_template("qwen3_vl").replace("<|vision_start|><|image_pad|><|vision_end|>", "", 1)
    drops = load_renderer(vl_processing(), chat_template=deaf)
    assert drops.template.image_roles == {"tool"}
    with pytest.raises(TemplateError, match="wrote 0 placeholders <\\|image_pad\\|> for the 1 images"):
        drops.prompt([user])


def test_another_image_processor_is_another_harness() -> None:
    assert vl_renderer().fingerprint == load_renderer(vl_processing()).fingerprint
    processor = TinyProcessor()
    processor.image_processor = type(processor.image_processor)(
        **processor.image_processor.to_dict() | {"size": {"shortest_edge": 256, "longest_edge": 4096}}
    )
    assert load_renderer(processor).fingerprint != vl_renderer().fingerprint
    processor.image_processor = object()
    text = load_renderer(processor)
    assert text.vision is None, "text is read all the same"
    assert text.fingerprint != vl_renderer().fingerprint


def test_a_processor_is_saved_and_found_again(tmp_path: Path) -> None:
    vl_model().save_pretrained(tmp_path)
    vl_processing().save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 2}')
    found = Processing.of(str(tmp_path))
    assert load_renderer(found).fingerprint == vl_renderer().fingerprint
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/video_preprocessor_config.json").read_text() == '{"fps": 2}'
    assert load_renderer(tmp_path).fingerprint == load_renderer(found).fingerprint


def test_shown_images_are_in_the_order_of_their_placeholders() -> None:
    one, two = PICTURES[1], PICTURES[2]
    messages = [Message.user((one, TextBlock(text="a"), two)), Message.user((ImageBlock(sha256=one.sha256),))]
    assert hashes_of(messages) == (one.sha256, two.sha256, one.sha256)
    assert renderer("qwen3_vl").prompt(messages).images == hashes_of(messages)
