"""For all tests: how hypothesis draws; Ctrl-C means what it means in a terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# No deadlines: a machine that is busy for a moment is no bug. The same examples each time, so that a change
# is not held up by what it did not do; TURNWISE_NEW_EXAMPLES=1 draws new ones.
NEW = os.environ.get("TURNWISE_NEW_EXAMPLES") == "1"
settings.register_profile("turnwise", deadline=None, derandomize=not NEW, print_blob=True)
settings.load_profile("turnwise")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    # A shell has its background jobs ignore SIGINT, and Python leaves that as it finds it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
