"""Callbacks: the same events at the same steps, and what they wish is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.compat.referee.packages import PACKAGES, UNEVALUATED, PackageName, Run
from tests.compat.referee.scripts import SUM_ROWS, sums
from transformers import TrainerCallback

EVENTS = ("train_begin", "epoch_begin", "step_begin", "step_end", "log", "evaluate", "save", "epoch_end",
          "train_end")  # fmt: skip
Event = tuple[str, int, float | None]


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes down what it is told, and wishes what a table says at an event of a step."""

    def __init__(self, wishes: dict[tuple[str, int], str] | None = None) -> None:
        self.events: list[Event] = []
        self.wishes = wishes or {}
        self.given: dict[str, set[str]] = {}
        self.logs: list[dict[str, Any]] = []

    def _hear(self, event: str, state: Any, control: Any, given: dict[str, Any]) -> Any:
        self.events.append((event, state.global_step, round(state.epoch or 0.0, 6)))
        self.given[event] = {name for name, value in given.items() if value is not None}
        wish = self.wishes.get((event, state.global_step))
        if wish is not None:
            setattr(control, wish, True)
        if event == "log":
            self.logs.append(dict(given["logs"]))
        return control


def _told(event: str) -> Callable[..., Any]:
    def told(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> Any:
        return self._hear(event, state, control, given)

    return told


for _event in EVENTS:
    setattr(Recorder, f"on_{_event}", _told(_event))


def heard(package: PackageName, out: Path, wishes: Any = None, **settings: Any) -> tuple[Recorder, Run]:
    recorder = Recorder(wishes)
    return recorder, sums(package, out, given={"callbacks": [recorder]}, **settings)


def compare(out: Path, wishes: Any = None, **settings: Any) -> tuple[Recorder, Recorder]:
    (theirs, _), (ours, _) = (heard(package, out / package, wishes, **settings) for package in PACKAGES)
    assert ours.events == theirs.events
    return theirs, ours


EVALUATED = {"eval_rows": SUM_ROWS[:2], "eval_strategy": "steps", "eval_steps": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **EVALUATED,
    },
    "epochs": {
        "max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_strategy": "epoch",
        "eval_rows": SUM_ROWS[:2], "eval_strategy": "epoch",
    },
    "updates of one batch": {
        "max_steps": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2,
        "logging_steps": 3, "save_strategy": "steps", "save_steps": 4,
    },
    "an evaluation before the first step": {"max_steps": 2, "eval_on_start": True, **EVALUATED},
    "nothing but steps": {"max_steps": 3, "logging_strategy": "no"},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS],
)
def test_the_same_events_in_the_same_order(name: str, tmp_path: Path) -> None:
    theirs, ours = compare(tmp_path, **SETTINGS[name])
    for event, given in theirs.given.items():
        assert given - {"eval_dataloader"} <= ours.given[event], event
    for their, our in zip(theirs.logs, ours.logs, strict=True):
        assert their.keys() - UNEVALUATED <= our.keys()


@pytest.mark.slow
def test_a_checkpoint_waits_for_the_end_of_a_batch(tmp_path: Path) -> None:
    """TRL saves between two updates of one batch, and a resumed run plays that batch anew. Ours goes on."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2,
                "num_iterations": 2, "save_strategy": "steps", "save_steps": 3}  # fmt: skip
    saved = {}
    for package in PACKAGES:
        recorder, _ = heard(package, tmp_path / package, **settings)
        saved[package] = [step for event, step, _ in recorder.events if event == "save"]
    assert saved["trl"][0] == 3
    assert saved["turnwise"] == [4]


WISHES: dict[str, dict[tuple[str, int], str]] = {
    "stop": {("step_end", 2): "should_training_stop"},
    "save": {("step_end", 1): "should_save"},
    "log": {("step_end", 1): "should_log"},
    "evaluate": {("step_end", 1): "should_evaluate"},
}


@pytest.mark.parametrize(
    "name", [name if name == "stop" else pytest.param(name, marks=pytest.mark.slow) for name in WISHES]
)
def test_what_a_callback_wishes_is_done(name: str, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "logging_strategy": "no", "eval_rows": SUM_ROWS[:2]}
    if name == "save":
        settings |= {"save_strategy": "steps", "save_steps": 3}
    theirs, _ = compare(tmp_path, WISHES[name], **settings)
    events = [event for event, _, _ in theirs.events]
    assert events.count("step_end") == (2 if name == "stop" else 3)
    if name != "stop":
        assert name in events


def test_callbacks_come_as_classes_and_later_too(tmp_path: Path) -> None:
    """``callbacks=[Class]``, ``add_callback``, ``remove_callback``."""
    from tests.compat.referee.packages import trainer
    from tests.compat.referee.scripts import model, uneven

    class Counting(TrainerCallback):  # type: ignore[misc]
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            type(self).steps += 1

    for package in PACKAGES:
        Counting.steps = 0
        late, gone = Recorder(), Recorder()
        made = trainer(
            package, model("sums"), tmp_path / package, rows=SUM_ROWS, max_steps=1,
            given={"reward_funcs": uneven, "callbacks": [Counting]},
        )  # fmt: skip
        made.add_callback(late)
        made.add_callback(gone)
        made.remove_callback(gone)
        made.train()
        assert Counting.steps == 1, package
        assert [event for event, _, _ in late.events].count("step_end") == 1, package
        assert gone.events == [], package
