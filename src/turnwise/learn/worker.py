"""What the processes beside the first one do: they open its learners and follow their calls.

ranks = Ranks(config)
if ranks.first:
    learner = open_everywhere(ranks, opening, tokenizer=tokenizer)   # and used as a `Learner`
    ranks.dismiss(END)
else:
    serve(ranks)
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as progress

from turnwise.chat.vision import Vision
from turnwise.config import BatchConfig, ModelConfig, OptimizerConfig
from turnwise.errors import RecipeError, TurnwiseError
from turnwise.images import STORE
from turnwise.learn.model import load_model
from turnwise.learn.parallel import Call, ParallelLearner
from turnwise.learn.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A learner, for every process to make."""

    model: ModelConfig
    """With the name of what to load; a directory must be there for all of them."""
    optimizer: OptimizerConfig
    rows: BatchConfig
    total_steps: int
    seed: int
    reference: bool
    """Keep the starting weights, for a KL term."""
    vision: Vision | None = None
    """The image side of the model's processor."""
    images: Path | None = None
    """Where images are; a directory that is there for all of them."""
    threads: int = field(default_factory=torch.get_num_threads)
    """For tensor work on CPU; those of the first process."""


@dataclass(frozen=True, slots=True)
class End:
    """There is nothing more to do."""

    failed: bool


def open_everywhere(ranks: Ranks, opening: Opening, *, tokenizer: Any, module: Any = None) -> ParallelLearner:
    """A learner over all processes; to be called in the first one, while the others `serve`.

    Args:
        ranks: The processes.
        opening: What to make.
        tokenizer: To be saved beside the weights.
        module: A model that is loaded already, in place of the one that ``opening`` names. With fsdp it stays
            whole and as it is: a copy is trained.
    """
    ranks.order(opening)
    if ranks.kind == "fsdp":
        module = copy.deepcopy(module)
    with ranks.agreed():
        return _open(ranks, opening, tokenizer, module)


def serve(ranks: Ranks, *, module: Any = None) -> None:
    """Follow the first process until it is done.

    Signals are left to the first process: what is started together is stopped together, and it may need the
    others to finish an update.

    Raises:
        SystemExit: The first process failed or is gone; it, or whoever started it, says why.
    """
    learner: ParallelLearner | None = None
    with _in_the_background():
        while True:
            try:
                message = ranks.wait()
                if isinstance(message, End):
                    break
                if isinstance(message, Opening):
                    learner = None
                    with ranks.agreed():
                        learner = _open(ranks, message, None, module)
                else:
                    assert isinstance(message, Call) and learner is not None
                    learner.follow(message)
            except TurnwiseError:  # The first process raises it too.
                if ranks.lost:
                    sys.exit(1)
    ranks.close()
    if message.failed:
        sys.exit(1)


def _open(ranks: Ranks, opening: Opening, tokenizer: Any, module: Any) -> ParallelLearner:
    torch.set_num_threads(opening.threads)
    config, device = opening.model, ranks.device
    if ranks.kind == "fsdp":
        # From the CPU each process takes its part; the whole would not fit on a GPU. The type is the GPU's.
        dtype = config.dtype or ("float32" if ranks.device.type == "cpu" else "bfloat16")
        config = config.model_copy(update={"dtype": dtype})
        if config.attention != "flash_attention_2":  # It has no code for CPUs.
            device = torch.device("cpu")
    if opening.images is not None:
        STORE.look_in(opening.images)
    policy = load_model(config, module=module, device=device, seed=opening.seed, vision=opening.vision)
    if ranks.kind == "fsdp" and policy.quantized:
        raise RecipeError(
            "fsdp cannot spread weights in 4 bits; leave it out (each process holds them all then), or load "
            "the model without quantization"
        )
    ranks.copy_from_first(policy)
    if opening.reference:
        policy.keep_reference()
    if ranks.kind == "fsdp":
        policy.shard(ranks.mesh())
    return ParallelLearner(
        ranks,
        policy,
        tokenizer,
        optimizer=opening.optimizer,
        rows=opening.rows,
        total_steps=opening.total_steps,
        seed=opening.seed,
    )


@contextmanager
def _in_the_background() -> Iterator[None]:
    """Signals are ignored, and nothing is printed."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    told, bars = logging.root.manager.disable, progress.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    progress.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(told)
        if bars:
            progress.enable_progress_bar()
        for one, handler in before.items():
            signal.signal(one, handler)
