"""`Vision`: what a vision-language model makes of an image: how many tokens it takes, which pixels, where.

Qwen2-VL's way, and that of its successors (Qwen2.5-VL, Qwen3-VL): an image is cut into patches in a grid, the
vision tower merges squares of them, and the template's one placeholder is repeated for each merged patch.
Positions have three axes (M-RoPE, https://arxiv.org/abs/2409.12191, section 2.1): text counts on all three
alike, an image's patches count their rows and columns from where it begins, and what follows goes on after
the longer side. For text a b, an image of 2 × 3 merged patches, text c:

    ids        a  b  i  i  i  i  i  i  c
    time       0  1  2  2  2  2  2  2  5
    height     0  1  2  2  2  3  3  3  5
    width      0  1  2  3  4  2  3  4  5

Nothing of torch is imported: pixels are numpy arrays here, which the engine and the learner make tensors of.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from turnwise import images
from turnwise.errors import ImageError, boundary
from turnwise.types import FloatArray, ImageBlock, Message

PIXELS_MEMORY = 256 << 20
"""Bytes of pixels that are kept as arrays: siblings see the same images."""
_MAX_GRIDS = 1 << 16
"""Images whose grid is remembered longer than their pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """An image as the vision tower takes it."""

    patches: FloatArray
    """``[patches, channels × frames × height × width of a patch]``."""
    grid: tuple[int, int, int]
    """Patches in time (1), height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An image in a row of tokens."""

    sha256: str
    start: int
    """Of its first placeholder."""
    grid: tuple[int, int, int]
    tokens: int


class Vision:
    """The image side of a processor. Used from any thread.

    Args:
        image_processor: An image processor of ``transformers``, of Qwen2-VL's kind.
        token: The placeholder, one for each image in the template's text.
        token_id: Its id.

    Raises:
        ImageError: The processor is of another kind.
    """

    def __init__(self, image_processor: Any, token: str, token_id: int) -> None:
        merge = getattr(image_processor, "merge_size", None)
        if merge is None or not hasattr(image_processor, "get_number_of_image_patches"):
            raise ImageError(
                f"{type(image_processor).__name__} does not cut images into a grid of patches as Qwen2-VL's "
                "does; use a model such as Qwen2.5-VL or Qwen3-VL"
            )
        self.token, self.token_id, self.merge = token, token_id, int(merge)
        self._processor = image_processor
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._pixels: OrderedDict[str, Pixels] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Vision, (self._processor, self.token, self.token_id)

    def fingerprint(self) -> str:
        """Hash of how images are processed."""
        settings = self._processor.to_dict()
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def tokens(self, sha256: str) -> int:
        """How many placeholders an image takes; from its size alone.

        Raises:
            ImageError: The image processor refuses it (too long and thin, say).
            StoreError: The image is nowhere to be found.
        """
        grid = self._grids.get(sha256)
        if grid is None:
            width, height = images.load(sha256).size
            with boundary(ImageError, f"image {sha256} ({width} × {height} pixels)"):
                patches = int(self._processor.get_number_of_image_patches(height, width))
            return patches // self.merge**2
        return grid[1] * grid[2] // self.merge**2

    def pixels(self, sha256: str) -> Pixels:
        """An image's pixels, resized and normalised; kept for whoever asks next.

        Raises:
            ImageError: The image processor refuses it.
            StoreError: The image is nowhere to be found.
        """
        with self._lock:
            found = self._pixels.get(sha256)
            if found is not None:
                self._pixels.move_to_end(sha256)
                return found
        image = images.load(sha256)
        with boundary(ImageError, f"image {sha256} ({image.width} × {image.height} pixels)"):
            made = self._processor(images=[image], return_tensors="np")
            time, height, width = (int(side) for side in made["image_grid_thw"][0])
            patches: FloatArray = np.ascontiguousarray(made["pixel_values"], dtype=np.float32)
        pixels = Pixels(patches=patches, grid=(time, height, width))
        with self._lock:
            if len(self._grids) >= _MAX_GRIDS:
                self._grids.clear()
            self._grids[sha256] = pixels.grid
            if sha256 not in self._pixels:
                self._pixels[sha256] = pixels
                self._used += patches.nbytes
            while self._used > PIXELS_MEMORY and len(self._pixels) > 1:
                self._used -= self._pixels.popitem(last=False)[1].patches.nbytes
        return pixels

    def grid(self, sha256: str) -> tuple[int, int, int]:
        """An image's grid of patches.

        Raises:
            ImageError: The image processor refuses it.
            StoreError: The image is nowhere to be found.
        """
        return self._grids.get(sha256) or self.pixels(sha256).grid

    def expand(self, ids: Sequence[int], hashes: Sequence[str]) -> list[int]:
        """Ids with one placeholder an image as ids with all of its placeholders.

        Raises:
            ImageError: There are not as many placeholders as images.
        """
        found = sum(token == self.token_id for token in ids)
        if found != len(hashes):
            raise ImageError(f"{found} placeholders {self.token} for {len(hashes)} images")
        left = iter(hashes)
        out: list[int] = []
        for token in ids:
            out += [token] * (self.tokens(next(left)) if token == self.token_id else 1)
        return out

    def place(self, ids: Sequence[int] | npt.NDArray[Any], hashes: Sequence[str]) -> list[Placed]:
        """Where images are in a whole row of tokens.

        Raises:
            ImageError: The placeholders are not those of the images.
        """
        at = np.flatnonzero(np.asarray(ids) == self.token_id)
        placed: list[Placed] = []
        position = 0
        for sha256 in hashes:
            grid = self.grid(sha256)
            count = grid[1] * grid[2] // self.merge**2
            mine = at[position : position + count]
            if len(mine) < count or mine[-1] - mine[0] != count - 1:
                break
            placed.append(Placed(sha256=sha256, start=int(mine[0]), grid=grid, tokens=count))
            position += count
        if len(placed) < len(hashes) or position < len(at):
            raise ImageError(
                f"a row of {len(at)} image placeholders does not fit its {len(hashes)} images, which take "
                f"{[self.tokens(sha256) for sha256 in hashes]}; is the image processor that of the model?"
            )
        return placed


def positions(length: int, placed: Sequence[Placed], merge: int) -> npt.NDArray[np.int64]:
    """Time, height and width of each token of a row, ``[3, length]``; see the head of this file.

    Args:
        length: Tokens in the row.
        placed: Its images in their order.
        merge: Patches along the side of a merged one.
    """
    out = np.empty((3, length), dtype=np.int64)
    done = following = 0
    for image in placed:
        text = image.start - done
        out[:, done : image.start] = np.arange(following, following + text)
        following += text
        height, width = image.grid[1] // merge, image.grid[2] // merge
        rows, columns = np.divmod(np.arange(image.tokens), width)
        done = image.start + image.tokens
        out[:, image.start : done] = following + np.stack([np.zeros_like(rows), rows, columns])
        following += max(height, width)
    out[:, done:] = np.arange(following, following + length - done)
    return out


def hashes_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The images of a conversation in their order."""
    return tuple(
        block.sha256
        for message in messages
        if not isinstance(message.content, str)
        for block in message.content
        if isinstance(block, ImageBlock)
    )
