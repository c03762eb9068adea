"""Runs of several processes, such as ``torchrun --nproc-per-node 2 -m turnwise run recipe.yaml``.

The first one has the environments, the engine and the run directory:

    with joined(recipe.parallel, recipe.model.device) as ranks:
        if ranks is None or ranks.first:
            run_recipe(recipe, directory, emit, given=Given(ranks=ranks))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from turnwise.config import ParallelConfig

if TYPE_CHECKING:
    from turnwise.learn.ranks import Ranks


@contextmanager
def joined(
    config: ParallelConfig, device: str | None = None, *, module: Any = None
) -> Iterator[Ranks | None]:
    """The processes that torchrun or ``accelerate launch`` started; None where there is one.

    In those beside the first, the work is done when the block is entered: they have followed the first one's
    learners until its block ended.

    Args:
        config: The recipe's.
        device: ``model.device`` of the recipe.
        module: A model that is loaded already: this process's own, where the first one gives one to its run.

    Raises:
        LearnError: The processes do not find each other, there are more than GPUs, or all are to use one.
        SystemExit: In a process beside the first one, which failed or is gone. Nothing is printed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from turnwise.learn.ranks import Ranks
    from turnwise.learn.worker import End, serve

    ranks = Ranks(config, device)
    if not ranks.first:
        serve(ranks, module=module)
        yield ranks
        return
    failed = True
    try:
        yield ranks
        failed = False
    finally:
        ranks.dismiss(End(failed))
