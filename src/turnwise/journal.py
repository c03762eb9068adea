"""Files that survive a crash: `Journal`, a file of lines that only grows, and `write_atomic`, all or nothing.

A process killed at any byte leaves at most one torn last line, which the next writer cuts away. A disk that
fills up in the middle of a line is an error, and the file is as it was before that line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from turnwise.errors import StoreError

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


class Journal:
    """An append-only file of lines. One writer at a time; any number of readers, while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._size = 0

    def append(self, line: bytes) -> None:
        """Add one line, whole or not at all.

        Args:
            line: Ends with its only newline.

        Raises:
            StoreError: The disk is full or gone; every earlier line is intact.
        """
        assert line.endswith(b"\n") and line.count(b"\n") == 1, "a record is one line"
        fd = self._open()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError as cause:
            # The cut must not hide why the write failed.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self._size)
            raise StoreError(
                f"cannot write to {self.path}: {cause.strerror}. Its first {self._size:,} bytes are whole "
                "records and intact; make room and run the same command again"
            ) from cause
        self._size += len(line)

    def sync(self) -> None:
        """Wait until what was appended would survive a loss of power."""
        if self._fd is not None:
            try:
                os.fsync(self._fd)
            except OSError as cause:
                raise StoreError(f"cannot flush {self.path}: {cause.strerror}") from cause

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def lines(self) -> Iterator[bytes]:
        """The whole lines, oldest first; a torn last one is left out. Nothing where there is no file."""
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield line
        except FileNotFoundError:
            return

    def _open(self) -> int:
        if self._fd is None:
            try:
                new = not self.path.exists()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                if new:
                    sync_directory(self.path.parent)
            except OSError as cause:
                raise StoreError(f"cannot open {self.path} for writing: {cause.strerror}") from cause
            try:
                self._size = self._repair(fd)
            except OSError as cause:
                os.close(fd)
                raise StoreError(f"cannot repair {self.path}: {cause.strerror}") from cause
            self._fd = fd
        return self._fd

    def _repair(self, fd: int) -> int:
        """Cut a torn last line away; the size of what is whole."""
        size = os.fstat(fd).st_size
        whole = size
        while whole > 0:
            start = max(0, whole - _BLOCK)
            newline = os.pread(fd, whole - start, start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < size:
            os.ftruncate(fd, whole)
            logger.warning("%s: cut away a torn last line of %d bytes", self.path, size - whole)
        return whole


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a reader, or a crash, sees the old file or the new one.

    Raises:
        StoreError: The disk is full or gone; the old file is intact.
    """
    # Of this process alone: a report may be written while the run goes on.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_directory(path.parent)
    except OSError as cause:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {cause.strerror}; what was there before is intact") from cause


def sync_directory(path: Path) -> None:
    """Make new names inside ``path`` last."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until what is in ``path`` would survive a loss of power, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON in one step; what is not finite becomes null.

    Raises:
        StoreError: The disk is full, or the value is not JSON; the old file is intact.
    """
    try:
        data = orjson.dumps(
            value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=plain_number
        )
    except TypeError as cause:
        raise StoreError(f"{path}: {cause}") from cause
    write_atomic(path, data)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is no file.

    Raises:
        StoreError: It is not JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError as cause:
        raise StoreError(f"{path} is not JSON ({cause}): delete it and run the same command again") from cause
    return value


def plain_number(value: object) -> float | int | None:
    """Numbers of other libraries (numpy's, a tensor of one element) by their value."""
    item = getattr(value, "item", None)
    if item is None:
        raise TypeError(f"{type(value).__name__} is not JSON")
    number = item()
    if not isinstance(number, float | int):
        raise TypeError(f"{type(value).__name__} is not a number")
    return number if math.isfinite(number) else None
