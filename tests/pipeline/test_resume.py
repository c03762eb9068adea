"""Going on with a run: what may have changed since, what may not, and what becomes of what is on disk."""

from __future__ import annotations

import importlib
import linecache
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.end_to_end.tiny import play, recipe
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.config import Recipe
from turnwise.envs import registry
from turnwise.errors import RecipeError, StoreError
from turnwise.pipeline import rl, sft
from turnwise.pipeline.context import Run
from turnwise.pipeline.resume import check_unchanged
from turnwise.pipeline.sft import _lessons
from turnwise.pipeline.summary import summarise
from turnwise.store import RunDir, StepRecord
from turnwise.types import Trajectory

ENVIRONMENT = '''
from collections.abc import Iterator
from turnwise.envs.base import Env
from turnwise.types import Step, Task

class Copy(Env):
    """Say the number."""

    inline = True
    max_turns = 1

    def tasks(self, split: str) -> Iterator[Task]:
        yield from ({"n": n} for n in range(12))

    def reset(self, task: Task) -> str:
        self.task = task
        return f"say {task['n']}"

    def step(self, reply: str) -> Step:
        return Step(reward=self.rng.random(), terminated=True)

    def teacher(self, messages) -> str:
        return str(self.task["n"])
'''


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe over an environment, a reward function, a data set and a template that a test may edit."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "copying.py").write_text(ENVIRONMENT)
    (tmp_path / "rewards_of_mine.py").write_text("def short(trajectory):\n    return 1.0\n")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(12)))
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    monkeypatch.syspath_prepend(tmp_path)

    def make(changes: dict[str, Any] | None = None) -> Recipe:
        base: dict[str, Any] = {
            "model": {"name": str(tmp_path / "model"), "chat_template": str(tmp_path / "template.jinja")},
            "environments": {
                "copy": {"env": f"{tmp_path}/copying.py:Copy", "rewards": {"rewards_of_mine:short": 0.5}}
            },
            "tasks": {"train": str(tmp_path / "rows.jsonl")},
            "collect": {"episodes": {"copy": 4}},
            "sft": {
                "steps": 4, "batch": {"copy": 2}, "checkpoint_every": 2,
                "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            },
            "rl": {
                "steps": 3, "groups": {"copy": 1}, "group_size": 2, "sampling": {"max_tokens": 4},
                "optimizer": {"lr": 1e-3}, "checkpoint_every": 2,
            },
            "evaluate": {
                "tasks": {"copy": 2}, "sampling": {"max_tokens": 4}, "stages": ["sft"], "baselines": False,
                "bootstrap": 100,
            },
        }  # fmt: skip
        return recipe(base | (changes or {}))

    return make


def reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import again what was edited, as a new process would."""
    monkeypatch.setattr(registry, "_files", {})
    # Files of one second and one length look alike to the import system.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    linecache.clearcache()
    for name in [name for name in sys.modules if "copying" in name or "rewards_of_mine" in name]:
        monkeypatch.delitem(sys.modules, name)


def dying(monkeypatch: pytest.MonkeyPatch, stage: str, after: int) -> None:
    """Let the disk be full once a stage has stored so many episodes."""
    append, stored = RunDir.append, list[str]()

    def refusing(self: RunDir, name: str, one: Trajectory) -> None:
        if name == stage and len(stored) == after:
            raise StoreError("the disk is full")
        append(self, name, one)
        stored.extend([one.id] if name == stage else [])

    monkeypatch.setattr(RunDir, "append", refusing)


# -- a changed recipe -------------------------------------------------------------------------------------

SECTIONS: list[tuple[str, Any, str]] = [
    ("seed", 1, "seed: 0 before, 1 now"),
    ("engine.max_context", 150, "engine.max_context: 160 before, 150 now"),
    ("model.lora", {"r": 2}, "model.lora.r: not there before, 2 now"),
    ("model.chat_template_kwargs", {"a": {"b": 1}}, "model.chat_template_kwargs.a.b: not there before"),
    ("environments.catch.args.rows", 5, "environments.catch.args.rows: 4 before, 5 now"),
    ("environments.catch.limits", {"max_turns": 2}, "catch.limits.max_turns: null before, 2 now"),
    (
        "environments.catch.rewards", {"tests.end_to_end.kills:brevity": 0.5},
        "environments.catch.rewards.tests.end_to_end.kills:brevity: not there before, 0.5 now",
    ),
    ("environments.catch.reward_weight", 2.0, "environments.catch.reward_weight: 1.0 before, 2.0 now"),
    ("collect.episodes.catch", 41, "collect.episodes.catch: 40 before, 41 now"),
    ("sft.optimizer.betas", [0.9, 0.95], "sft.optimizer.betas: [0.9, 0.999] before, [0.9, 0.95] now"),
    ("sft.optimizer.schedule", "linear", "sft.optimizer.schedule:"),
    ("rl.groups.catch", 3, "rl.groups.catch: 2 before, 3 now"),
    ("rl.sampling.temperature", 0.5, "rl.sampling.temperature: 1.0 before, 0.5 now"),
    ("rl.staleness", 1, "rl.staleness: 0 before, 1 now"),
    ("rl", None, "rl.steps: 6 before, not there now"),
    ("evaluate.tasks.catch", 13, "evaluate.tasks.catch: 12 before, 13 now"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "said"), SECTIONS, ids=[key for key, *_ in SECTIONS])
def test_every_section_is_watched(tmp_path: Path, key: str, value: Any, said: str) -> None:
    directory = RunDir(tmp_path / "tiny")
    with directory.lock():
        check_unchanged(directory, recipe(), allowed=False)
        before = directory.recipe()
        with pytest.raises(RecipeError) as refused:
            check_unchanged(directory, recipe({key: value}), allowed=False)
        assert said in str(refused.value) and "--changed" in str(refused.value)
        assert directory.recipe() == before, "what is refused is not kept"
        check_unchanged(directory, recipe({key: value}), allowed=True)
        check_unchanged(directory, recipe({key: value}), allowed=False)  # It is the run's recipe now.


def test_what_only_changes_how_a_run_goes_may_change(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "tiny")
    with directory.lock():
        check_unchanged(directory, recipe(), allowed=False)
        for key, value in {
            "threads": 2, "engine.max_sequences": 4, "engine.kv_tokens": 900, "engine.prefill_tokens": 64,
            "collect.concurrency": 1, "rl.concurrency": 2, "evaluate.concurrency": 3, "rl.max_failures": 9,
            "sft.checkpoint_every": 7, "rl.checkpoint_every": 1, "sft.rows": {"micro_tokens": 64},
            "rl.rows": {"gradient_checkpointing": True}, "environments.catch.max_excluded": 0.9,
        }.items():  # fmt: skip
            check_unchanged(directory, recipe({key: value}), allowed=False)
        with pytest.raises(RecipeError, match=r"sft\.steps"):
            check_unchanged(directory, recipe({"sft.steps": 61, "threads": 2}), allowed=False)


def test_a_change_that_nobody_would_read_is_refused(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "tiny")
    with directory.lock():
        check_unchanged(directory, recipe(), allowed=False)
        directory.mark_done("init", {})
        with pytest.raises(RecipeError, match=r"stage 'init' is finished(.|\n)*model.scratch.layers"):
            check_unchanged(directory, recipe({"model.scratch": {"layers": 1}}), allowed=True)
        directory.mark_done("evaluate-sft", {})
        with pytest.raises(RecipeError, match=r"stage 'evaluate-sft' is finished(.|\n)*evaluate.seeds"):
            check_unchanged(directory, recipe({"evaluate.seeds": 3}), allowed=True)
        check_unchanged(directory, recipe({"evaluate.bootstrap": 600}), allowed=True)


def test_fewer_steps_than_are_made_are_refused(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "tiny")
    with directory.lock():
        check_unchanged(directory, recipe(), allowed=False)
        with directory.checkpoint("sft", 20):
            pass
        for step in (1, 2, 3):
            directory.append_step(StepRecord(stage="rl", step=step, trajectory_ids=()))
        for key, steps, made in (("sft.steps", 19, 20), ("rl.steps", 2, 3)):
            with pytest.raises(RecipeError, match=f"{key}: {steps} is less than the {made} that are made"):
                check_unchanged(directory, recipe({key: steps}), allowed=True)
            check_unchanged(directory, recipe({key: made}), allowed=True)


def test_updates_that_are_made_again_otherwise_tell_their_metrics_anew(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny"
    play(made(), path, stage="collect")
    with monkeypatch.context() as patch:
        patch.setattr(
            "turnwise.pipeline.sft.save_model", lambda *_: (_ for _ in ()).throw(StoreError("killed"))
        )
        with pytest.raises(StoreError, match="killed"):
            play(made(), path, stage="sft")
    before = RunDir(path).read_metrics("sft")
    assert [line["step"] for line in before] == [1, 2, 3, 4] and RunDir(path).latest("sft").step == 2

    optimizer = {"lr": 5e-4, "warmup_steps": 1}
    play(made({"sft.optimizer": optimizer}), path, stage="sft", changed=True)
    after = RunDir(path).read_metrics("sft")
    assert [line["lr"] for line in after] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert after[:2] == before[:2]
    assert len((path / "metrics.jsonl").read_bytes().splitlines()) == 4


# -- changed sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("copying.py", "self.rng.random()", "1.0", "environment 'copy'"),
        ("rewards_of_mine.py", "1.0", "0.5", "reward function 'rewards_of_mine:short' of environment 'copy'"),
        ("rows.jsonl", '{"n": 11}', '{"n": 99}', "(tasks.train)"),
        ("template.jinja", "# Tools", "# Your tools", "chat template"),
    ],
)
def test_what_the_recipe_names_is_watched_too(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    file: str, old: str, new: str, said: str,
) -> None:  # fmt: skip
    path = tmp_path / "tiny"
    play(made(), path, stage="collect")
    before = (tmp_path / file).read_text()
    assert old in before
    (tmp_path / file).write_text(before.replace(old, new))
    reload(monkeypatch)
    with pytest.raises(RecipeError, match="with the same recipe and other sources") as refused:
        play(made(), path, stage="sft")
    assert said in str(refused.value) and "--changed" in str(refused.value)
    (tmp_path / file).write_text(before)
    reload(monkeypatch)
    play(made(), path, stage="sft")  # Restored: as if nothing had been.
    (path / "done" / "sft.json").unlink()
    (tmp_path / file).write_text(before.replace(old, new))
    reload(monkeypatch)
    play(made(), path, stage="sft", changed=True)
    play(made(), path, stage="evaluate")  # These are the run's sources now.


def test_episodes_of_another_harness_are_played_again_and_no_longer_count(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny"
    with monkeypatch.context() as patch:
        dying(patch, "collect", after=3)
        with pytest.raises(StoreError):
            play(made({"collect.concurrency": 1}), path, stage="collect")
    source = tmp_path / "copying.py"
    source.write_text(source.read_text().replace("self.rng.random()", "1.0"))
    reload(monkeypatch)
    play(made(), path, stage="collect", changed=True)
    ids = [one.id for one in RunDir(path).read("collect")]
    assert sorted(ids) == [
        *(f"collect/copy/{n}/{name}" for n in range(3) for name in ("s0", "s0~1")), "collect/copy/3/s0"
    ]  # fmt: skip
    found = RunDir(path).done("collect")
    assert found is not None and found["kept"] == {"copy": 4}
    play(made(), path, stage="sft")
    assert RunDir(path).done("sft")["trajectories"] == {"copy": 4}


@pytest.mark.parametrize("change", [{"seed": 1}, {"rl.sampling": {"max_tokens": 5}}], ids=str)
def test_siblings_of_another_task_or_sampling_are_never_mixed(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    path = tmp_path / "tiny"
    before = made({"collect": None, "sft": None, "evaluate": None, "rl.concurrency": 1})
    with monkeypatch.context() as patch:
        dying(patch, "rl", after=1)
        with pytest.raises(StoreError):
            play(before, path)
    (begun,) = RunDir(path).read("rl")
    after = made({"collect": None, "sft": None, "evaluate": None, "rl.concurrency": 1} | change)
    play(after, path, changed=True)
    used = [id for step in RunDir(path).steps("rl") for id in step.trajectory_ids]
    assert begun.id not in used and len(set(used)) == len(used) == 6
    by_group: dict[str, set[str]] = {}
    for one in RunDir(path).read("rl"):
        if one.id in used:
            by_group.setdefault(one.group_id, set()).add(f"{one.task} {one.seed} {one.sampling}")
    assert all(len(found) == 1 for found in by_group.values())


# -- order ------------------------------------------------------------------------------------------------


def test_a_model_is_not_made_anew_under_what_later_stages_did_with_it(
    made: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "tiny"
    play(made(), path)
    (path / "done" / "sft.json").unlink()
    with pytest.raises(RecipeError, match="later stages have worked with a model of its") as refused:
        play(made(), path)
    for name in ("done/rl.json", "trajectories/rl.jsonl", "done/evaluate-sft.json"):
        assert str(path / name) in str(refused.value)
    for name in ("rl", "evaluate-sft"):
        (path / "done" / f"{name}.json").unlink()
        (path / "trajectories" / f"{name}.jsonl").unlink()
    (path / "steps.jsonl").unlink()
    play(made(), path)
    assert RunDir(path).done("rl") is not None


def test_the_last_state_goes_when_its_stage_is_finished(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, names = tmp_path / "tiny", lambda: sorted(one.name for one in (path / "checkpoints").iterdir())
    play(made(), path, stage="collect")
    play(made(), path, stage="sft")
    assert names() == ["sft-model-4"]
    # Killed in between: the next start clears it away, whatever it does otherwise.
    shutil.copytree(path / "checkpoints" / "sft-model-4", path / "checkpoints" / "sft-2")
    play(made(), path, stage="collect")
    assert names() == ["sft-model-4"]
    # Made again with fewer steps, the older model is not taken for the newer.
    (path / "done" / "sft.json").unlink()
    play(made({"sft.steps": 3}), path, stage="sft", changed=True)
    assert names() == ["sft-model-3"]


def test_a_killed_sft_goes_on_with_the_lessons_that_are_next(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"rl": None, "evaluate": None, "collect.episodes.copy": 7}
    play(made(changes), tmp_path / "unbroken")
    update, made_so_far = sft._update, count()
    with monkeypatch.context() as patch:
        patch.setattr(
            sft, "_update", lambda *of: update(*of) if next(made_so_far) < 3 else dying_of("a kill")
        )
        with pytest.raises(StoreError, match="a kill"):
            play(made(changes), tmp_path / "killed")
    assert RunDir(tmp_path / "killed").latest("sft").step == 2
    play(made(changes), tmp_path / "killed")
    unbroken, killed = (
        [line["nll"] for line in RunDir(tmp_path / name).read_metrics("sft")]
        for name in ("unbroken", "killed")
    )
    assert killed == pytest.approx(unbroken, rel=1e-6) and len(killed) == 4


def test_a_redone_step_writes_the_checkpoint_that_was_due(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it: else every further kill would make one more step to redo."""
    path = tmp_path / "tiny"
    changes = {"collect": None, "sft": None, "evaluate": None}

    def killed(*_: Any) -> None:
        raise StoreError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(rl, "save_state", killed)
        with pytest.raises(StoreError, match="killed"):
            play(made(changes), path)
    assert RunDir(path).latest("rl") is None and len(list(RunDir(path).steps("rl"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(rl, "_train", killed)
        with pytest.raises(StoreError, match="killed"):
            play(made(changes), path)
    assert RunDir(path).latest("rl").step == 2


def test_a_redone_step_tells_what_the_scheduler_had_counted(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny"
    changes = {"collect": None, "sft": None, "evaluate": None}
    with monkeypatch.context() as patch:
        patch.setattr(rl, "_learn", lambda *_: (_ for _ in ()).throw(StoreError("killed")))
        with pytest.raises(StoreError, match="killed"):
            play(made(changes), path)
    # As a group that was given up would have been counted.
    (line,) = (path / "steps.jsonl").read_bytes().splitlines()
    record = orjson.loads(line)
    record["info"]["counts"]["replaced_groups"] = record["info"]["metrics"]["scheduler/replaced_groups"] = 1
    (path / "steps.jsonl").write_bytes(orjson.dumps(record) + b"\n")
    play(made(changes), path)
    lines = RunDir(path).read_metrics("rl")
    assert [one["scheduler/replaced_groups"] for one in lines] == [1, 1, 1]
    times = {"rollout_seconds", "learn_seconds", "publish_seconds"}
    assert lines[0].keys() == lines[1].keys() - times


def test_what_a_step_dropped_is_used_up(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, changes = tmp_path / "tiny", {"collect": None, "sft": None, "evaluate": None}
    changes["rl.flat_groups"] = "drop"  # Siblings draw their pay from one seed: all are flat.
    learn = rl._learn
    with monkeypatch.context() as patch:
        patch.setattr(rl, "_learn", lambda *of: learn(*of) if of[4] < 2 else dying_of("a kill"))
        with pytest.raises(StoreError, match="a kill"):
            play(made(changes), path)
    assert [record.step for record in RunDir(path).steps("rl")] == [1, 2], "recorded before it is learned"
    play(made(changes), path)
    assert [line["dropped_groups"] for line in RunDir(path).read_metrics("rl")] == [1, 1, 1]
    used = [id for record in RunDir(path).steps("rl") for id in record.trajectory_ids]
    assert used == [f"rl/copy/{step}/s{k}" for step in range(3) for k in range(2)]
    assert RunDir(path).ids("rl") == set(used)


def test_a_group_that_was_given_up_is_counted_once(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its episodes are on disk and in no step: a resumed run must not find it anew."""
    lost = ENVIRONMENT.replace(
        "        self.task = task\n",
        "        if task['n'] % 2:\n            raise EnvLostError('gone')\n        self.task = task\n",
    )
    (tmp_path / "copying.py").write_text("from turnwise.errors import EnvLostError\n" + lost)
    path, changes = tmp_path / "tiny", {"collect": None, "sft": None, "evaluate": None, "rl.steps": 6}
    changes["environments.copy.max_excluded"] = 1.0
    learn = rl._learn
    with monkeypatch.context() as patch:
        patch.setattr(rl, "_learn", lambda *of: learn(*of) if of[4] < 5 else dying_of("a full disk"))
        with pytest.raises(StoreError, match="a full disk"):
            play(made(changes), path)
    before = RunDir(path).read_metrics("rl")
    counts = [dict(record.info["counts"]) for record in RunDir(path).steps("rl")]
    assert counts[-1]["replaced_groups"] > 0
    play(made(changes), path)
    records, told = list(RunDir(path).steps("rl")), RunDir(path).read_metrics("rl")
    assert told[:4] == before
    given_up = [group for record in records for group in record.info.get("given_up", ())]
    assert len(set(given_up)) == len(given_up) == told[-1]["scheduler/replaced_groups"]
    used = {id.rpartition("/")[0] for record in records for id in record.trajectory_ids}
    assert not used & set(given_up)


def dying_of(what: str) -> dict[str, float]:
    raise StoreError(what)


# -- what must not depend on the order in which episodes end ----------------------------------------------


def shuffled(path: Path, stage: str) -> None:
    file = path / "trajectories" / f"{stage}.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    file.write_bytes(b"".join([*lines[2:][::-1], *lines[:2]]))


def test_lessons_come_in_the_order_in_which_they_were_asked_for(
    made: Callable[..., Recipe], tmp_path: Path
) -> None:
    from turnwise.learn.samples import Demonstrations

    path = tmp_path / "tiny"
    play(made({"collect.episodes": {"copy": 11}}), path, stage="collect")

    def lessons() -> list[str]:
        run = Run(made({"collect.episodes": {"copy": 11}}), RunDir(path), lambda _: None)
        demonstrations = Demonstrations(run.renderer(run.model_before("sft")))
        found = _lessons(run, run.recipe.sft, demonstrations)["copy"]
        return [sample.trajectory_id for samples in found for sample in samples]

    assert lessons() == [f"collect/copy/{n}/s0" for n in range(11)]
    shuffled(path, "collect")
    assert lessons() == [f"collect/copy/{n}/s0" for n in range(11)]


def test_the_summary_and_the_report_do_not_know_who_ended_first(
    made: Callable[..., Recipe], tmp_path: Path
) -> None:
    from turnwise.view.report import page

    path = tmp_path / "tiny"
    summary, _ = play(made({"evaluate.tasks": {"copy": 7}, "evaluate.seeds": 3, "rl": None}), path)
    assert summary["copy"]["sft"]["low"] < summary["copy"]["sft"]["high"]
    before = page(RunDir(path))
    shuffled(path, "evaluate-sft")

    def episodes() -> Iterator[tuple[str, Trajectory]]:
        return (("sft", one) for one in RunDir(path).read("evaluate-sft"))

    assert summarise(episodes(), resamples=100, seed=0) == summary
    assert page(RunDir(path)) == before
