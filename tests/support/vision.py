"""Tiny vision-language models of Qwen's families, with a tokenizer, an image processor and pictures."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from PIL import Image

from tests.support.tokenizers import tiny_tokenizer, trl_template
from turnwise import images
from turnwise.chat.processing import Processing
from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.types import ImageBlock, Message

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VlFamily = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[VlFamily, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH, MERGE = 4, 2
"""A token stands for 8 × 8 pixels."""


def picture(color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A picture that is all of one colour, but for a spot that shows which side is up."""
    image = Image.new("RGB", size, color)
    image.putpixel((1, 2), (7, 90, 180))
    return image


def picture_block(color: str = "red", size: tuple[int, int] = (16, 16)) -> ImageBlock:
    """The same, stored."""
    return images.put(picture(color, size))


@functools.cache
def vl_tokenizer() -> Any:
    """With the placeholders of Qwen's vision models and Qwen3-VL's own template."""
    return tiny_tokenizer(trl_template("qwen3_vl"), specials=VISION_TOKENS, vocab_size=420)


@functools.cache
def vl_image_processor() -> Any:
    """Of Qwen2-VL's kind, for pictures of 1 to 64 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    )


class TinyProcessor:
    """What a processor of transformers is, without the video processor that needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer, self.image_processor = vl_tokenizer(), vl_image_processor()
        self.image_token, self.chat_template = "<|image_pad|>", None

    def save_pretrained(self, directory: Any) -> None:
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)


def vl_processing() -> Processing:
    """The tiny processor as Turnwise takes it."""
    return Processing.of(TinyProcessor())


@functools.cache
def vl_renderer() -> TemplateRenderer:
    """A renderer that reads images."""
    return load_renderer(vl_processing())


def vl_model(family: VlFamily = "qwen3_vl", *, seed: int = 0, layers: int = 3) -> Any:
    """A random model, in float32 and in evaluation mode."""
    import transformers as hf

    tokenizer = vl_tokenizer()
    ids = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    common = {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision: dict[str, Any] = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE,
        "temporal_patch_size": 2, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "qwen3_vl":
        text |= {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {
            "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        config: Any = hf.Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **common
        )
        return hf.Qwen3VLForConditionalGeneration(config).eval()
    text |= {"rope_parameters": rope}
    if family == "qwen2_5_vl":
        vision |= {
            "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **common
        )
        return hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **common)
    return hf.Qwen2VLForConditionalGeneration(config).eval()


def plain_logits(model: Any, ids: Any, hashes: Any) -> torch.Tensor:
    """The module's own logits ``[tokens, vocabulary]`` of a row with images, the placeholder never said."""
    row = torch.tensor([list(ids)])
    shown: dict[str, Any] = {}
    if hashes:
        processed = vl_image_processor()(images=[images.load(one) for one in hashes], return_tensors="pt")
        shown = {**processed, "mm_token_type_ids": (row == model.config.image_token_id).int()}
    model.model.rope_deltas = None
    logits: torch.Tensor = model(input_ids=row, use_cache=False, **shown).logits[0]
    model.model.rope_deltas = None
    return logits.index_fill(-1, torch.tensor([model.config.image_token_id]), float("-inf"))


def plain_logprobs(model: Any, ids: Any, hashes: Any, temperature: float = 1.0) -> Any:
    """Of each token but the first, after those before it, float64 after the logits."""
    with torch.inference_mode():
        rows = (plain_logits(model, ids, hashes).double() / temperature).log_softmax(-1)[:-1]
    return rows[torch.arange(len(ids) - 1), torch.tensor(list(ids))[1:]].numpy()


@torch.no_grad()
def ending(model: Any) -> Any:
    """The model, made to end its replies after a few tokens: a random one never would."""
    rendered = vl_renderer().prompt([Message.user("What is it?")])
    tokenizer = vl_tokenizer()
    states = model.model(input_ids=torch.tensor([rendered.ids])).last_hidden_state[0, -20:]
    mean = states.mean(0)
    row = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<|im_end|>")]
    row.copy_(mean * 7.0 / mean.dot(mean))
    return model
