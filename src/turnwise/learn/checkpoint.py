"""Directories that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turnwise.errors import StoreError, boundary


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new directory to write into, which becomes ``path`` at the end, replacing what was there.

    Raises:
        StoreError: It could not be written; whatever was at ``path`` is still there.
    """
    parts = path.with_name(f".{path.name}.part-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        with boundary(StoreError, f"writing {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir()
            yield parts
            for file in sorted(parts.rglob("*")):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                path.rename(old)
            parts.rename(path)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
