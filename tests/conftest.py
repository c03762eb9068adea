"""For all tests: how hypothesis draws."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: a machine that is busy for a moment is no bug. In CI the same examples each time, so that a
# change is not held up by what it did not do; everywhere else new ones.
settings.register_profile("turnwise", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("turnwise")
