"""`EndlessShuffle`: pass after pass over a set, each a permutation of its own, fixed by its entropy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EndlessShuffle:
    """An endless order over ``count`` things; any place of it can be asked for.

        order = EndlessShuffle(3, [seed, *b"catch/train"])
        [order[i] for i in range(6)]                          # [2, 0, 1, 1, 2, 0]

    Args:
        count: How many things there are.
        entropy: What the permutations are drawn from, with the number of the pass.
    """

    def __init__(self, count: int, entropy: Sequence[int]) -> None:
        self.count, self._entropy = count, list(entropy)
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, place: int) -> int:
        """Which thing stands at ``place``, counted from 0."""
        number, offset = divmod(place, self.count)
        if number not in self._passes:
            # Whoever goes through it may end one pass and begin the next: two are kept.
            self._passes = {known: order for known, order in self._passes.items() if known >= number - 1}
            self._passes[number] = np.random.default_rng([*self._entropy, number]).permutation(self.count)
        return int(self._passes[number][offset])
