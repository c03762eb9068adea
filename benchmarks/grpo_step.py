"""A whole GRPO step, rollouts and update: Turnwise's `GRPOTrainer` beside TRL's, given the same script.

    python benchmarks/grpo_step.py [--json PATH] [--episodes 32] [--reps 3]

Both are constructed by the same lines with the same arguments, play the same walks of 1 to 12 tool calls
(`benchmarks.walk`), greedy, with the same model of 1M parameters on one thread, and make one update of it.
Once with steps of 5 to 200 ms and once with instant ones. The two take turns, each time from the same
weights; the second of two steps is timed, from ``on_step_begin`` to ``on_step_end``, and medians are
compared. In every repetition each episode must have come to the same tokens on both sides, and the gradients
to the same norm; or nothing is written.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.sides import MAX_TOKENS, SIBLINGS, Row
from benchmarks.walk import SCENES, TURNS, Walk
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks import sides

CLOSE = 0.05
"""How far the norms of the two gradients may lie apart. Where ``top_k`` cuts what is sampled, Turnwise weighs
each token by the mass that was kept, here some 99%, and TRL does not."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The second step of one training."""

    seconds: float
    cpu: float
    """Processor seconds of the whole process meanwhile: others on the machine matter less to them."""
    episodes: dict[tuple[str, int], list[int]]
    """By prompt and sibling: the tokens after the prompt, what the tools answered included."""
    grad_norm: float
    peak: int
    """Most bytes of tensors that the update held at once beyond what was there before; 0 if not measured."""


class Stopwatch(TrainerCallback):
    """Times each step, and keeps what was logged of the last."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.grad_norm = float(logs.get("grad_norm", getattr(self, "grad_norm", 0.0)))


class Pair(Walk):
    """Walks two siblings differently, as greedy play does not: the second one's way is a step shorter.

    Otherwise their gradients would cancel, and there would be no update to compare.
    """

    met: ClassVar[Counter[str]] = Counter()
    one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def reset(self, prompt: list[Row], turns: int, **row: Any) -> None:
        self.walk = prompt[-1]["content"]
        with self.one_at_a_time:
            self.sibling = self.met[self.walk] % SIBLINGS
            self.met[self.walk] += 1
        super().reset(max(1, turns - self.sibling), **row)


class Rewards:
    """A reward function that remembers what was said."""

    __name__ = "second_wins"

    def __init__(self) -> None:
        self.episodes: dict[tuple[str, int], list[int]] = {}

    def __call__(self, completion_ids: Any, environments: Any, **_: Any) -> list[float]:
        for ids, walk in zip(completion_ids, environments, strict=True):
            if walk.taken != walk.turns:
                raise RuntimeError(f"{walk.taken} of {walk.turns} calls: the player has not learned its part")
            self.episodes[walk.walk, walk.sibling] = list(ids)
        return [float(walk.sibling) for walk in environments]


class Peak:
    """The most bytes that tensors hold at once while an update is made, by torch's own records."""

    def __init__(self) -> None:
        self.most = 0
        self._profile: Any = None

    def start(self) -> None:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ).__enter__()

    def stop(self) -> None:
        self._profile.__exit__(None, None, None)
        events = [one for one in self._profile.profiler.kineto_results.events() if one.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda one: one.start_ns()):
            held += event.nbytes()
            self.most = max(self.most, held)

    def around(self, owner: Any, method: str, *, after: str | None = None) -> Callable[[], None]:
        """Measure each call of a method, from where the method ``after`` has returned within it.

        Returns:
            What undoes this.
        """
        whole = getattr(owner, method)
        inner = getattr(owner, after) if after else None

        def begun(*args: Any, **kwargs: Any) -> Any:
            assert inner is not None
            result = inner(*args, **kwargs)
            self.start()
            return result

        def measured(*args: Any, **kwargs: Any) -> Any:
            if inner is None:
                self.start()
            try:
                return whole(*args, **kwargs)
            finally:
                self.stop()

        setattr(owner, method, measured)
        if after:
            setattr(owner, after, begun)

        def undo() -> None:
            setattr(owner, method, whole)
            if after:
                setattr(owner, after, inner)

        return undo


class Side:
    """One of the two libraries, training for two steps from the same weights each time."""

    def __init__(self, name: str, model_dir: Path) -> None:
        self.name, self._model_dir = name, model_dir
        if name == "trl":
            from trl import GRPOConfig, GRPOTrainer
        else:
            from turnwise import GRPOConfig, GRPOTrainer
        self._config, self._trainer = GRPOConfig, GRPOTrainer

    def step(self, data: Sequence[Row], *, memory: bool = False) -> Step:
        """What the second step was like; its time means nothing where memory is measured."""
        rewards, watch, peak = Rewards(), Stopwatch(), Peak()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(
                model=str(self._model_dir),
                reward_funcs=rewards,
                args=self._config(
                    output_dir=scratch,
                    use_cpu=True,
                    bf16=False,
                    per_device_train_batch_size=len(data) * SIBLINGS,
                    num_generations=SIBLINGS,
                    max_completion_length=MAX_TOKENS,
                    top_k=1,  # Greedy: both sides then come to the same tokens.
                    shuffle_dataset=False,
                    max_steps=2,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list(list(data)),
                environment_factory=Pair,
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            undo = self._measured(trainer, peak) if memory else []
            try:
                trainer.train()
            finally:
                for one in undo:
                    one()
        return Step(
            seconds=watch.seconds,
            cpu=watch.cpu,
            episodes=rewards.episodes,
            grad_norm=watch.grad_norm,
            peak=peak.most,
        )

    def _measured(self, trainer: Any, peak: Peak) -> list[Callable[[], None]]:
        """Forward and backward of each update; on TRL's side without what plays, which is called in there."""
        if self.name == "trl":
            return [peak.around(trainer, "training_step", after="_prepare_inputs")]
        from turnwise.learn.learner import Learner

        return [peak.around(Learner, "forward_backward")]


def require_same_work(ours: Step, theirs: Step) -> None:
    """Both sides came to the same tokens, and learned the same from them.

    Raises:
        RuntimeError: They did not, so that their times cannot be compared.
    """
    for episode in sorted({*ours.episodes, *theirs.episodes}):
        mine, other = ours.episodes.get(episode), theirs.episodes.get(episode)
        if mine != other:
            raise RuntimeError(
                f"{episode}: the two sides came to different tokens, so their times are not of the same "
                f"work.\nTurnwise: {mine}\nTRL: {other}"
            )
    if abs(ours.grad_norm - theirs.grad_norm) > CLOSE * theirs.grad_norm:
        raise RuntimeError(
            f"the gradients' norms are {ours.grad_norm} (Turnwise) and {theirs.grad_norm} (TRL): "
            "the two sides have not made the same update"
        )


def measure(model_dir: Path, *, episodes: int, repetitions: int, most: int = TURNS) -> list[Row]:
    """The rows, medians over the repetitions."""
    ours, theirs = Side("turnwise", model_dir), Side("trl", model_dir)

    def play(walks: list[Row], *, memory: bool = False) -> tuple[Step, Step]:
        pair = ours.step(walks, memory=memory), theirs.step(walks, memory=memory)
        require_same_work(*pair)
        return pair

    data = sides.walks(episodes, most)
    table = sides.medians(sides.take_turns(data, play, repetitions=repetitions))
    pair = play(data[SCENES[-1].name], memory=True)
    return [*table, sides.row("update_memory", "MiB", *(one.peak / 2**20 for one in pair))]


def main(argv: Sequence[str] | None = None) -> None:
    sides.run(__doc__, measure, argv)


if __name__ == "__main__":
    main()
