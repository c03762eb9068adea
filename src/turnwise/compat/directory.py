"""``output_dir`` as a run directory whose checkpoints stand where users of transformers look for them.

    output_dir/
      checkpoint-20/          model, tokenizer, learner state, trainer_state.json
      recipe.yaml  steps.jsonl  metrics.jsonl  trajectories/  done/     as every run of Turnwise has them
      previous-1/             a run that was there before, when another was begun

The directory may be one that is in use otherwise, the working directory too: what no run wrote stays where it
is, and what stands where a run has to write is not written over.

A checkpoint is for ``from_pretrained`` and for resuming, and is written whole or not at all. What was played
after the last one is on disk too, so a resumed run makes those updates again without playing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from turnwise.checkpoints import Checkpoint, Checkpoints, sweep, whole_directory
from turnwise.codec import decode_id, parse
from turnwise.errors import RecipeError, StoreError
from turnwise.images import FILES, STORE, ImageFolder
from turnwise.journal import Journal, write_atomic
from turnwise.store import RunDir

log = logging.getLogger(__name__)

MARK = "turnwise.json"
"""In a checkpoint: of which stage and step it is. One without it was made by another program."""
STATE = "trainer_state.json"
EVALUATION = "eval"
"""The stage under which evaluations in between are stored."""
JOURNALS = ("steps.jsonl", "metrics.jsonl")
OURS = (
    "recipe.yaml", "sources.json", *JOURNALS, "summary.json", STATE, "trajectories/*.jsonl", "done/*.json",
    "checkpoints/*", "completions/completions_*.parquet", f"images/{FILES}",
)  # fmt: skip
"""What a run writes into its directory, beside `NUMBERED`. (A report is made again by whoever wants it.)"""
NUMBERED = "checkpoint-"


class NumberedCheckpoints(Checkpoints):
    """One stage's checkpoints as ``checkpoint-<updates>``; other stages' models where they always are.

    Args:
        path: The output directory.
        stage: Whose they are.
        updates: How many updates are made now: the number of the next one.
    """

    def __init__(self, path: Path, stage: str, updates: Callable[[], int]) -> None:
        super().__init__(path / "checkpoints")
        self._root, self._stage, self._updates = path, stage, updates

    @contextmanager
    def write(self, stage: str, step: int) -> Iterator[Path]:
        """As of `Checkpoints`."""
        if stage != self._stage:
            with super().write(stage, step) as part:
                yield part
            return
        final = self._root / f"{NUMBERED}{self._updates()}"
        if final.exists() and not (final / MARK).exists():
            place = new_place(self._root)
            final.rename(place / final.name)
            log.warning("%s was made by another program: it is in %s now", final, place)
        try:
            with whole_directory(final) as part:
                yield part
                (part / MARK).write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
        except OSError as cause:
            raise StoreError(
                f"cannot write {final}: {cause.strerror or cause}; older checkpoints are intact"
            ) from cause

    def of(self, stage: str) -> list[Checkpoint]:
        """As of `Checkpoints`."""
        if stage != self._stage:
            return super().of(stage)
        found = [
            Checkpoint(stage=stage, step=step, path=path)
            for path in self._root.glob(f"{NUMBERED}*")
            if (step := step_of(path, stage)) is not None
        ]
        return sorted(found, key=lambda one: (one.step, number_of(one.path)))

    def sweep(self) -> None:
        """As of `Checkpoints`; in the output directory only what has a checkpoint's name."""
        super().sweep()
        sweep(self._root, NUMBERED)


class TrainerDir(RunDir):
    """A trainer's output directory.

    Args:
        path: ``output_dir``.
        stage: ``rl`` or ``sft``.
        updates: How many updates are made now.
    """

    def __init__(self, path: Path | str, stage: str, updates: Callable[[], int]) -> None:
        super().__init__(path, checkpoints=NumberedCheckpoints(Path(path), stage, updates))
        self.stage = stage

    def set_aside(self) -> Path | None:
        """Move what a run has left here into a directory of its own, and return that; None if there was none.

        The lock must be held, and nothing written yet.

        Raises:
            RecipeError: A file that a run has to write is there, and no run has written it.
        """
        numbered = [path for path in self.path.glob(f"{NUMBERED}*") if (path / MARK).exists()]
        if self.recipe() is None and not numbered:
            taken = [name for name in JOURNALS if (self.path / name).exists()]
            if taken:
                raise RecipeError(
                    f"output_dir: {self.path} holds {' and '.join(taken)}, which no run of Turnwise has "
                    "written, and which a run writes: choose another directory, or move the file"
                )
            return None
        place = new_place(self.path)
        for entry in (*numbered, *(path for pattern in OURS for path in sorted(self.path.glob(pattern)))):
            target = place / entry.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            entry.rename(target)
        for folder in {pattern.partition("/")[0] for pattern in OURS if "/" in pattern}:
            with suppress(OSError):  # It is not there, or holds what is somebody else's.
                (self.path / folder).rmdir()
        # Images are found where they are now, and those that the next run names are written anew.
        STORE.look_in(place / self.images.name)
        self._images = ImageFolder(self.images)
        log.warning(
            "%s holds a run already: it is in %s now, and this one starts anew. "
            "train(resume_from_checkpoint=True) would go on with it", self.path, place,
        )  # fmt: skip
        return place

    def resume(self, which: bool | str | Path) -> Checkpoint | None:
        """Make ready to go on from a checkpoint; what was made after one that is not the last is set aside.

        Args:
            which: True for the last one, or the path of one of this directory.

        Returns:
            The checkpoint; None where the run was stopped before its first.

        Raises:
            RecipeError: There is no run to go on with, or no such checkpoint in it.
        """
        latest = self.latest(self.stage)
        if which is True:
            if latest is None and self.recipe() is None:
                raise RecipeError(
                    f"resume_from_checkpoint=True: {self.path} holds no run of Turnwise to go on with; "
                    "leave it out to begin one"
                )
            return latest
        path = Path(str(which))
        step = step_of(path, self.stage)
        if step is None:
            raise RecipeError(
                f"resume_from_checkpoint: {path} is no checkpoint that this trainer wrote. To start from its "
                "weights, hand its path over as the model"
            )
        if path.resolve().parent != self.path.resolve():
            raise RecipeError(
                f"resume_from_checkpoint: {path} lies in another run than output_dir, {self.path}; set "
                f"output_dir to {path.parent}"
            )
        assert latest is not None
        if step < latest.step:
            self._go_back(step)
        return Checkpoint(stage=self.stage, step=step, path=path)

    def _go_back(self, step: int) -> None:
        """Forget the steps after this one and what was played for them, which is kept elsewhere."""
        place = new_place(self.path)
        for checkpoint in self.checkpoints(self.stage):
            if checkpoint.step > step:
                checkpoint.path.rename(place / checkpoint.path.name)
        used = {
            one for record in self.steps(self.stage) if record.step <= step for one in record.trajectory_ids
        }
        for name, keeps in (
            (f"trajectories/{self.stage}.jsonl", lambda line: decode_id(line) in used),
            ("steps.jsonl", lambda line: parse(line)["stage"] != self.stage or parse(line)["step"] <= step),
        ):
            lines = list(Journal(self.path / name).lines())
            (place / name).parent.mkdir(exist_ok=True)
            write_atomic(place / name, b"".join(lines))
            write_atomic(self.path / name, b"".join(line for line in lines if keeps(line)))
        write_atomic(place / "metrics.jsonl", b"".join(Journal(self.path / "metrics.jsonl").lines()))
        for stage in (self.stage, EVALUATION):
            self.cut_metrics(stage, after=step)
        log.warning("%s goes on after step %d; what came later is in %s", self.path, step, place)


def new_place(path: Path) -> Path:
    """A directory of an output directory for what was there before: ``previous-<n>``, made and empty."""
    taken = [number_of(one) for one in path.glob("previous-*")]
    place = path / f"previous-{1 + max(taken, default=0)}"
    place.mkdir()
    return place


def step_of(path: Path, stage: str) -> int | None:
    """The step of a checkpoint of this stage; None for any other directory."""
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(mark["step"]) if mark["stage"] == stage else None


def number_of(path: Path) -> int:
    """The number at the end of a directory's name; 0 where there is none."""
    end = path.name.rpartition("-")[2]
    return int(end) if end.isdigit() else 0
