"""What is learned from: samples, packed batches, and the weights that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row to learn from: a segment's tokens with everything a loss needs, as plain arrays.

    A segment of prompt P, reply A0, bridge B, reply A1:

        token_ids_T  = P + A0 + B + A1
        loss_mask_T  = [False]*len(P) + [True]*len(A0) + [False]*len(B) + [True]*len(A1)
        logprobs_T   = [0]*len(P) + logprobs(A0) + [0]*len(B) + logprobs(A1)
        weights_T    = 0 wherever loss_mask_T is False

    ``logprobs_T[t]`` belongs to ``token_ids_T[t]`` itself (not to the token after it).
    """

    token_ids_T: IntArray
    loss_mask_T: BoolArray
    logprobs_T: FloatArray
    """Of the policy that sampled; 0 for demonstrations."""
    advantages_T: FloatArray
    weights_T: FloatArray
    """The algorithm's normalisation, fixed over the whole step: a loss is the plain sum of weight × term."""
    versions_T: IntArray
    """The weights that drew each token; -1 where nothing was sampled."""
    old_logprobs_T: FloatArray | None = None
    """Under the learner's weights before the step; None where the loss does not ask for them."""
    reference_logprobs_T: FloatArray | None = None
    trajectory_id: str
    group_id: str
    env: str
    temperature: float = 1.0
    images: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Tokens in the row."""
        return len(self.token_ids_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples packed into rows, one micro-batch. Two samples of 3 and 2 tokens in one row of 6:

    token_ids_BT  = [[a0 a1 a2 b0 b1  0]]
    positions_BT  = [[ 0  1  2  0  1  2]]      # padding continues the last document, which cannot see it
    documents_BT  = [[ 0  0  0  1  1 -1]]      # -1 is padding; attention never crosses documents
    loss_mask_BT, logprobs_BT, advantages_BT, weights_BT: as in the samples, 0 in padding
    """

    token_ids_BT: IntArray
    positions_BT: IntArray
    documents_BT: IntArray
    """Index into ``samples`` of each token's row of origin; -1 in padding."""
    loss_mask_BT: BoolArray
    logprobs_BT: FloatArray
    advantages_BT: FloatArray
    weights_BT: FloatArray
    temperatures_BT: FloatArray
    old_logprobs_BT: FloatArray | None = None
    reference_logprobs_BT: FloatArray | None = None
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int((self.documents_BT >= 0).sum())


class WeightSource(Protocol):
    """Weights that an engine can load: implemented by ``learn.weights``, handed over by ``pipeline``."""

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """(name, tensor) under the checkpoint's Hugging Face names, full tensors, adapters merged.

        May be called more than once, and gives the same each time until the next update.
        """
        ...


@runtime_checkable
class AdapterSource(WeightSource, Protocol):
    """Weights that are a base model's with LoRA adapters, which can be had apart."""

    def save_adapter(self, directory: Path) -> None:
        """Write the adapters as ``peft`` does: ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            LearnError: There are none.
        """
        ...
