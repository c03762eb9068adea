"""Normalisation: the weight of each token, fixed over a whole update before anything is packed or split.

With weights in the samples a loss is the plain sum of weight × term, so that neither micro-batches, nor
packing, nor ranks change it, and rows whose advantage is 0 may be left out without changing the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from turnwise.errors import LearnError
from turnwise.types import Sample

Normalise = Literal["token", "sequence", "constant", "sum"]


def weigh(
    samples: Sequence[Sample], mode: Normalise, *, max_tokens: int | None = None, by_env: bool = False
) -> list[Sample]:
    """Set ``weights_T`` for one update. With N trajectories, of T sampled tokens in all:

        token      1 / T                     each token counts the same (DAPO)
        sequence   1 / N / (its tokens)      each trajectory counts the same (GRPO), over all of its segments
        constant   1 / N / max_tokens        no length matters (Dr.GRPO)
        sum        1 / N                     nor any other scale (LUSPO)

    Args:
        samples: Every sample of the update, those that will be left out for their zero advantage included.
        mode: What counts equally.
        max_tokens: The constant's denominator. RL gives ``sampling.max_tokens``, a reply's limit: any
            constant will do, as it only scales the rate.
        by_env: Do so within each environment apart, and give each of the E environments a weight of 1 / E.

    Raises:
        LearnError: ``max_tokens`` is missing, or given where it would do nothing.
    """
    if (max_tokens is not None) != (mode == "constant"):
        raise LearnError(f"max_tokens belongs to normalise=constant, and only to it; the mode is {mode!r}")
    tokens_of: dict[tuple[str, str], int] = defaultdict(int)
    for sample in samples:
        tokens_of[_part(sample, by_env), sample.trajectory_id] += int(sample.loss_mask_T.sum())
    trajectories: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for (part, _), count in tokens_of.items():
        if count:
            trajectories[part] += 1
            tokens[part] += count

    weighed = []
    for sample in samples:
        part = _part(sample, by_env)
        own = tokens_of[part, sample.trajectory_id]
        if own == 0:
            weight = 0.0
        elif mode == "token":
            weight = 1 / tokens[part]
        elif mode == "sequence":
            weight = 1 / trajectories[part] / own
        elif mode == "sum":
            weight = 1 / trajectories[part]
        else:
            assert max_tokens is not None
            weight = 1 / trajectories[part] / max_tokens
        weights_T = np.where(
            sample.loss_mask_T, np.float32(weight / max(1, len(trajectories))), np.float32(0)
        )
        weighed.append(replace(sample, weights_T=weights_T))
    return weighed


def _part(sample: Sample, by_env: bool) -> str:
    """What the sample is normalised together with."""
    return sample.env if by_env else ""
