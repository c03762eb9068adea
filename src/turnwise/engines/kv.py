"""Keys and values in fixed slots, and attention over them. KV is written once and read in place.

One tensor holds everything: ``[layers, 2, slots, kv_heads, context, head_dim]``. A step is a packed row of
tokens of many sequences; `Step` says where each token belongs. Sequences that add a single token are attended
together, in windows over neighbouring slots with a length mask and the query heads of one KV head as the
query axis (KV is never repeated nor gathered: gathering it for each step made a prototype three times
slower). Longer additions (prompts, bridges) are attended one by one, each over its own slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Int64Array = npt.NDArray[np.int64]

LENGTH_BUCKET = 16
"""Windows end at a multiple of this: aligned masks, and few distinct shapes."""
CALL_COST = 512
"""What one attention call costs beyond its work, in units of slots × positions; measured on CPU."""

MAX_VIEWS = 4096
"""Views of the cache that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shape of a model's keys and values; equal for all of its layers."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(slots=True, kw_only=True)
class Window:
    """Neighbouring slots, most of them decoding, attended in one call.

    Slots 4, 5 and 7 decode, 6 is idle:

        first=4  last=8  row=0  rows=3  offsets=[0, 1, 3]  lengths=[9, 7, 1, 8]
    """

    first: int
    last: int
    """One past the last slot."""
    row: int
    """The packed row of the first query; the others follow it."""
    rows: int
    length: int
    """Positions that are attended over: the longest length, rounded up."""
    lengths: Tensor
    """``[slots]``: how many positions each may see; 1 for a slot that does not decode."""
    offsets: Tensor | None
    """``[rows]``: the slot of each row, counted from ``first``; None where every slot decodes."""


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Several tokens in a row of one sequence."""

    slot: int
    row: int
    start: int
    """Position of the first token: how many the slot held before."""
    tokens: int


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a step holds of images: n of its tokens are placeholders."""

    rows: Tensor
    """``[n]``: the packed rows of the placeholders, ascending."""
    features: Tensor
    """``[n, hidden]``, in place of their embeddings."""
    deep: list[Tensor]
    """``[n, hidden]`` each, added behind the first layers."""


@dataclass(slots=True, kw_only=True)
class Step:
    """What one call of the model computes: N tokens of many sequences, packed. Two decode, one adds three
    tokens:

        token_ids  [91, 12, 5, 6, 7]    positions  [40, 17, 8, 9, 10]    outputs  [0, 1, 4]

    ``outputs`` are the rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    outputs: Tensor
    places: Tensor
    """``[N * 2 * kv_heads]``: where each token's keys, then its values go in a layer's cache, seen as
    ``[2 * slots * kv_heads * context, head_dim]``."""
    windows: list[Window]
    chunks: list[Chunk]
    dtype: torch.dtype
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    """By window (or -1 minus chunk) and sliding window: made by the first layer that asks."""
    axes: Tensor | None = None
    """``[3, N]``: time, height and width, for models that see; None where all three are ``positions``."""
    seen: Seen | None = None


class SlotCache:
    """The KV of every slot."""

    def __init__(
        self, geometry: Geometry, *, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.geometry = geometry
        self.slots = slots
        self.context = -(-context // LENGTH_BUCKET) * LENGTH_BUCKET
        self.dtype = dtype
        self.device = device
        g = geometry
        self._kv = _zeros((g.layers, 2, slots, g.kv_heads, self.context, g.head_dim), dtype, device)
        self._keys = [self._kv[layer, 0] for layer in range(g.layers)]
        self._values = [self._kv[layer, 1] for layer in range(g.layers)]
        self._flat = [self._kv[layer].view(-1, g.head_dim) for layer in range(g.layers)]
        self._views: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}
        self._positions = torch.arange(self.context, device=device)
        # A token's heads, counted in rows from its first key; values begin after the keys of all slots.
        heads = np.arange(g.kv_heads) * self.context
        self._heads = np.concatenate([heads, heads + slots * g.kv_heads * self.context])

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy the KV of positions ``start`` to ``stop`` between slots, in all layers."""
        self._kv[:, :, target, :, start:stop] = self._kv[:, :, source, :, start:stop]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots, in all layers."""
        kept = self._kv[:, :, a, :, :length].clone()
        self._kv[:, :, a, :, :length] = self._kv[:, :, b, :, :length]
        self._kv[:, :, b, :, :length] = kept

    def plan(
        self,
        *,
        decode_slots: Int64Array,
        decode_positions: Int64Array,
        chunks: Sequence[tuple[int, int, int]],
        token_ids: Int64Array,
        outputs: Int64Array,
    ) -> Step:
        """Lay out one step.

        Args:
            decode_slots: ``[n]``, ascending: slots that add one token.
            decode_positions: ``[n]``: the position of that token.
            chunks: (slot, start, tokens) of sequences that add more.
            token_ids: ``[N]``: the decoding slots' tokens, then those of each chunk.
            outputs: ``[R]``: rows whose logits are wanted.
        """
        n = len(decode_slots)
        slots, positions = decode_slots, decode_positions
        if chunks:
            slots = np.concatenate([slots, *(np.full(count, slot) for slot, _, count in chunks)])
            positions = np.concatenate(
                [positions, *(np.arange(start, start + count) for _, start, count in chunks)]
            )
        places = slots * (self.geometry.kv_heads * self.context) + positions
        rows = n + np.cumsum([0, *(count for _, _, count in chunks)])
        return Step(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            outputs=self._tensor(outputs),
            places=self._tensor((places[:, None] + self._heads).reshape(-1)),
            windows=self._windows(decode_slots, decode_positions + 1),
            chunks=[
                Chunk(slot=slot, row=int(row), start=start, tokens=count)
                for (slot, start, count), row in zip(chunks, rows, strict=False)
            ],
            dtype=self.dtype,
        )

    def store(self, layer: int, kv: Tensor, step: Step) -> None:
        """Write the step's keys and values, ``[N, 2 * kv_heads, head_dim]``, to their slots."""
        self._flat[layer].index_copy_(0, step.places, kv.reshape(-1, self.geometry.head_dim))

    def attend(
        self, layer: int, queries: Tensor, step: Step, *, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """Attend over what is stored, this step's tokens included.

        Args:
            layer: Index of the layer.
            queries: ``[N, heads, head_dim]``.
            step: Where the N tokens belong.
            scale: Factor of the scores.
            sliding_window: A token sees itself and the ``sliding_window - 1`` before it; None sees all.

        Returns:
            ``[N, heads * head_dim]``.
        """
        kv_heads, head_dim = self.geometry.kv_heads, self.geometry.head_dim
        heads = queries.shape[1]
        group = heads // kv_heads
        outputs = []
        for index, window in enumerate(step.windows):
            query = queries[window.row : window.row + window.rows].view(-1, kv_heads, group, head_dim)
            if window.offsets is not None:
                spread = query.new_zeros(window.last - window.first, kv_heads, group, head_dim)
                query = spread.index_copy_(0, window.offsets, query)
            keys, values = self._view(layer, window)
            mask = self._window_mask(step, index, sliding_window)
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
            if window.offsets is not None:
                out = out.index_select(0, window.offsets)
            outputs.append(out.reshape(window.rows, heads * head_dim))
        for index, chunk in enumerate(step.chunks):
            stop = chunk.start + chunk.tokens
            query = queries[chunk.row : chunk.row + chunk.tokens].transpose(0, 1)
            shape = (kv_heads, group, stop, head_dim)
            out = F.scaled_dot_product_attention(
                query.reshape(kv_heads, group, chunk.tokens, head_dim),
                self._keys[layer][chunk.slot, :, None, :stop].expand(shape),
                self._values[layer][chunk.slot, :, None, :stop].expand(shape),
                attn_mask=self._chunk_mask(step, index, sliding_window),
                scale=scale,
            )
            outputs.append(out.permute(2, 0, 1, 3).reshape(chunk.tokens, heads * head_dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    # -----------------------------------------------------------------------------------------------

    def _tensor(self, array: Int64Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _view(self, layer: int, window: Window) -> tuple[Tensor, Tensor]:
        """Keys and values of a window. The views are kept: windows return step after step, and slicing adds
        up.
        """
        key = (layer, window.first, window.last, window.length)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            slots, positions = slice(window.first, window.last), slice(window.length)
            view = self._views[key] = (
                self._keys[layer][slots, :, positions],
                self._values[layer][slots, :, positions],
            )
        return view

    def _windows(self, slots: Int64Array, lengths: Int64Array) -> list[Window]:
        """Cover ascending slots by windows: a hole is bridged where that is cheaper than another call."""
        windows = []
        begin = 0
        longest = 0
        for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
            if row > begin:
                joined = (slot + 1 - slots[begin]) * max(longest, length)
                apart = (slots[row - 1] + 1 - slots[begin]) * longest + length + CALL_COST
                if joined <= apart:
                    longest = max(longest, length)
                    continue
                windows.append(self._window(slots[begin:row], lengths[begin:row], begin))
                begin = row
            longest = length
        if len(slots):
            windows.append(self._window(slots[begin:], lengths[begin:], begin))
        return windows

    def _window(self, slots: Int64Array, lengths: Int64Array, row: int) -> Window:
        first, last = int(slots[0]), int(slots[-1]) + 1
        dense = last - first == len(slots)
        offsets = slots - first
        if not dense:
            spread = np.ones(last - first, dtype=np.int64)
            spread[offsets] = lengths
            lengths = spread
        longest = int(lengths.max())
        return Window(
            first=first,
            last=last,
            row=row,
            rows=len(slots),
            length=min(self.context, -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET),
            lengths=self._tensor(lengths),
            offsets=None if dense else self._tensor(offsets),
        )

    def _window_mask(self, step: Step, index: int, sliding_window: int | None) -> Tensor:
        """``[slots, 1, 1, length]``, added to the scores."""
        key = (index, sliding_window)
        mask = step.masks.get(key)
        if mask is None:
            window = step.windows[index]
            positions = self._positions[: window.length]
            lengths = window.lengths[:, None]
            hidden = positions >= lengths
            if sliding_window is not None:
                hidden |= positions < lengths - sliding_window
            mask = torch.zeros(hidden.shape, dtype=step.dtype, device=self.device)
            mask = step.masks[key] = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return mask

    def _chunk_mask(self, step: Step, index: int, sliding_window: int | None) -> Tensor:
        """``[tokens, start + tokens]``, added to the scores."""
        key = (-1 - index, sliding_window)
        mask = step.masks.get(key)
        if mask is None:
            chunk = step.chunks[index]
            positions = self._positions[: chunk.start + chunk.tokens]
            own = positions[chunk.start :, None]
            hidden = positions > own
            if sliding_window is not None:
                hidden |= positions <= own - sliding_window
            mask = torch.zeros(hidden.shape, dtype=step.dtype, device=self.device)
            mask = step.masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return mask


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because masked positions still take part in a product; on CPU, pages that nobody has touched
    cost nothing.

    `torch.zeros` writes to all of them at once, numpy asks the system for zeroed pages.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
