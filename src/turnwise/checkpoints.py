"""Model directories that are whole or not there, and a run's checkpoints, which are such directories.

with whole_directory(path) as part:     # hidden, beside its place
    model.save_pretrained(part)         # when the block ends it stands at `path`, flushed
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turnwise.errors import StoreError
from turnwise.journal import sync_directory, sync_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete model directory of a run."""

    stage: str
    step: int
    path: Path


class Checkpoints:
    """A run's checkpoints: the directories ``<stage>-<step>`` below one. Each that is there is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def write(self, stage: str, step: int) -> Iterator[Path]:
        """An empty directory to save a model into; it becomes the checkpoint, whole, when the block ends.

        Raises:
            StoreError: The disk is full; no part of a checkpoint is left and older ones are intact.
        """
        final = self.path / f"{stage}-{step}"
        try:
            with whole_directory(final) as part:
                yield part
        except OSError as cause:
            raise StoreError(
                f"cannot write the checkpoint {final}: {cause.strerror or cause}; older ones are intact"
            ) from cause

    def of(self, stage: str) -> list[Checkpoint]:
        """A stage's checkpoints, oldest first."""
        found = []
        for path in self.path.glob(f"{stage}-*"):
            name, _, step = path.name.rpartition("-")
            if name == stage and step.isdigit():
                found.append(Checkpoint(stage=stage, step=int(step), path=path))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Delete one."""
        # Out of sight first: what is half deleted must not look complete.
        gone = checkpoint.path.with_name(f".{checkpoint.path.name}.gone")
        checkpoint.path.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Clear away what a killed process was in the middle of; what it was replacing is put back."""
        # Whatever is hidden here: what saves a model may hide parts of its own beside ours.
        sweep(self.path, "")


def sweep(path: Path, name: str) -> None:
    """Clear away hidden directories in ``path`` whose names begin so; what one was replacing is put back."""
    for old in path.glob(f".{name or '[!.]'}*.old"):
        _put_back(old, old.with_name(old.name[1:].removesuffix(".old")))
    for part in path.glob(f".{name}*"):
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new directory to write into, which becomes ``path`` at the end, in place of what was there.

    Raises:
        OSError: It could not be written; whatever was at ``path`` is still there.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    _put_back(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _sync_tree(part)
        if path.exists():
            path.replace(old)
        part.replace(path)
        sync_directory(path.parent)
    finally:
        _put_back(old, path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """Undo a replacement that was not finished."""
    if old.exists() and not path.exists():
        old.replace(path)


def _sync_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        if path.is_dir():
            sync_directory(path)
        else:
            sync_file(path)
