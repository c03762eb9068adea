"""Images for the learner: pixels and positions of a batch whose samples show some.

The model itself puts the vision tower's features where placeholders are, so gradients reach whatever of it is
trained. Rows are packed as text is: documents are told apart by their places in the row, which stand beside
the three axes that the model's rotary embedding takes (`turnwise.chat.vision`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnwise.chat.vision import Vision, positions
from turnwise.errors import ImageError, LearnError, RecipeError, StoreError
from turnwise.learn.adapters import bare
from turnwise.types import Batch


class Sight:
    """How a model reads images.

    Args:
        model: A causal language model of ``transformers``, without adapters around it.
        vision: The image side of its processor; None reads text alone.

    Raises:
        RecipeError: They do not belong together.
    """

    def __init__(self, model: Any, vision: Vision | None) -> None:
        self.vision = vision
        self.tower: Any = getattr(model.base_model, "visual", None) if _fits(model) else None
        """Of models that see."""
        self.muted: int | None = model.config.image_token_id if self.tower is not None else None
        """An image's placeholder, which the engine never samples either."""
        if vision is not None and vision.token_id != self.muted:
            raise RecipeError(
                f"the processor's image placeholder {vision.token} is {vision.token_id}, and that of "
                f"{type(model).__name__} {'is ' + str(self.muted) if self.tower is not None else 'unknown'}: "
                "train a model such as Qwen2.5-VL or Qwen3-VL with its own processor"
            )

    def inputs(self, batch: Batch, device: torch.device) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Positions ``[4, B, T]`` (in the row, then time, height and width), and what else the model takes.

        Neither for a batch without images.

        Raises:
            LearnError: There are images and no processor, or they are not those of the placeholders.
        """
        if not any(sample.images for sample in batch.samples):
            return None, {}
        axes_4BT = np.broadcast_to(batch.positions_BT, (4, *batch.positions_BT.shape)).astype(np.int64)
        pixels = []
        for document, sample in enumerate(batch.samples):
            if self.vision is None:
                raise LearnError(
                    f"trajectory {sample.trajectory_id} has images, and the learner was given no image "
                    "processor: train a vision-language model with its processor"
                )
            try:
                placed = self.vision.place(sample.token_ids_T, sample.images)
                pixels += [self.vision.pixels(sha256) for sha256 in sample.images]
            except (ImageError, StoreError) as cause:
                raise LearnError(f"trajectory {sample.trajectory_id}: {cause}") from cause
            row, start = np.argwhere(batch.documents_BT == document)[0]
            length = batch.documents_BT.shape[1] - start
            axes_4BT[1:, row, start:] = positions(length, placed, self.vision.merge)
        patches = torch.from_numpy(np.concatenate([one.patches for one in pixels]))
        grids = torch.tensor([one.grid for one in pixels])
        shown = {"pixel_values": patches.to(device), "image_grid_thw": grids.to(device)}
        return torch.from_numpy(axes_4BT).to(device), shown

    def nothing(self) -> Tensor:
        """0, made of every weight of the tower that is trained: their gradients are 0, and not missing."""
        weights = [weight for weight in self.tower.parameters() if weight.requires_grad]
        return (
            torch.stack([0 * weight.flatten()[0] for weight in weights]).sum() if weights else torch.zeros(())
        )


def _fits(model: Any) -> bool:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope and hasattr(model.config, "image_token_id")


def freeze_tower(module: Any) -> None:
    """Leave the vision tower out of training.

    Raises:
        RecipeError: The model has none that is known.
    """
    model = bare(module)
    tower = Sight(model, None).tower
    if tower is None:
        raise RecipeError(
            f"model.freeze_vision does nothing: {type(model).__name__} has no vision tower; remove it"
        )
    tower.requires_grad_(False)
