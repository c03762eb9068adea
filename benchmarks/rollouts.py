"""Rollouts of a tool-calling agent: Turnwise beside TRL's `GRPOTrainer`, doing the same work.

    python benchmarks/rollouts.py [--json PATH] [--episodes 32] [--reps 3]

Both play the same walks of 1 to 12 tool calls (`benchmarks.walk`): one environment class, the same rows, two
siblings of each, one model of 1M parameters, greedy, on one thread. Once with steps of 5 to 200 ms and once
with instant ones. The two take turns within each repetition, in the same process, and medians are compared.
In every repetition each episode must have come to the same tokens on both sides; or nothing is written.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.sides import MAX_TOKENS, SIBLINGS, Row
from benchmarks.walk import SCENES, TURNS, Walk, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import sides
from turnwise.chat.renderer import load_renderer
from turnwise.engines.transformers import TransformersEngine
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.rollout.arena import Arena
from turnwise.rollout.group import GroupOrder, play_group
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import Sampling, Trajectory


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What one episode came to, on either side."""

    prompt: list[int]
    completion: list[int]
    """All that follows the prompt: replies, and what the environment answered."""
    sampled: list[bool]
    """Which of the completion's tokens the model drew."""
    calls: int
    reward: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """One repetition of one side."""

    seconds: float
    cpu: float
    """Processor seconds of the whole process meanwhile: others on the machine matter less to them."""
    episodes: list[Episode]
    prefilled: int
    """Tokens the model read that it had not just drawn; padding is not counted."""
    slots: int
    """Rows times decode steps: what the model computed to draw, for rows that had ended too."""


class Stopwatch:
    """Seconds since it was made, by the wall and of this process's processors."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Ours:
    """Turnwise, by the calls that its trainer makes too. Engine and environments are new each time.

    Timed: from the first episode's start, opening its environment, to the last one's reward and trajectory.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.renderer = load_renderer(model_dir)

    def play(self, data: Sequence[Row]) -> Played:
        return asyncio.run(self._play(data))

    async def _play(self, data: Sequence[Row]) -> Played:
        episodes = len(data) * SIBLINGS
        arena = Arena("walk", make(Walk), limits=Limits(max_turns=TURNS + 1))
        sampling = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
        async with TransformersEngine(
            self.model, max_sequences=episodes, max_context=2048, device="cpu"
        ) as engine:
            policy = ModelPolicy(engine, self.renderer)
            ended: list[Trajectory] = []
            watch = Stopwatch()
            groups = await asyncio.gather(
                *(
                    play_group(
                        GroupOrder(id=f"walk/{i}", env="walk", task=row, seed=i, size=SIBLINGS),
                        arena=arena,
                        policy=policy,
                        sampling=sampling,
                        sink=ended.append,
                    )
                    for i, row in enumerate(data)
                )
            )
            seconds, cpu = watch.read()
            stats = engine.stats
        await arena.aclose()
        return Played(
            seconds=seconds,
            cpu=cpu,
            episodes=[_episode(one) for group in groups for one in group.trajectories],
            prefilled=stats.prefilled,
            slots=stats.generated,
        )


def _episode(trajectory: Trajectory) -> Episode:
    if trajectory.stop_reason.failed or len(trajectory.segments) != 1:
        raise RuntimeError(
            f"{trajectory.id} did not play through: {trajectory.stop_reason} {trajectory.error}"
        )
    first, *later = trajectory.turns
    completion, sampled = list(first.ids or ()), [True] * len(first.ids or ())
    for turn in later:
        context, ids = turn.context_ids or [], turn.ids or []
        completion += [*context, *ids]
        sampled += [False] * len(context) + [True] * len(ids)
    return Episode(
        prompt=list(first.context_ids or ()),
        completion=completion,
        sampled=sampled,
        calls=int(trajectory.metrics["tool_calls"]),
        reward=trajectory.reward or 0.0,
    )


class Theirs:
    """TRL's `GRPOTrainer` with an ``environment_factory``, generating with transformers in its own process.

    Timed: its ``_generate``, which renders, samples and runs the tools. Constructing and resetting
    environments, rewards and advantages happen around it and are not counted.
    """

    def __init__(self, model_dir: Path, episodes: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.scratch = tempfile.TemporaryDirectory()
        self.trainer = GRPOTrainer(
            model=str(model_dir),
            args=GRPOConfig(
                output_dir=self.scratch.name,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=episodes,
                num_generations=SIBLINGS,
                max_completion_length=MAX_TOKENS,
                generation_kwargs={"do_sample": False},
                gradient_checkpointing=False,
                max_steps=1,
                report_to=[],
            ),
            train_dataset=Dataset.from_list(rows(SCENES[0], episodes // SIBLINGS)),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            environment_factory=Walk,
        )
        self._generate, self.trainer._generate = self.trainer._generate, self._timed
        self._single_turn, self.trainer._generate_single_turn = (
            self.trainer._generate_single_turn,
            self._counted,
        )

    def play(self, data: Sequence[Row]) -> Played:
        self.prefilled = self.slots = 0
        self.trainer.model.train()  # As it is while it trains; there is no dropout.
        self.trainer._generate_and_score_completions([row for row in data for _ in range(SIBLINGS)])
        prompts, completions, mask = self.out[:3]
        walks = self.trainer.environments
        return Played(
            seconds=self.seconds,
            cpu=self.cpu,
            episodes=[
                Episode(
                    prompt=list(prompt),
                    completion=list(completion),
                    sampled=[bool(one) for one in row],
                    calls=walk.taken,
                    reward=walk.get_reward(),
                )
                for prompt, completion, row, walk in zip(prompts, completions, mask, walks, strict=True)
            ],
            prefilled=self.prefilled,
            slots=self.slots,
        )

    def _timed(self, prompts: Any) -> Any:
        watch = Stopwatch()
        self.out = self._generate(prompts)
        self.seconds, self.cpu = watch.read()
        return self.out

    def _counted(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        ids, logprobs = self._single_turn(prompt_ids, *args, **kwargs)
        self.prefilled += sum(map(len, prompt_ids))
        self.slots += len(ids) * max(map(len, ids))
        return ids, logprobs


def require_same_work(ours: Played, theirs: Played, data: Sequence[Row]) -> None:
    """Both sides came to the same tokens, and every episode walked all of its way.

    Raises:
        RuntimeError: They did not, so that their times cannot be compared.
    """
    turns = [row["turns"] for row in data for _ in range(SIBLINGS)]
    pairs = zip(turns, ours.episodes, theirs.episodes, strict=True)
    for number, (calls, mine, other) in enumerate(pairs):
        if mine != other:
            unequal = [name for name in vars(mine) if getattr(mine, name) != getattr(other, name)]
            raise RuntimeError(
                f"episode {number}: the two sides differ in {', '.join(unequal)}, so their times are not of "
                f"the same work.\nTurnwise: {mine}\nTRL: {other}"
            )
        if (mine.calls, mine.reward) != (calls, 1.0):
            raise RuntimeError(
                f"episode {number}: {mine.calls} of {calls} calls, reward {mine.reward}: "
                "the player has not learned its part"
            )


def measure(model_dir: Path, *, episodes: int, repetitions: int, most: int = TURNS) -> list[Row]:
    """The rows, medians over the repetitions."""
    ours, theirs = Ours(model_dir), Theirs(model_dir, episodes)

    def play(walks: list[Row]) -> tuple[Played, Played]:
        pair = ours.play(walks), theirs.play(walks)
        require_same_work(*pair, walks)
        return pair

    # What is compiled or cached at first is nobody's time.
    play(rows(SCENES[-1], episodes // SIBLINGS, most=1))
    pairs = sides.take_turns(sides.walks(episodes, most), play, repetitions=repetitions)
    last = pairs[SCENES[-1].name][-1]
    counts = {
        "sampled_tokens": [sum(sum(one.sampled) for one in side.episodes) for side in last],
        "decode_slots": [side.slots for side in last],
        "prefilled_tokens": [side.prefilled for side in last],
    }
    return [*sides.medians(pairs), *(sides.row(name, "tokens", *pair) for name, pair in counts.items())]


def main(argv: Sequence[str] | None = None) -> None:
    sides.run(__doc__, measure, argv)


if __name__ == "__main__":
    main()
