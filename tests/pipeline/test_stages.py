"""Stages alone, skipped, changed and resumed, and RL in each of its modes, on a model that SFT has made."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.tiny import play, recipe
from tests.pipeline.envs import Flaky

from turnwise.errors import LearnError, NonFiniteError, RecipeError, StoreError
from turnwise.learn.learner import Learner
from turnwise.store import RunDir
from turnwise.types import Trajectory
from turnwise.view.events import StageStarted

SMALL: dict[str, Any] = {
    "rl.steps": 2,
    "rl.minibatches": 1,
    "evaluate.tasks": {"catch": 4, "chain_sum": 4},
    "evaluate.stages": ["sft", "rl"],
    "evaluate.seeds": 1,
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to and with SFT."""
    path = tmp_path_factory.mktemp("taught") / "tiny"
    for stage in ("init", "collect", "sft"):
        play(recipe(SMALL), path, stage=stage)
    return path


@pytest.fixture
def copy(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "tiny"))


def started(told: list[Any]) -> list[str]:
    return [event.stage for event in told if isinstance(event, StageStarted)]


def train(path: Path, changes: Mapping[str, Any], *, steps: int = 2) -> list[dict[str, Any]]:
    """RL alone under a changed recipe: its metrics."""
    play(recipe({**SMALL, "rl.steps": steps, **changes}), path, stage="rl", changed=True)
    metrics = RunDir(path).read_metrics("rl")
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    assert RunDir(path).latest("rl-model").step == steps
    return metrics


# -- which stages run -------------------------------------------------------------------------------------


def test_stages_that_are_done_are_skipped(copy: Path) -> None:
    _, told = play(recipe(SMALL), copy)
    assert started(told) == [
        "evaluate-sft", "rl", "evaluate-rl", "evaluate-random", "evaluate-constant"
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in (copy / "trajectories").iterdir()}
    summary, told = play(recipe(SMALL), copy)
    assert started(told) == []
    assert {path: path.read_bytes() for path in (copy / "trajectories").iterdir()} == before
    assert summary == RunDir(copy).summary() and set(summary) == {"catch", "chain_sum"}
    assert list(summary["catch"]) == ["sft", "rl", "random", "constant"]


def test_one_stage_alone(taught: Path, tmp_path: Path) -> None:
    assert sorted(RunDir(taught).finished()) == ["collect", "init", "sft"]
    with pytest.raises(RecipeError, match=r"stage 'init' .* is not finished.*--stage init"):
        play(recipe(SMALL), tmp_path / "tiny", stage="sft")
    with pytest.raises(RecipeError, match=r"no stage 'train'; it has: init, collect, sft, evaluate, rl"):
        play(recipe(SMALL), tmp_path / "tiny", stage="train")


def test_a_changed_recipe_is_refused_by_the_names_of_its_keys(copy: Path) -> None:
    changed = recipe({**SMALL, "rl.steps": 3, "sft.optimizer.lr": 0.5})
    with pytest.raises(RecipeError) as refused:
        play(changed, copy)
    assert "rl.steps: 2 before, 3 now" in str(refused.value)
    assert "sft.optimizer.lr: 0.006 before, 0.5 now" in str(refused.value)
    assert "--changed" in str(refused.value)
    play(recipe({**SMALL, "threads": 2}), copy, stage="sft")  # Changes no result.
    with pytest.raises(RecipeError, match="stage 'sft' is finished, so this change would do nothing") as idle:
        play(changed, copy, stage="sft", changed=True)
    assert "sft.optimizer.lr" in str(idle.value) and "rl.steps" not in str(idle.value)
    assert "done/sft.json" in str(idle.value)
    play(recipe({**SMALL, "rl.steps": 3}), copy, stage="sft", changed=True)


def test_an_update_that_is_refused_is_left_out_and_a_step_of_nothing_else_stops_the_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim_step, calls = Learner.optim_step, itertools.count()

    def broken(at: Callable[[int], bool]) -> Callable[..., dict[str, float]]:
        def step(self: Learner, *given: Any) -> dict[str, float]:
            if at(next(calls)):
                self._forget()
                raise NonFiniteError("a gradient is not finite")
            return optim_step(self, *given)

        return step

    monkeypatch.setattr(Learner, "optim_step", broken(lambda n: n == 0))
    two = {"rl.minibatches": 2, "rl.epochs": 2}
    metrics = train(copy, two)
    assert [one["refused_updates"] for one in metrics] == [1.0, 0.0]
    assert RunDir(copy).done("rl") is not None

    (copy / "done" / "rl.json").unlink()
    monkeypatch.setattr(Learner, "optim_step", broken(lambda n: True))
    with pytest.raises(LearnError, match="every update of rl step 1 was refused"):
        train(copy, two, steps=3)


def test_environments_without_baselines_are_not_asked_again(tmp_path: Path) -> None:
    changes = {
        "environments": {"plain": {"env": "tests.pipeline.envs:Plain"}},
        "collect.episodes": {"plain": 4}, "sft.batch": {"plain": 2}, "sft.weighting": "token",
        "rl": None, "evaluate.tasks": {"plain": 1}, "evaluate.stages": ["sft"],
    }  # fmt: skip
    play(recipe({**SMALL, **changes}), tmp_path / "tiny")
    assert RunDir(tmp_path / "tiny").done("evaluate-constant") == {"episodes": 0}


# -- what is learned from ---------------------------------------------------------------------------------


def test_what_is_kept_is_decided_when_it_is_read(copy: Path) -> None:
    count = len(RunDir(copy).ids("collect"))
    right = sum(one.reward == 1 for one in RunDir(copy).read("collect") if one.env == "catch")
    assert 0 < right < 40
    (copy / "done" / "sft.json").unlink()
    (copy / "done" / "collect.json").unlink()
    made = recipe({**SMALL, "collect.keep": {"catch": 1.0}})
    play(made, copy, stage="collect", changed=True)
    assert RunDir(copy).done("collect")["kept"] == {"catch": right, "chain_sum": 60}
    play(made, copy, stage="sft", changed=True)
    assert RunDir(copy).done("sft")["trajectories"] == {"catch": right, "chain_sum": 60}
    assert len(RunDir(copy).ids("collect")) == count, "nothing is played again"
    (copy / "done" / "collect.json").unlink()
    with pytest.raises(RecipeError, match="leaves none of the 40 episodes of 'catch'"):
        play(recipe({**SMALL, "collect.keep": 7.0}), copy, stage="collect", changed=True)


def test_another_run_as_a_source_gives_all_but_its_held_out_episodes(taught: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(taught, tmp_path / "other"))
    play(recipe({**SMALL, "rl": None, "evaluate.stages": ["sft"]}), other, changed=True)
    assert len(RunDir(other).ids("evaluate-sft")) == 16
    made = recipe({**SMALL, "collect": None, "sft.sources": [str(other)], "sft.steps": 8})
    play(made, tmp_path / "tiny", stage="init")
    play(made, tmp_path / "tiny", stage="sft")
    assert RunDir(tmp_path / "tiny").done("sft")["trajectories"] == {"catch": 40, "chain_sum": 60}

    file = str(other / "trajectories" / "collect.jsonl")
    play(
        recipe({**SMALL, "collect": None, "sft.sources": [file], "sft.steps": 8}),
        tmp_path / "one",
        stage="init",
    )
    play(
        recipe({**SMALL, "collect": None, "sft.sources": [file], "sft.steps": 8}),
        tmp_path / "one",
        stage="sft",
    )
    assert RunDir(tmp_path / "one").done("sft")["trajectories"] == {"catch": 40, "chain_sum": 60}
    nowhere = recipe({**SMALL, "collect": None, "sft.sources": [str(tmp_path / "nowhere")]})
    play(nowhere, tmp_path / "two", stage="init")
    with pytest.raises(RecipeError, match=r"sft.sources names '.*nowhere'"):
        play(nowhere, tmp_path / "two", stage="sft")


def test_collecting_by_the_engine(copy: Path) -> None:
    (copy / "done" / "collect.json").unlink()
    (copy / "trajectories" / "collect.jsonl").unlink()
    changes = {"collect.policy": "engine", "collect.episodes": {"catch": 4, "chain_sum": 4}}
    made = recipe({**SMALL, **changes, "collect.sampling": {"max_tokens": 8}})
    play(made, copy, stage="collect", changed=True)
    played: list[Trajectory] = list(RunDir(copy).read("collect"))
    assert len(played) == 8 and {one.policy for one in played} == {"engine"}
    assert all(len(turn.ids) == len(turn.logprobs) > 0 for one in played for turn in one.turns)
    (copy / "done" / "sft.json").unlink()
    play(made, copy, stage="sft", changed=True)  # Recorded tokens are learned from as they are.


# -- the modes of RL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rl.advantage": "rloo"},
        {"rl.advantage": "dr_grpo", "rl.normalise": "constant"},
        {"rl.advantage": "maxrl"},
        {"rl.advantage": "reinforce_pp", "rl.credit": {"kind": "returns"}},
        {"rl.scale": "batch", "rl.credit": {"kind": "gigpo"}},
        {"rl.rewards": "separately"},
        {"rl.loss": "reinforce", "rl.normalise": "sequence"},
        {"rl.loss": "dapo", "rl.clip_high": 0.28, "rl.epochs": 2},
        {"rl.normalise_by_env": True, "rl.minibatches": 2},
        {"rl.loss": "gspo", "rl.normalise": "sequence", "rl.minibatches": 2},
        {"rl.loss": "luspo", "rl.normalise": "sum"},
        {"rl.loss": "cispo", "rl.entropy": 0.01},
        {"rl.loss": "sapo", "rl.normalise": "sequence", "rl.epochs": 2},
        {"rl.loss": "dppo", "rl.epochs": 2},
        {"rl.loss": "vespo", "rl.epochs": 2},
        {"rl.correction": {"kind": "icepop"}, "rl.minibatches": 2},
    ],
    ids=lambda changes: " ".join(f"{key[3:]}={value}" for key, value in changes.items()),
)
def test_every_mode_trains(copy: Path, changes: dict[str, Any]) -> None:
    metrics = train(copy, changes)
    updates = changes.get("rl.epochs", 1) * changes.get("rl.minibatches", 1)
    for line in metrics:
        assert line["updates"] == updates
        assert 0 < line["grad_norm"] < 100
        assert line["mismatch_max"] < 1e-3, "learner and engine agree on what was sampled"
    assert metrics[-1]["version"] == 2


@pytest.mark.parametrize(
    "model",
    [{}, {"model.lora": {"r": 4}}, {"model.lora": {"r": 4}, "model.quantization": "nf4"}],
    ids=["whole", "lora", "4 bits"],
)
def test_kl_to_where_rl_began(copy: Path, model: dict[str, Any]) -> None:
    metrics = train(copy, {"rl.kl": 0.05, **model, "rl.optimizer.lr": 5e-3}, steps=3)
    assert all(line["mismatch_max"] < 1e-3 for line in metrics), "learner and engine have the same weights"
    kl = [line["kl_reference"] for line in metrics]
    assert abs(kl[0]) < 1e-6, "at first the policy is the reference"
    assert kl[2] > 1e-6, kl
    assert metrics[0]["left_out_samples"] == 0, "a KL term has a gradient on every row"


def test_old_logprobs_are_those_before_the_steps_first_update(copy: Path) -> None:
    """With a correction the second update's ratio is to the learner before the first, not to the sampler."""
    changes = {"rl.correction": {"kind": "tis"}, "rl.epochs": 2, "rl.optimizer.lr": 5e-3}
    for line in train(copy, changes):
        assert line["updates"] == 2
        assert line["ratio_max"] > 1 + 1e-4, "the first update moved the second's ratios"
        assert line["correction"] == pytest.approx(1, abs=1e-3), "and the sampler was right all along"
        assert line["correction_max"] == pytest.approx(1, abs=1e-2)


def test_a_cut_distribution_is_learned_from_where_it_is_corrected(copy: Path) -> None:
    changes = {"rl.sampling.top_p": 0.8, "rl.correction": {"kind": "tis"}, "rl.optimizer.lr": 1e-4}
    for line in train(copy, changes):
        # A kept token was drawn more often than the policy would have: by one over the mass, at most 1.25.
        assert 0.8 - 1e-3 < line["correction"] < 1
        assert line["correction_max"] <= 1 + 1e-3
        assert line["ratio"] == 1 and line["correction_rejected"] == 0


def test_playing_ahead_stays_within_staleness(copy: Path) -> None:
    metrics = train(copy, {"rl.staleness": 1}, steps=4)
    assert max(line["staleness_max"] for line in metrics) == 1
    assert metrics[0]["staleness_max"] == 0


# -- going on ---------------------------------------------------------------------------------------------

FLAKY: dict[str, Any] = {
    "environments": {"flaky": {"env": "tests.pipeline.envs:Flaky"}},
    "collect": None, "sft": None, "evaluate": None,
    "rl": {
        "steps": 2, "groups": {"flaky": 2}, "group_size": 4, "sampling": {"max_tokens": 4},
        "optimizer": {"lr": 1e-3}, "concurrency": 1, "max_failures": 100,
    },
}  # fmt: skip


def test_retried_groups_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is played again under ids of its own; killed in the middle of that, its siblings are used."""
    made, path = recipe(FLAKY), tmp_path / "tiny"
    play(made, path, stage="init")
    # Every group fails once: each of its siblings is lost, and lost again the two times that it is replayed.
    monkeypatch.setattr(Flaky, "failures", dict.fromkeys(range(8), 4 * 3))
    monkeypatch.setattr("turnwise.rollout.group.PAUSE_SECONDS", 0.0)
    append, stored = RunDir.append, list[str]()

    def dying(self: RunDir, stage: str, one: Trajectory) -> None:
        if sum("~1/" in id for id in stored) == 3:
            raise StoreError("the disk is full")
        append(self, stage, one)
        stored.append(one.id)

    monkeypatch.setattr(RunDir, "append", dying)
    with pytest.raises(StoreError, match="the disk is full"):
        play(made, path, stage="rl")
    monkeypatch.setattr(RunDir, "append", append)
    begun = {id for id in stored if "~1/" in id}
    assert len(begun) == 3 and RunDir(path).ids("rl") == set(stored)

    play(made, path)
    steps = list(RunDir(path).steps("rl"))
    used = [id for step in steps for id in step.trajectory_ids]
    assert [step.step for step in steps] == [1, 2] and len(set(used)) == len(used) == 16
    assert begun <= set(steps[0].trajectory_ids), "finished siblings were thrown away"
    ids = [one.id for one in RunDir(path).read("rl")]
    assert len(set(ids)) == len(ids)
    assert all("~1/" in id for id in used)


def test_a_step_that_was_recorded_and_not_learned_tells_its_metrics(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import turnwise.pipeline.rl as rl

    with monkeypatch.context() as broken:
        broken.setattr(rl, "_learn", lambda *_: (_ for _ in ()).throw(StoreError("killed")))
        with pytest.raises(StoreError, match="killed"):
            play(recipe(SMALL), copy, stage="rl")
    assert len(list(RunDir(copy).steps("rl"))) == 1 and RunDir(copy).read_metrics("rl") == []
    play(recipe(SMALL), copy, stage="rl")
    first, second = RunDir(copy).read_metrics("rl")
    assert first["updates"] == second["updates"] == 1
    assert first["reward/catch"] == pytest.approx(
        sum(
            one.reward for one in RunDir(copy).read("rl") if one.id.startswith(("rl/catch/0/", "rl/catch/1/"))
        )
        / 8
    )
    assert (first["version"], second["version"]) == (1, 2)
