"""Images in the embedded engine, for models of Qwen2-VL's kind (Qwen2.5-VL, Qwen3-VL).

`VisionForward` computes steps that hold images: features stand where placeholders do, positions have three
axes. `Sight` makes the features, once for each image and version of the weights, in the first step that needs
them:

    ids      a  b  i  i  i  i  c        computed in two steps, a b i i | i i c
    seen           f0 f1 f2 f3          the first is given f0 f1, the second f2 f3

In the engine's bookkeeping a placeholder is a negative number made of its image's hash. Two prompts that show
different images then differ as token rows do, and those that show the same one share its KV.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turnwise.chat.vision import Pixels, Placed, Vision, positions
from turnwise.engines.kv import Geometry, Seen, SlotCache, Step
from turnwise.engines.request import Request
from turnwise.errors import EngineError

Int64Array = npt.NDArray[np.int64]

KEPT_TOKENS = 16_384
"""Image tokens whose features are kept: 64 MB of a small model's, a GB of a large one's."""
_PROBE_TOKENS, _PROBE_START, _PROBE_CUT = 24, 5, 8
"""The probe's image begins in its middle, and is cut by the end of the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the vision tower makes of an image."""

    tokens: Tensor
    """``[tokens, hidden]``, in place of embeddings."""
    deep: tuple[Tensor, ...]
    """Added behind the first layers (DeepStack); empty for families without."""


def coded(prompt: Sequence[int] | Int64Array, placed: Sequence[Placed]) -> Int64Array:
    """A prompt whose placeholders name their images."""
    out = np.array(prompt, dtype=np.int64)
    for image in placed:
        out[image.start : image.start + image.tokens] = -1 - int(image.sha256[:15], 16)
    return out


class VisionForward:
    """The language half of the transformers module, given features in place of pixels."""

    def __init__(self, model: Any) -> None:
        self._decoder, self._head = model.model.language_model, model.lm_head
        self._embed = self._decoder.get_input_embeddings()
        self.image_token = int(model.config.image_token_id)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model is of this kind."""
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        inner = getattr(model, "model", None)
        return "mrope_section" in rope and all(
            hasattr(inner, part) for part in ("language_model", "visual", "get_image_features")
        )

    def __call__(self, step: Step, cache: SlotCache) -> Tensor:
        """Logits ``[R, vocabulary]`` of the rows in ``step.outputs``."""
        embeds = self._embed(step.token_ids)
        deep: dict[str, Any] = {}
        if step.seen is not None:
            embeds = embeds.index_copy(0, step.seen.rows, step.seen.features)
            if step.seen.deep:
                shown = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
                shown[step.seen.rows] = True
                deep = {"visual_pos_masks": shown[None], "deepstack_visual_embeds": list(step.seen.deep)}
        axes = step.positions.expand(3, -1) if step.axes is None else step.axes
        states: Tensor = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=axes[:, None],
            use_cache=False,
            turnwise_step=step,
            turnwise_cache=cache,
            **deep,
        ).last_hidden_state[0]
        logits: Tensor = self._head(states.index_select(0, step.outputs))
        return logits

    def refresh(self) -> None:
        """Nothing to do: the module reads its own weights."""


class Sight:
    """The features of images, and where the images of a step are. Confined to the engine's thread.

    Args:
        model: Whose vision tower to use.
        vision: Gives pixels.
    """

    def __init__(self, model: Any, vision: Vision) -> None:
        if vision.token_id != model.config.image_token_id:
            raise EngineError(
                f"the processor's image placeholder {vision.token} is {vision.token_id}, the model's is "
                f"{model.config.image_token_id}: they do not belong together"
            )
        self.vision = vision
        self._inner = model.model
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._tokens = 0

    def knows(self, sha256: str) -> bool:
        """Whether an image's features are at hand; may be asked from any thread."""
        return sha256 in self._features

    def forget(self) -> None:
        """The weights have changed."""
        self._features.clear()
        self._tokens = 0

    def look(
        self,
        step: Step,
        decoding: Int64Array,
        shifts: Int64Array,
        chunks: Sequence[tuple[int, int, int]],
        requests: Sequence[Request],
    ) -> None:
        """Put axes and features into a step.

        Args:
            step: Without them.
            decoding: ``[n]``: positions of the tokens that decode.
            shifts: ``[n]``: how far their place on each axis is behind (images take many tokens and few
                places).
            chunks: (slot, start, tokens) of those that are prefilled.
            requests: Of the chunks.
        """
        pieces = [np.broadcast_to(decoding + shifts, (3, len(decoding)))]
        shown: list[tuple[int, Placed, int, int]] = []
        row = len(decoding)
        for (_, start, count), request in zip(chunks, requests, strict=True):
            stop = start + count
            pieces.append(request.axes(start, stop))
            for image in request.images:
                first, last = max(start, image.start), min(stop, image.start + image.tokens)
                if first < last:
                    shown.append((row + first - start, image, first - image.start, last - image.start))
            row += count
        device = step.positions.device
        step.axes = torch.from_numpy(np.concatenate(pieces, axis=1)).to(device)
        if shown:
            found = self._found([image for _, image, _, _ in shown])
            parts = [(found[image.sha256], slice(first, last)) for _, image, first, last in shown]
            rows = [np.arange(row, row + last - first) for row, _, first, last in shown]
            step.seen = seen_of(np.concatenate(rows), parts, device)

    def _found(self, placed: Sequence[Placed]) -> dict[str, Features]:
        """The features of images; those that are missing are made in one call."""
        wanted = {image.sha256: image.tokens for image in placed}
        missing = [sha256 for sha256 in wanted if sha256 not in self._features]
        if missing:
            made = encode(self._inner, [self.vision.pixels(sha256) for sha256 in missing])
            for sha256, features in zip(missing, made, strict=True):
                self._features[sha256] = features
                self._tokens += wanted[sha256]
        for sha256 in wanted:
            self._features.move_to_end(sha256)
        found = {sha256: self._features[sha256] for sha256 in wanted}
        while self._tokens > KEPT_TOKENS and len(self._features) > 1:
            self._tokens -= len(self._features.popitem(last=False)[1].tokens)
        return found


def encode(inner: Any, pictures: Sequence[Pixels]) -> list[Features]:
    """The vision tower's answer to several images; ``inner`` is the model without its head."""
    parameter = next(inner.visual.parameters())
    patches = torch.from_numpy(np.concatenate([pixels.patches for pixels in pictures]))
    grids = torch.tensor([pixels.grid for pixels in pictures], device=parameter.device)
    output = inner.get_image_features(patches.to(parameter.device, parameter.dtype), grids, return_dict=True)
    deep = getattr(output, "deepstack_features", None) or []
    return [
        Features(tokens=tokens, deep=tuple(layer[index] for layer in deep))
        for index, tokens in enumerate(output.pooler_output)
    ]


def seen_of(rows: Int64Array, parts: Sequence[tuple[Features, slice]], device: torch.device) -> Seen:
    """Parts of images, in the order of their rows."""
    depth = len(parts[0][0].deep)
    return Seen(
        rows=torch.from_numpy(rows).to(device),
        features=torch.cat([features.tokens[part] for features, part in parts]),
        deep=[torch.cat([features.deep[layer][part] for features, part in parts]) for layer in range(depth)],
    )


# ---------------------------------------------------------------------------------------------------


class ImageProbe:
    """A small made-up image among made-up tokens, to see that slots and chunks change nothing."""

    def __init__(self, model: Any) -> None:
        self._model = model
        merge = int(model.model.visual.spatial_merge_size)
        grid = (1, 2 * merge, 3 * merge)
        generator = np.random.default_rng(0)
        width = int(np.prod(model.model.visual.patch_embed.proj.weight.shape[1:]))
        patches = generator.standard_normal((grid[1] * grid[2], width), dtype=np.float32)
        self._pixels = Pixels(patches=patches, grid=grid)
        self._placed = Placed(sha256="0" * 64, start=_PROBE_START, grid=grid, tokens=6)
        # Ids at the vocabulary's end are placeholders and other control tokens.
        ids = generator.integers(0, model.config.get_text_config().vocab_size // 2, _PROBE_TOKENS)
        ids[_PROBE_START : _PROBE_START + self._placed.tokens] = model.config.image_token_id
        self._ids: Int64Array = ids
        self._axes = positions(_PROBE_TOKENS, [self._placed], merge)

    @torch.inference_mode()
    def reference(self) -> Tensor:
        """The plain model's logits ``[tokens, vocabulary]``."""
        device = next(self._model.parameters()).device
        ids = torch.from_numpy(self._ids).to(device)[None]
        logits: Tensor = self._model(
            input_ids=ids,
            mm_token_type_ids=(ids == self._model.config.image_token_id).int(),
            pixel_values=torch.from_numpy(self._pixels.patches).to(device),
            image_grid_thw=torch.tensor([self._pixels.grid], device=device),
            use_cache=False,
        ).logits[0]
        self._model.model.rope_deltas = None
        return logits

    @torch.inference_mode()
    def check(self, forward: VisionForward, geometry: Geometry, reference: Tensor) -> float:
        """The largest difference of the same over slots, relative to the logits' spread."""
        parameter = next(self._model.parameters())
        cache = SlotCache(
            geometry, slots=2, context=_PROBE_TOKENS, dtype=parameter.dtype, device=parameter.device
        )
        (features,) = encode(self._model.model, [self._pixels])
        nobody = np.empty(0, dtype=np.int64)
        found = []
        for start, stop in ((0, _PROBE_CUT), (_PROBE_CUT, _PROBE_TOKENS)):
            step = cache.plan(
                decode_slots=nobody,
                decode_positions=nobody,
                chunks=[(1, start, stop - start)],
                token_ids=self._ids[start:stop],
                outputs=np.arange(stop - start),
            )
            first = max(start, _PROBE_START)
            last = min(stop, _PROBE_START + self._placed.tokens)
            part = slice(first - _PROBE_START, last - _PROBE_START)
            step.seen = seen_of(np.arange(first - start, last - start), [(features, part)], parameter.device)
            step.axes = torch.from_numpy(self._axes[:, start:stop]).to(parameter.device)
            found.append(forward(step, cache))
        difference = (torch.cat(found).float() - reference.float()).abs().max()
        return float(difference / reference.float().std().clamp(min=1e-6))
