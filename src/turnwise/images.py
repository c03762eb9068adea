"""Images, stored once under the hash of their file: everything else names them.

    block = images.put(picture)              # a PIL image, or the bytes of an image file
    images.load(block.sha256)                # the PIL image again

Environments put what they show, on their thread or in their process; messages, trajectories and samples
hold hashes; the renderer asks for a size, and pixels become tensors in the engine and the learner alone. A
hash means the same bytes to every run of a process, so there is one store: in memory up to a bound, what is
more in a temporary directory. A run keeps the images of its trajectories in its own (`ImageFolder`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from turnwise.errors import ImageError, MissingExtraError, StoreError, boundary
from turnwise.journal import sync_file
from turnwise.types import ImageBlock, Kept, Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY = 256 << 20
"""Bytes of image files that are kept in memory."""
FILES = "[0-9a-f]" * 64 + ".png"
"""What images are called in a run's directory, as a pattern: others there are somebody else's."""
_NAME = re.compile("[0-9a-f]{64}")
_AS_THEY_ARE = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes that a PNG holds without loss; others are stored as RGB, which is what models are shown anyway."""


class ImageStore:
    """Image files by hash. Used from any thread.

    Args:
        memory: Bytes to keep in memory; what is more goes to a temporary directory.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory, self._used = memory, 0
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._disk: int | None = None
        self._spilled: OrderedDict[str, int] = OrderedDict()
        """Bytes of each file that may be forgotten, the one read longest ago first."""
        self._spilled_bytes = 0
        self._pinned: set[str] = set()
        self._folders: list[Path] = []
        """Where files may be that memory has not, those of open runs."""
        self._overflow: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Store a PNG file; returns its hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            if sha256 not in self._held:
                self._hold(sha256, data)
        return sha256

    def read(self, sha256: str) -> bytes:
        """The file of a hash.

        Raises:
            StoreError: It is nowhere to be found.
        """
        with self._lock:
            data = self._held.get(sha256)
            if data is not None:
                self._held.move_to_end(sha256)
                return data
            overflow = [] if self._overflow is None else [Path(self._overflow.name)]
            for folder in (*self._folders, *overflow):
                try:
                    data = _file(folder, sha256).read_bytes()
                except FileNotFoundError:
                    continue
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise StoreError(f"{_file(folder, sha256)} was changed: its hash is not its name")
                self._hold(sha256, data)
                return data
            where = ", ".join(map(str, self._folders)) or "no run directory is open"
            raise StoreError(f"image {sha256} is not stored here (looked in memory and in: {where})")

    @contextmanager
    def bounded(self, disk: int) -> Iterator[None]:
        """Let the temporary directory hold ``disk`` bytes at most: what was read longest ago is forgotten.

        For a process that shows images and goes on for ever. A run needs all of its own, until they are kept.
        """
        before, self._disk = self._disk, disk
        try:
            yield
        finally:
            self._disk = before

    def pin(self, hashes: Iterable[str]) -> None:
        """Never forget these: what names them lives as long as the process."""
        with self._lock:
            for sha256 in hashes:
                self._pinned.add(sha256)
                self._spilled_bytes -= self._spilled.pop(sha256, 0)

    def look_in(self, folder: Path) -> None:
        """Find files in ``folder`` too, from now on."""
        with self._lock:
            if folder not in self._folders:
                self._folders.append(folder)

    def _hold(self, sha256: str, data: bytes) -> None:
        self._held[sha256] = data
        self._used += len(data)
        while self._used > self._memory and len(self._held) > 1:
            name, old = self._held.popitem(last=False)
            self._used -= len(old)
            if not any(_file(folder, name).exists() for folder in self._folders):
                if self._overflow is None:
                    self._overflow = tempfile.TemporaryDirectory(prefix="turnwise-images-")
                self._spill(Path(self._overflow.name), name, old)

    def _spill(self, folder: Path, name: str, data: bytes) -> None:
        _file(folder, name).write_bytes(data)
        if self._disk is None or name in self._pinned:
            return
        self._spilled_bytes += len(data) - self._spilled.pop(name, 0)
        self._spilled[name] = len(data)
        while self._spilled_bytes > self._disk:
            oldest, size = self._spilled.popitem(last=False)
            self._spilled_bytes -= size
            _file(folder, oldest).unlink(missing_ok=True)


STORE = ImageStore()
"""This process's."""


class ImageFolder:
    """The images of one run: ``<sha256>.png`` each, written before the first trajectory that names it.

    Args:
        path: Made with the first image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] = set()
        self._loose: list[Path] = []
        STORE.look_in(path)

    def keep(self, hashes: Iterable[str]) -> None:
        """Write those that are not there yet. The death of the process cannot undo it, `flush` the machine's.

        Raises:
            StoreError: The disk is full, or an image is nowhere to be found.
        """
        for sha256 in hashes:
            path = _file(self.path, sha256)
            if sha256 in self._known or path.exists():
                self._known.add(sha256)
                continue
            data = STORE.read(sha256)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
                part.replace(path)
            except OSError as cause:
                part.unlink(missing_ok=True)
                raise StoreError(f"cannot write {path}: {cause.strerror}") from cause
            self._known.add(sha256)
            self._loose.append(path)

    def flush(self) -> None:
        """Wait until what was written would survive a loss of power.

        Raises:
            OSError: It would not.
        """
        for path in self._loose:
            sync_file(path)
        if self._loose:
            sync_file(self.path)
        self._loose.clear()

    def sweep(self) -> None:
        """Clear away what a killed process left half-written; what it finished is flushed with the next."""
        for part in self.path.glob(f".{FILES}.*.part"):
            part.unlink(missing_ok=True)
        self._loose = sorted(self.path.glob(FILES))


def put(image: Image | bytes) -> ImageBlock:
    """Store an image and name it.

    Args:
        image: A PIL image, stored as a PNG with nothing of it lost but its metadata; or a file's bytes.

    Raises:
        ImageError: These are no bytes of an image, or it has no pixels.
        MissingExtraError: Pillow is not installed.
    """
    if isinstance(image, bytes):
        image = _opened(image, "the bytes")
    if 0 in image.size:
        raise ImageError(f"an image of {image.width} × {image.height} pixels shows nothing")
    if image.mode not in _AS_THEY_ARE:
        image = image.convert("RGB")
    transparency = image.info.get("transparency")
    file = io.BytesIO()
    with boundary(ImageError, "the image cannot be stored as a PNG"):
        # Level 1 is several times as fast as the default, and a tenth larger on screenshots.
        image.save(
            file, "PNG", compress_level=1, icc_profile=None, exif=b"",
            **({} if transparency is None else {"transparency": transparency}),
        )  # fmt: skip
    return ImageBlock(sha256=STORE.add(file.getvalue()))


def load(sha256: str) -> Image:
    """The image of a hash. Its size is known; pixels are decoded when somebody looks at them.

    Raises:
        StoreError: It is nowhere to be found.
        MissingExtraError: Pillow is not installed.
    """
    return _opened(STORE.read(sha256), f"the file of image {sha256}")


def receive(data: bytes) -> None:
    """Store a file that another process has made.

    Raises:
        ImageError: It is no image.
    """
    if _opened(data, "the bytes").format != "PNG":
        raise ImageError("the bytes are no PNG file")
    STORE.add(data)


def read_url(part: Any) -> tuple[str, bytes]:
    """Media type and file of a content block's ``image_url``: a data URL, alone or as its ``url``.

    Raises:
        ImageError: It is none. Nothing is fetched.
    """
    url = str(part.get("url") if isinstance(part, Mapping) else part)
    head, found, body = url.partition(";base64,")
    if not (found and head.startswith("data:image/")):
        raise ImageError(f"the image URL {url[:60]!r}; none is fetched: write data:image/…;base64,…")
    try:
        return head.removeprefix("data:"), base64.b64decode(body, validate=True)
    except ValueError:
        raise ImageError("an image URL whose base64 is broken") from None


def is_image(value: Any) -> TypeGuard[Image]:
    """Whether a value is a PIL image; no library is imported to find out."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def named_in(trajectory: Trajectory) -> set[str]:
    """The hashes of all images that a trajectory names: shown to the policy, and in its task's row."""
    hashes = {sha256 for segment in trajectory.segments for sha256 in segment.images}
    contents = [message.content for segment in trajectory.segments for message in segment.messages]
    contents += [result.content for turn in trajectory.turns for result in turn.tool_results]
    for content in contents:
        if not isinstance(content, str):
            hashes |= {block.sha256 for block in content if isinstance(block, ImageBlock)}
    return hashes | named_in_json(trajectory.task)


def named_in_json(value: Any) -> set[str]:
    """The hashes of the images that JSON of a row names."""
    hashes: set[str] = set()
    left = [value]
    while left:
        value = left.pop()
        if (block := named(value)) is not None:
            hashes.add(block.sha256)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return hashes


def as_json(image: Image | bytes) -> dict[str, str]:
    """Store an image; what stands for it in a task's row: ``{"type": "image", "sha256": …}``."""
    return asdict(put(image))


def revived(value: Any) -> Any:
    """JSON of a row with PIL images where it names some, and the values that it keeps in memory.

    What is changed in it is not changed in ``value``.
    """
    if isinstance(value, Kept):
        return value.value
    if (block := named(value)) is not None:
        return load(block.sha256)
    if isinstance(value, Mapping):
        return {name: revived(one) for name, one in value.items()}
    return [revived(one) for one in value] if isinstance(value, list | tuple) else value


def named(value: Any) -> ImageBlock | None:
    """The block that JSON of a row names: ``{"type": "image", "sha256": …}``; None where it names none."""
    if isinstance(value, Mapping) and value.get("type") == "image" and isinstance(value.get("sha256"), str):
        return ImageBlock(sha256=value["sha256"], media_type=value.get("media_type", "image/png"))
    return None


def _opened(data: bytes, what: str) -> Image:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "images", "an image") from None
    with boundary(ImageError, f"{what} are no image that Pillow reads"):
        return Image.open(io.BytesIO(data))


def _file(folder: Path, sha256: str) -> Path:
    if _NAME.fullmatch(sha256) is None:  # Whoever sends a row or a message writes it.
        raise StoreError(f"no image is called {sha256!r:.80}: they are called by a SHA-256, 64 hex digits")
    return folder / f"{sha256}.png"
