"""Packing: samples into rows, rows into micro-batches of a bounded number of tokens. Deterministic.

Which micro-batch and row a sample falls into changes speed and memory, never the update.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from turnwise.types import Batch, Sample


def pack(
    samples: Sequence[Sample], *, micro_tokens: int, row_tokens: int | None = None, together: bool = True
) -> list[Batch]:
    """Pack samples into micro-batches of at most ``micro_tokens``, padding included.

    Samples are taken from the longest to the shortest, each into the fullest row that still holds it. Rows
    are as long as their micro-batch's longest sample: attention costs the square of a row's length, and
    samples of one length fill such rows without padding. (0.65M parameters on one core, documents of 25
    tokens: rows of 32 train 15,200 tokens/s, of 256 11,500, of 1,024 6,300.)

    Args:
        samples: To learn from.
        micro_tokens: Per micro-batch; a longer sample has one of its own.
        row_tokens: Length of every row, for shapes that do not change; a longer sample gets a row of its own
            length. None fits rows to their samples.
        together: Whether samples may share a row; False for models that cannot keep them apart.
    """
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    batches = []
    while order:
        length = max(len(samples[order[0]]), row_tokens or 0)
        rows: list[list[int]] = [[] for _ in range(max(1, micro_tokens // length))]
        # (room left, row): the first entry that is large enough is the fullest row.
        room = [(length, row) for row in range(len(rows))]
        left = []
        for i in order:
            size = len(samples[i])
            at = bisect_left(room, (size, -1))
            if at == len(room):
                left.append(i)
                continue
            free, row = room.pop(at)
            rows[row].append(i)
            if together and free > size:
                insort(room, (free - size, row))
        order = left
        batches.append(_batch([[samples[i] for i in row] for row in rows if row], length))
    return batches


def _batch(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Rows of samples as arrays ``[rows, length]``."""
    shape = (len(rows), length)
    token_ids_BT = np.zeros(shape, dtype=np.int32)
    positions_BT = np.zeros(shape, dtype=np.int32)
    documents_BT = np.full(shape, -1, dtype=np.int32)
    loss_mask_BT = np.zeros(shape, dtype=np.bool_)
    logprobs_BT = np.zeros(shape, dtype=np.float32)
    advantages_BT = np.zeros(shape, dtype=np.float32)
    weights_BT = np.zeros(shape, dtype=np.float32)
    temperatures_BT = np.ones(shape, dtype=np.float32)
    samples = tuple(sample for row in rows for sample in row)
    with_old = bool(samples) and all(sample.old_logprobs_T is not None for sample in samples)
    old_BT = np.zeros(shape, dtype=np.float32) if with_old else None
    with_reference = bool(samples) and all(sample.reference_logprobs_T is not None for sample in samples)
    reference_BT = np.zeros(shape, dtype=np.float32) if with_reference else None
    document = 0
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            # Otherwise the loss would be on a token whose logprob came from another document.
            assert not sample.loss_mask_T[0], f"{sample.trajectory_id}: loss on a token that follows nothing"
            here = b, slice(start, start + len(sample))
            token_ids_BT[here] = sample.token_ids_T
            # To the row's end: padding continues its last document, which cannot see it, so that a row of one
            # document needs no mask at all.
            positions_BT[b, start:] = np.arange(length - start)
            documents_BT[here] = document
            loss_mask_BT[here] = sample.loss_mask_T
            logprobs_BT[here] = sample.logprobs_T
            advantages_BT[here] = sample.advantages_T
            weights_BT[here] = sample.weights_T
            temperatures_BT[here] = sample.temperature
            if old_BT is not None and sample.old_logprobs_T is not None:
                old_BT[here] = sample.old_logprobs_T
            if reference_BT is not None and sample.reference_logprobs_T is not None:
                reference_BT[here] = sample.reference_logprobs_T
            start += len(sample)
            document += 1
    return Batch(
        token_ids_BT=token_ids_BT,
        positions_BT=positions_BT,
        documents_BT=documents_BT,
        loss_mask_BT=loss_mask_BT,
        logprobs_BT=logprobs_BT,
        advantages_BT=advantages_BT,
        weights_BT=weights_BT,
        temperatures_BT=temperatures_BT,
        old_logprobs_BT=old_BT,
        reference_logprobs_BT=reference_BT,
        samples=samples,
    )
