"""What tools, rows, templates, recipes and disks do wrong: a clear message, and nothing finished is lost."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.tiny import Child, play, recipe
from tests.support.tokenizers import tiny_tokenizer

from turnwise.chat.renderer import builtin_template
from turnwise.errors import RecipeError, TaskError, TemplateError, TooManyFailuresError
from turnwise.recipe import load_recipe
from turnwise.store import RunDir
from turnwise.types import StopReason

WRONG = str(Path(__file__).with_name("envs.py"))


def collecting(do: list[str], **changes: Any) -> Any:
    """A recipe that only collects, from `Wrong`'s teacher."""
    return recipe(
        {
            "environments": {"wrong": {"env": f"{WRONG}:Wrong", "args": {"do": do, "size": 40}}},
            "collect": {"episodes": {"wrong": 40}},
            "sft": {"steps": 2, "batch": {"wrong": 2}},
            "rl": None,
            "evaluate": None,
            **changes,
        }
    )


# -- tools ------------------------------------------------------------------------------------------------


def test_tools_that_raise_hang_return_objects_or_ten_megabytes(tmp_path: Path) -> None:
    limits = {"environments.wrong.limits": {"call_seconds": 2.0, "max_observation": 1000}}
    wanted = ["raise", "object", "huge", "hang"]
    made = collecting(wanted, **limits, **{"engine.max_context": 1024})
    began = time.monotonic()
    play(made, tmp_path / "tiny", stage="init")
    play(made, tmp_path / "tiny", stage="collect")
    assert time.monotonic() - began < 30, "hanging tools must not be waited for one after another"

    by_fault: dict[str, list[Any]] = {name: [] for name in wanted}
    for one in RunDir(tmp_path / "tiny").read("collect"):
        by_fault[one.task["do"]].append(one)
    assert {name: len(found) for name, found in by_fault.items()} == dict.fromkeys(wanted, 10)
    for name in ("raise", "object", "huge"):
        for one in by_fault[name]:
            assert one.stop_reason is StopReason.TERMINATED and one.reward == 1.0
            assert one.metrics["tool_errors"] == (name != "huge")
    said = {name: found[0].turns[0].feedback[0].text for name, found in by_fault.items() if name != "hang"}
    assert "not like this" in said["raise"]
    assert "object" in said["object"] and "JSON" in said["object"]
    assert len(said["huge"]) < 1100 and "9999000 more characters" in said["huge"]
    for one in by_fault["hang"]:
        # The policy called what hangs: scored and kept, 0 as nothing was paid.
        assert one.stop_reason is StopReason.TIME_LIMIT and one.reward == 0.0
        assert one.metrics["tool_timeouts"] == 1

    play(made, tmp_path / "tiny")  # SFT learns from all of it.
    assert RunDir(tmp_path / "tiny").done("sft")["trajectories"] == {"wrong": 40}


def test_faulty_tools_in_rl(tmp_path: Path) -> None:
    made = collecting(
        ["raise", "huge", "win"],
        **{
            "sft": {
                "steps": 60, "batch": {"wrong": 8},
                "optimizer": {"kind": "muon", "lr": 6e-3, "muon_lr": 0.05},
            },
            "rl": {"steps": 2, "groups": {"wrong": 3}, "group_size": 4, "sampling": {"max_tokens": 24}},
            "engine.max_context": 256,
            "environments.wrong.limits": {"max_observation": 300},
        },
    )  # fmt: skip
    play(made, tmp_path / "tiny")
    metrics = RunDir(tmp_path / "tiny").read_metrics("rl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert sum(line["tool_errors/wrong"] for line in metrics) > 0
    assert all(line["failed/wrong"] == 0 for line in metrics)


# -- rewards ----------------------------------------------------------------------------------------------


def test_a_nan_reward_is_excluded_and_counted(tmp_path: Path) -> None:
    play(collecting(["nan", "win", "win", "win"]), tmp_path / "tiny", stage="collect")
    reasons = Counter(one.stop_reason for one in RunDir(tmp_path / "tiny").read("collect"))
    assert reasons == {StopReason.SCORING_FAILED: 10, StopReason.TERMINATED: 30}
    assert RunDir(tmp_path / "tiny").done("collect")["kept"] == {"wrong": 30}


def test_nan_as_the_rule_stops_the_run(tmp_path: Path) -> None:
    made = collecting(["nan", "nan", "nan", "win"], **{"collect.concurrency": 1})
    with pytest.raises(
        TooManyFailuresError, match=r"'wrong': \d+% of its last 32 .* max_excluded is 50%.*nan"
    ):
        play(made, tmp_path / "tiny", stage="collect")
    assert RunDir(tmp_path / "tiny").done("collect") is None
    assert len(RunDir(tmp_path / "tiny").ids("collect")) == 32, "what was played is kept"


def test_nothing_succeeds(tmp_path: Path) -> None:
    made = collecting(["no_reset"], **{"environments.wrong.max_excluded": 1.0, "collect.episodes.wrong": 80})
    with pytest.raises(TooManyFailuresError, match=r"64 episodes failed in a row.*the world is not ready"):
        play(made, tmp_path / "tiny", stage="collect")


# -- rows -------------------------------------------------------------------------------------------------


def test_a_task_that_is_not_json(tmp_path: Path) -> None:
    made = collecting(["win"], environments={"wrong": {"env": f"{WRONG}:NotJson"}})
    with pytest.raises(TaskError, match=r"wrong: tasks\('train'\): row 1.*set"):
        play(made, tmp_path / "tiny")
    assert RunDir(tmp_path / "tiny").stages() == []


def test_a_row_that_names_no_known_environment(tmp_path: Path) -> None:
    made = collecting(["win"], **{"environments.wrong.args.environment": "wrogn"})
    with pytest.raises(TaskError, match=r"row 3: .*'wrogn'.*did you mean 'wrong'\? known: wrong"):
        play(made, tmp_path / "tiny")
    assert RunDir(tmp_path / "tiny").stages() == []


def test_a_row_is_played_by_the_environment_that_it_names(tmp_path: Path) -> None:
    made = collecting(
        ["win"],
        **{
            "environments.plain": {"env": f"{WRONG}:Plain"},
            "environments.wrong.args.environment": "plain",
            "collect.episodes.plain": 8,
        },
    )
    play(made, tmp_path / "tiny", stage="collect")
    played = list(RunDir(tmp_path / "tiny").read("collect"))
    rows = {env: {one.task.get("n") for one in played if one.env == env} for env in ("wrong", "plain")}
    assert rows["plain"] == {n for n in range(40) if n % 5 == 3}
    assert rows["wrong"] == {n for n in range(40) if n % 5 != 3}
    assert {one.env: bool(one.tools) for one in played} == {"wrong": True, "plain": False}


# -- prompts and templates --------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_budget(tmp_path: Path) -> None:
    engine = {"collect.policy": "engine", "collect.sampling": {"max_tokens": 8}, "engine.max_context": 120}
    made = collecting(["win", "win", "long", "win"], **engine)
    play(made, tmp_path / "tiny", stage="init")
    play(made, tmp_path / "tiny", stage="collect")
    played = list(RunDir(tmp_path / "tiny").read("collect"))
    long = [one for one in played if one.task["do"] == "long"]
    assert {one.stop_reason for one in long} == {StopReason.PROMPT_TOO_LONG}
    assert "raise max_context" in long[0].error.message and "leave this task out" in long[0].error.message
    assert not any(one.stop_reason.failed for one in played if one.task["do"] == "win")


@pytest.fixture
def plain_model(tmp_path: Path) -> Path:
    """A model directory whose template writes no tools."""
    from tests.support.models import tiny_qwen3

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    tiny_qwen3(hidden=32, layers=1, vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_template_without_tools_is_refused_before_anything_is_played(
    tmp_path: Path, plain_model: Path
) -> None:
    named = {"model": {"name": str(plain_model)}}
    with pytest.raises(TemplateError, match=r"environment 'wrong' has tools: .*set model.chat_template"):
        play(collecting(["win"], **named), tmp_path / "tiny")
    assert RunDir(tmp_path / "tiny").stages() == []

    # As the message says: an environment without tools, or a template with them.
    plain = {"environments": {"wrong": {"env": f"{WRONG}:Plain"}}}
    play(collecting(["win"], **named, **plain), tmp_path / "plain", stage="collect")
    template = tmp_path / "tools.jinja"
    template.write_text(builtin_template("tiny"), encoding="utf-8")
    named["model"]["chat_template"] = str(template)
    play(collecting(["win"], **named), tmp_path / "with", stage="collect")
    assert len(RunDir(tmp_path / "with").ids("collect")) == 40


# -- recipes ----------------------------------------------------------------------------------------------


def test_a_recipe_typo(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(
        "name: x\nmodel: {name: m}\nenvironments: {catch: {}}\nrl: {stepz: 3, groups: {catch: 1}}\n"
    )
    with pytest.raises(RecipeError, match=r"rl\.stepz.*did you mean 'steps'"):
        load_recipe(file)


# -- disks ------------------------------------------------------------------------------------------------


NO_STATES = {"sft.checkpoint_every": 100, "rl.checkpoint_every": 100}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "limit", "changes"),
    [
        ("checkpoints/init-model-0", 10_000, {}),
        ("trajectories/collect.jsonl", 250_000, {}),
        ("checkpoints/sft-10", 290_000, {}),
        ("trajectories/rl.jsonl", 270_000, NO_STATES),
        ("checkpoints/rl-2", 400_000, {"sft.checkpoint_every": 100}),
    ],
)
def test_a_full_disk(tmp_path: Path, where: str, limit: int, changes: dict[str, Any]) -> None:
    """No file may grow beyond a limit: one clear message; with room again, nothing is missing or double."""
    made, path = recipe(changes), tmp_path / "tiny"
    child = Child(made, path, file_limit=limit)
    assert child.wait() == 1, child.said()
    said = child.said()
    assert "error: cannot write" in said and where in said.replace("\n", "") and "intact" in said, said
    assert "Traceback" not in said, said
    before = {stage: RunDir(path).ids(stage) for stage in RunDir(path).stages()}
    child = Child(made, path)
    assert child.wait() == 0, child.said()
    directory = RunDir(path)
    for stage, ids in before.items():
        assert ids <= directory.ids(stage)
    for stage in directory.stages():
        ids = [one.id for one in directory.read(stage)]
        assert len(set(ids)) == len(ids)
    assert len(directory.ids("collect")) == sum(made.collect.episodes.values())
    assert [one.step for one in directory.steps("rl")] == list(range(1, made.rl.steps + 1))
