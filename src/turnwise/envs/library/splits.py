"""Which tasks are held out: decided by a hash of what the task is, never by its place in a list or its
seed.
"""

from __future__ import annotations

import hashlib

from turnwise.errors import TaskError

TRAIN, TEST = "train", "test"


def checked(split: str, env: str) -> str:
    """``split`` if it is one of the two that the library's environments have.

    Raises:
        TaskError: It is another one.
    """
    if split not in (TRAIN, TEST):
        raise TaskError(f"environment {env} has no split {split!r}; it has {TRAIN!r} and {TEST!r}")
    return split


def place(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone, the same on every machine and in every version."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(key: str, test_share: float) -> str:
    """The split that the task with this key belongs to; ``test_share`` of all keys are held out.

    Growing ``test_share`` moves tasks from train to test and none back.
    """
    return TEST if place(key) < test_share else TRAIN
