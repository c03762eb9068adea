"""Tokens per second of the embedded engine, beside `model.generate` and a bare forward loop.

    python benchmarks/engine.py [--json PATH] [--repetitions N] [--batches 1 8 32]

A random one-million-parameter Qwen3 in fp32 on one thread; each sequence has 64 prompt tokens and gets 128
more, nothing stops early, prefill included. Turnwise samples at temperature 1 and returns log-probabilities,
`generate` samples without them, the bare loop is greedy. The three take turns within each repetition, in the
same process, and medians are compared: on a machine that others use too, single times mean little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.models import qwen3_1m

from turnwise.engines.transformers import TransformersEngine
from turnwise.types import Sampling

PROMPT, NEW = 64, 128


def prompts(batch: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2048, (batch, PROMPT), generator=generator).tolist()


def with_generate(model: Any, batch: list[list[int]]) -> None:
    """``model.generate``, sampling, with a dynamic cache: what its users call."""
    out = model.generate(torch.tensor(batch), max_new_tokens=NEW, do_sample=True, top_k=0)
    assert out.shape == (len(batch), PROMPT + NEW)


@torch.inference_mode()
def with_bare_forward(model: Any, batch: list[list[int]]) -> None:
    """The model's forward and cache in a loop, greedy, no logprobs: the least that its users can write."""
    ids, cache = torch.tensor(batch), None
    for _ in range(NEW):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)


async def with_engine(engine: TransformersEngine, batch: list[list[int]]) -> None:
    """The engine, with logprobs, as rollouts call it."""
    sampling = Sampling(max_tokens=NEW)
    done = await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in batch))
    assert all(len(completion.ids) == NEW for completion in done)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


async def measure(batches: list[int], repetitions: int, budget: float) -> list[dict[str, object]]:
    """Rows of medians; stops repeating a batch size when its share of ``budget`` seconds is used up."""
    model = qwen3_1m()
    engine = TransformersEngine(model, max_sequences=max(batches), max_context=256)
    rows: list[dict[str, object]] = []
    for size in batches:
        times: dict[str, list[float]] = {"engine": [], "generate": [], "forward": []}
        deadline = time.perf_counter() + budget / len(batches)
        for repetition in range(repetitions + 1):
            # New prompts each time: nothing is shared, nothing is cached.
            batch = prompts(size, seed=1000 * size + repetition)
            start = time.perf_counter()
            await with_engine(engine, batch)
            taken = {
                "engine": time.perf_counter() - start,
                "generate": seconds(lambda batch=batch: with_generate(model, batch)),
                "forward": seconds(lambda batch=batch: with_bare_forward(model, batch)),
            }
            if repetition > 0:  # the first warms up
                for name, value in taken.items():
                    times[name].append(value)
            if times["engine"] and time.perf_counter() > deadline:
                break
        speed = {name: size * NEW / statistics.median(values) for name, values in times.items()}
        for rival in ("generate", "forward"):
            rows.append(
                {
                    "name": f"decode_{size}_vs_{rival}",
                    "unit": "tokens/s",
                    "ours": round(speed["engine"], 1),
                    "theirs": round(speed[rival], 1),
                    "ratio": round(speed["engine"] / speed[rival], 2),
                }
            )
            print(
                f"batch {size:3d}  turnwise {speed['engine']:8,.0f}  {rival:8s} {speed[rival]:8,.0f} tokens/s"
                f"  ×{speed['engine'] / speed[rival]:.2f}  (medians of {len(times['engine'])})",
                flush=True,
            )
    await engine.aclose()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=100.0, help="stop repeating after about this long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = asyncio.run(measure(args.batches, args.repetitions, args.seconds))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
