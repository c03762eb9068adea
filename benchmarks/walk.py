"""What both sides of the rollout benchmark share: an environment, rows, and a model that plays it.

The environment is a TRL-style class, which Turnwise takes as it is. The model is a Qwen3 of 1M parameters
that was taught, in some 20 seconds, to call the tool until it is told ``done``: both sides then sample the
same tokens greedily, so that they do the same work.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NOTE = "carry on along the path, one foot before the other, until somebody says that it is enough"
FINAL = "I have arrived at the end of the walk."
PROMPT = "This is walk {number}. Walk until you are told that you are done."
TURNS = 12
"""Calls of the longest walk."""


class Walk:
    """Takes ``turns`` calls of ``advance``, each as long as the row says."""

    def reset(self, turns: int = 1, delays: list[float] | None = None, **row: Any) -> None:
        self.turns, self.delays, self.taken = turns, delays, 0

    # Without a return annotation: TRL would tell the model of it and Turnwise would not.
    def advance(self, note: str):
        """Take one step of the walk.

        Args:
            note: What to remember of it.
        """
        if self.delays:
            time.sleep(self.delays[self.taken])
        self.taken += 1
        return "more" if self.taken < self.turns else "done"

    def get_reward(self) -> float:
        return float(self.taken == self.turns)


@dataclass(frozen=True)
class Scene:
    """A benchmark case."""

    name: str
    slowest: float
    """Longest environment step in seconds; 0 makes them instant."""
    quickest: float = 0.005


SCENES = (Scene("slow_env", 0.2), Scene("instant_env", 0.0))


def rows(scene: Scene, episodes: int, *, most: int = TURNS, seed: int = 0) -> list[dict[str, Any]]:
    """``episodes`` rows of 1 to ``most`` turns, evenly spread, each step's delay drawn beforehand."""
    rng = random.Random(seed)
    out = []
    for i in range(episodes):
        turns = 1 + i * most // episodes
        delays = [rng.uniform(scene.quickest, scene.slowest) for _ in range(turns)] if scene.slowest else None
        out.append({"prompt": [asked(i)], "turns": turns, "delays": delays})
    rng.shuffle(out)
    return out


def asked(number: int) -> dict[str, Any]:
    """The user's message of one walk: no two walks are alike, so that only siblings share
    more than the tools.
    """
    return {"role": "user", "content": PROMPT.format(number=number)}


def tools() -> list[dict[str, Any]]:
    """The schema of ``advance`` as transformers derives it, which is what TRL renders."""
    from transformers.utils import get_json_schema

    return [get_json_schema(Walk.advance)]


def conversation(turns: int, number: int = 0) -> list[dict[str, Any]]:
    """What the model should say: ``turns`` calls, then the final words."""
    call = {"type": "function", "function": {"name": "advance", "arguments": {"note": NOTE}}}
    messages: list[dict[str, Any]] = [asked(number)]
    for i in range(turns):
        answer = "more" if i + 1 < turns else "done"
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "advance", "content": answer},
        ]
    return [*messages, {"role": "assistant", "content": FINAL}]


def template() -> str:
    """Qwen2.5's own chat template, read from the installed trl."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()


def make_model(directory: Path, *, most: int = TURNS, steps: int = 120) -> None:
    """Train the player of walks of up to ``most`` turns and write it as a model directory.

    Raises:
        RuntimeError: It did not learn to play, so the benchmark would measure something else.
    """
    from tests.support.models import qwen3_1m
    from tests.support.tokenizers import tiny_tokenizer

    text = tiny_tokenizer(template()).apply_chat_template(conversation(3), tools=tools(), tokenize=False)
    tokenizer = tiny_tokenizer(template(), texts=[text], vocab_size=2048)
    model = qwen3_1m().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer("<|im_start|>assistant\n").input_ids
    rng = random.Random(0)
    loss = torch.tensor(9.9)
    for step in range(steps):
        ids = tokenizer.apply_chat_template(
            conversation(rng.randint(1, most), rng.randrange(100)),
            tools=tools(),
            return_dict=False,
            tokenize=True,
        )
        labels = [-100] * len(ids)
        for i, token in enumerate(ids):  # loss on what stands between the assistant header and its <|im_end|>
            if token == start and ids[i : i + len(header)] == header:
                last = ids.index(end, i)
                labels[i + len(header) : last + 1] = ids[i + len(header) : last + 1]
        # Start anywhere in position space, so that the reply does not depend on where it stands.
        offset = rng.randint(0, 400)
        loss = model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(offset, offset + len(ids))[None],
            labels=torch.tensor([labels]),
        ).loss
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if loss.item() > 0.01:
        raise RuntimeError(f"the player did not learn its part (loss {loss.item():.3f}); raise steps")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
