"""A rollout function: the script plays guess-a-number itself, turn by turn, in plain text.

What the environment says stands among the completion's tokens, and ``env_mask`` is 0 there: it is not the
policy's.

python examples/trl/rollout.py --max-steps 2
"""

from __future__ import annotations

import random
from typing import Any

from common import flags, policy, settings
from datasets import Dataset

from turnwise import GRPOConfig, GRPOTrainer, generate_rollout_completions

HIGH, GUESSES = 9, 3
PROMPT = f"Guess a number from 1 to {HIGH}."


def judge(guess: str, secret: int) -> str:
    """What is said of a guess."""
    if not guess.strip().isdigit():
        return "a number, please"
    number = int(guess)
    return "correct" if number == secret else "higher" if number < secret else "lower"


def play(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    """One episode for each prompt, all of them turn by turn."""
    secrets = [random.randint(1, HIGH) for _ in prompts]
    talks = [list(prompt) for prompt in prompts]
    played: dict[str, list[Any]] = {
        key: [[] for _ in prompts] for key in ("prompt_ids", "completion_ids", "logprobs", "env_mask")
    }
    found = [0.0] * len(prompts)
    going = list(range(len(prompts)))
    for turn in range(GUESSES):
        replies = generate_rollout_completions(trainer, [talks[i] for i in going])
        for i, reply in zip(list(going), replies, strict=True):
            if not turn:
                played["prompt_ids"][i] = reply["prompt_ids"]
            held = played["prompt_ids"][i] + played["completion_ids"][i]
            if reply["prompt_ids"][: len(held)] != held:
                going.remove(i)  # What was sampled reads back as other tokens: it would not be what was said.
                continue
            told = reply["prompt_ids"][
                len(held) :
            ]  # what was said since: the environment's, not the policy's
            for key, values in (
                ("completion_ids", told + reply["completion_ids"]),
                ("logprobs", [0.0] * len(told) + reply["logprobs"]),
                ("env_mask", [0] * len(told) + [1] * len(reply["completion_ids"])),
            ):
                played[key][i] += values
            answer = judge(reply["text"], secrets[i])
            talks[i] += [
                {"role": "assistant", "content": reply["text"]},
                {"role": "user", "content": answer},
            ]
            if answer == "correct":
                found[i] = 1 - turn / GUESSES
                going.remove(i)
        if not going:
            break
    return {**played, "found": found}


def reward(found: list[float], **columns: Any) -> list[float]:
    return found


def lesson() -> dict[str, Any]:
    """A conversation of somebody who guesses what is still possible."""
    secret, low, high = random.randint(1, HIGH), 1, HIGH
    messages = [{"role": "user", "content": PROMPT}]
    for _ in range(GUESSES):
        number = random.randint(low, high)
        answer = judge(str(number), secret)
        messages.append({"role": "assistant", "content": str(number)})
        if answer == "correct":
            break
        messages.append({"role": "user", "content": answer})
        low, high = (number + 1, high) if answer == "higher" else (low, number - 1)
    return {"messages": messages}


def main() -> None:
    args = flags(__doc__, "rollout")
    trainer = GRPOTrainer(
        model=policy(args, (lesson() for _ in range(300))),
        reward_funcs=reward,
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=32,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": PROMPT}]}] * 64),
        rollout_func=play,
    )
    trainer.train()


if __name__ == "__main__":
    main()
