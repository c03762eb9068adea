"""Images are stored once, under the hash of their file, and are found again where runs left them."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.support.trajectories import trajectory
from tests.support.vision import picture
from turnwise import images
from turnwise.errors import ImageError, StoreError
from turnwise.images import ImageFolder, ImageStore
from turnwise.store import RunDir, read_trajectories
from turnwise.types import ImageBlock, Message, TextBlock


def test_an_image_is_its_pixels() -> None:
    red = images.put(picture("red"))
    assert red == images.put(picture("red")) != images.put(picture("blue"))
    assert red.sha256 == hashlib.sha256(images.STORE.read(red.sha256)).hexdigest()
    again = images.load(red.sha256)
    assert again.tobytes() == picture("red").tobytes()
    assert images.put(again) == red, "what was stored is stored as it is"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I;16", "HSV"])
def test_every_mode_is_shown_as_it_was(mode: str) -> None:
    image = Image.radial_gradient("L").resize((24, 16))
    image = image.convert("RGB").convert(mode) if mode != "I;16" else image.convert("I").convert("I;16")
    stored = images.load(images.put(image).sha256)
    assert stored.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_file_s_bytes_are_an_image_and_other_bytes_are_not() -> None:
    file = io.BytesIO()
    picture("red").save(file, "BMP")
    assert images.put(file.getvalue()) == images.put(picture("red"))
    for wrong, found in (
        (b"no image", "no image that Pillow reads"),
        (Image.new("RGB", (0, 4)), "0 × 4 pixels"),
    ):
        with pytest.raises(ImageError, match=found):
            images.put(wrong)
    with pytest.raises(ImageError, match="no PNG"):
        images.receive(file.getvalue())


def test_what_memory_cannot_hold_is_on_disk(tmp_path: Path) -> None:
    store = ImageStore(memory=100)
    files = [bytes([n]) * 60 for n in range(5)]
    names = [store.add(file) for file in files]
    assert len(store._held) == 1
    for _ in range(2):
        assert [store.read(name) for name in names] == files
    with pytest.raises(StoreError, match=r"image 0{64} is not stored here"):
        store.read("0" * 64)


def shown(*blocks: ImageBlock, id: str = "rl/0/e/0/s0") -> object:
    base = trajectory(id=id)
    first = base.segments[0]
    said = Message.user((TextBlock(text="Look."), *blocks))
    return replace(base, segments=(replace(first, prompt=(said,)), *base.segments[1:]))


def test_on_disk_too_it_may_be_bounded() -> None:
    """What was read longest ago goes; what is pinned stays, and what came before the bound."""
    store = ImageStore(memory=1)
    early = store.add(b"early" * 20)
    store.add(b"later" * 20)  # Which sends the one before to the disk.
    with store.bounded(disk=300):
        kept = store.add(b"pinned" * 10)
        store.pin([kept])
        shown = store.add(b"shown" * 20)
        names = []
        for number in range(20):
            names.append(store.add(bytes([number]) * 100))
            assert store.read(kept) and store.read(shown)
        gone = [name for name in names if not found(store, name)]
    assert gone == names[: len(gone)] and 14 <= len(gone) < 20
    assert found(store, early)


def found(store: ImageStore, sha256: str) -> bool:
    try:
        return bool(store.read(sha256))
    except StoreError:
        return False


@pytest.mark.parametrize("name", ["../secret", "", "0" * 63, "0" * 64 + "\n", "F" * 64])
def test_a_name_that_is_no_hash_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"not yours")
    store = ImageStore()
    store.look_in(tmp_path / "images")
    with pytest.raises(StoreError, match="64 hex digits"):
        store.read(name)
    with pytest.raises(StoreError, match="64 hex digits"):
        ImageFolder(tmp_path / "images").keep([name])


def test_a_run_keeps_what_its_trajectories_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, task, nobody = (images.put(picture(color)) for color in ("red", "blue", "green"))
    run = RunDir(tmp_path / "run")
    with run.lock():
        row = {"prompt": [{"content": [{"type": "image", "sha256": task.sha256}]}]}
        run.append("rl", replace(shown(told), task=row))  # type: ignore[type-var]
    found = {path.stem for path in (tmp_path / "run/images").iterdir()}
    assert found == {told.sha256, task.sha256} and nobody.sha256 not in found
    file = images.STORE.read(told.sha256)

    # Another process, which has nothing in memory: whoever opens the run, or its file alone, finds them.
    for reading in (
        lambda: RunDir(tmp_path / "run"),
        lambda: [*read_trajectories(run.path / "trajectories/rl.jsonl")],
    ):
        store = ImageStore()
        monkeypatch.setattr(images, "STORE", store)
        monkeypatch.setattr("turnwise.store.STORE", store)
        with pytest.raises(StoreError):
            store.read(told.sha256)
        reading()
        assert store.read(told.sha256) == file
    (tmp_path / f"run/images/{told.sha256}.png").write_bytes(b"something else")
    store = ImageStore()
    store.look_in(tmp_path / "run/images")
    with pytest.raises(StoreError, match="its hash is not its name"):
        store.read(told.sha256)


def test_a_trajectory_is_not_stored_without_its_images(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock():
        with pytest.raises(StoreError, match=r"image f{64} is not stored here"):
            run.append("rl", shown(ImageBlock(sha256="f" * 64)))  # type: ignore[arg-type]
        assert list(run.read("rl")) == []
        run.append("rl", shown(images.put(picture("red"))))  # type: ignore[arg-type]
        assert len(list(run.read("rl"))) == 1


def test_half_an_image_is_swept_away(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    red = images.put(picture("red"))
    with run.lock():
        run.append("rl", shown(red))  # type: ignore[arg-type]
    part = tmp_path / f"images/.{red.sha256}.png.1.part"
    part.write_bytes(b"half")
    with run.lock():
        assert not part.exists()
        assert (tmp_path / f"images/{red.sha256}.png").exists()


def test_a_folder_writes_an_image_once(tmp_path: Path) -> None:
    folder, red = ImageFolder(tmp_path / "images"), images.put(picture("red"))
    folder.keep([red.sha256])
    written = (tmp_path / f"images/{red.sha256}.png").stat().st_mtime_ns
    ImageFolder(tmp_path / "images").keep([red.sha256, red.sha256])
    assert (tmp_path / f"images/{red.sha256}.png").stat().st_mtime_ns == written
    folder.flush()
