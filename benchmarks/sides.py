"""What the comparisons with TRL share: both sides take turns at the same walks; medians make the table."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from benchmarks.walk import SCENES, TURNS, make_model, rows

SIBLINGS = 2
MAX_TOKENS = 1100
"""Budget for all tokens of an episode after its prompt; 12 turns need some 650."""

Row = dict[str, Any]


class Timed(Protocol):
    """What one side has done in one repetition."""

    @property
    def seconds(self) -> float: ...
    @property
    def cpu(self) -> float: ...


T = TypeVar("T", bound=Timed)
Pairs = dict[str, list[tuple[T, T]]]
"""By scene: what Turnwise and what TRL did, in each repetition."""


def walks(episodes: int, most: int) -> dict[str, list[Row]]:
    """The rows of each scene, of which each is played by all siblings."""
    return {scene.name: rows(scene, episodes // SIBLINGS, most=most) for scene in SCENES}


def take_turns(
    data: dict[str, list[Row]],
    play: Callable[[list[Row]], tuple[T, T]],
    *,
    repetitions: int,
) -> Pairs[T]:
    """All pairs, Turnwise's first; ``play`` raises where the two have not done the same work."""
    pairs: Pairs[T] = {name: [] for name in data}
    for repetition in range(repetitions):
        for name, walked in data.items():
            pair = play(walked)
            pairs[name].append(pair)
            told = "  ".join(
                f"{side} {one.seconds:6.2f} s (cpu {one.cpu:5.2f})"
                for side, one in zip(("turnwise", "trl"), pair, strict=True)
            )
            print(f"{repetition + 1}/{repetitions} {name:12s} {told}", flush=True)
    return pairs


def medians(pairs: Pairs[Any]) -> list[Row]:
    """A row of seconds for each scene."""
    table = []
    for name, played in pairs.items():
        ours, theirs = ([side.seconds for side in sides] for sides in zip(*played, strict=True))
        table.append(row(name, "s", statistics.median(ours), statistics.median(theirs)))
        print(f"{name:12s} fastest: turnwise {min(ours):.2f} s, trl {min(theirs):.2f} s")
    return table


def row(name: str, unit: str, ours: float, theirs: float) -> Row:
    """A row of the table; the ratio says how many times as much TRL needs."""
    return {
        "name": name,
        "unit": unit,
        "ours": round(ours, 3),
        "theirs": round(theirs, 3),
        "ratio": round(theirs / ours, 2),
    }


def run(about: str | None, measure: Callable[..., list[Row]], argv: Sequence[str] | None) -> None:
    """The command line of a comparison; ``measure(model_dir, episodes=, …)`` makes the rows."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="repetitions")
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help="calls of the longest walk")
    parser.add_argument("--model", type=Path, metavar="DIR", help="keep the player here, and use it again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model or Path(scratch) / "model"
        if not (model_dir / "config.json").exists():
            print("teaching the player …", flush=True)
            make_model(model_dir, most=args.turns)
        table = measure(model_dir, episodes=args.episodes, repetitions=args.reps, most=args.turns)
    for one in table:
        print("{name:18s} turnwise {ours:>10}  trl {theirs:>10} {unit:7s} ×{ratio}".format(**one))
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=2) + "\n")
