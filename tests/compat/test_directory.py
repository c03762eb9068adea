"""``output_dir`` where a run was before, and where other things are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.trajectories import trajectory
from tests.support.vision import picture
from turnwise import images
from turnwise.compat.directory import MARK, TrainerDir
from turnwise.errors import RecipeError, StoreError
from turnwise.images import ImageStore
from turnwise.store import StepRecord
from turnwise.types import ImageBlock


def directory(path: Path) -> TrainerDir:
    return TrainerDir(path, "rl", lambda: 2)


def play(run: TrainerDir, shown: Sequence[ImageBlock] = ()) -> None:
    """What one step of a run leaves."""
    run.write_recipe("name: run\n")
    row = {"images": [{"type": "image", "sha256": one.sha256} for one in shown]}
    played = replace(trajectory(), id="rl/a/0/s0", task=row)
    run.append("rl", played)
    run.append_step(StepRecord(stage="rl", step=1, trajectory_ids=(played.id,)))
    with run.checkpoint("rl", 1) as part:
        (part / "model.safetensors").write_bytes(b"weights")
    run.mark_done("rl", {})


def files(path: Path) -> set[str]:
    return {str(one.relative_to(path)) for one in path.rglob("*") if one.is_file() and one.name != ".lock"}


def test_a_run_is_set_aside_whole_and_the_next_one_keeps_images_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = images.put(picture("red")), images.put(picture("blue"))
    run = directory(tmp_path)
    with run.lock():
        assert run.set_aside() is None
        play(run, [red])
    ran = files(tmp_path)
    assert f"images/{red.sha256}.png" in ran and f"checkpoint-2/{MARK}" in ran
    again = directory(tmp_path)
    with again.lock():
        assert again.set_aside() == tmp_path / "previous-1"
        assert files(tmp_path) == {f"previous-1/{name}" for name in ran}
        assert {one.name for one in tmp_path.iterdir()} == {".lock", "previous-1"}
        play(again, [red, blue])
    shown = {one.name for one in (tmp_path / "images").iterdir()}
    assert shown == {f"{one.sha256}.png" for one in (red, blue)}

    # What memory has no room for is read where it went.
    store = ImageStore()
    monkeypatch.setattr(images, "STORE", store)
    monkeypatch.setattr("turnwise.compat.directory.STORE", store)
    last = directory(tmp_path)
    with last.lock():
        last.set_aside()
        assert images.load(red.sha256).size == picture("red").size


def test_what_no_run_wrote_stays_where_it_is(tmp_path: Path) -> None:
    own = ("images/cat.png", "completions/mine.txt", "done/list.txt", "report.html", "checkpoint-9/model.bin")
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    red = images.put(picture("red"))
    for before in (None, tmp_path / "previous-1"):
        run = directory(tmp_path)
        with run.lock():
            assert run.set_aside() == before
            play(run, [red])
        assert [(tmp_path / name).read_text() for name in own] == ["mine"] * len(own)
    assert (tmp_path / f"previous-1/images/{red.sha256}.png").exists()


def test_another_program_s_checkpoint_is_not_written_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/model.bin").write_text("mine")
    run = directory(tmp_path)
    with run.lock():
        assert run.set_aside() is None
        play(run)
    assert (tmp_path / "previous-1/checkpoint-2/model.bin").read_text() == "mine"
    assert json.loads((tmp_path / "checkpoint-2" / MARK).read_text()) == {"stage": "rl", "step": 1}
    assert "checkpoint-2 was made by another program: it is in" in caplog.text


def test_files_that_a_run_would_write_into_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    run = directory(tmp_path)
    with run.lock(), pytest.raises(RecipeError, match=r"holds metrics\.jsonl, which no run of Turnwise"):
        run.set_aside()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 1}\n'


def test_a_failed_flush_names_what_could_not_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = images.put(picture("red"))
    run = directory(tmp_path)
    with run.lock():
        run.append("rl", replace(trajectory(), task={"image": {"type": "image", "sha256": red.sha256}}))
        (tmp_path / f"images/{red.sha256}.png").unlink()
        with pytest.raises(StoreError, match=rf"cannot flush .*images/{red.sha256}\.png: No such file"):
            run.mark_done("rl", {})
