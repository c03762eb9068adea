"""What failed through no fault of the policy's is played again when its stage is taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.tiny import play, recipe
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer

from turnwise.envs.base import Env
from turnwise.errors import TooManyFailuresError
from turnwise.pipeline.summary import is_greedy, summarise
from turnwise.rollout.record import episode_of
from turnwise.store import RunDir
from turnwise.types import Reward, Sampling, Step, StopReason, Task, Trajectory


class Outage(Env):
    """Cannot be reset while the file ``down`` is there."""

    max_turns = 1

    def __init__(self, down: str) -> None:
        self.down = down

    def tasks(self, split: str) -> Iterator[Task]:
        yield from ({"n": n} for n in range(80))

    def reset(self, task: Task) -> str:
        if Path(self.down).exists():
            raise RuntimeError("the server is down")
        return "go"

    def step(self, reply: str) -> Step:
        return Step(reward=1.0, terminated=True)

    def teacher(self, messages: Any) -> str:
        return "ok"


def made(tmp_path: Path, **stages: Any) -> Any:
    model = tmp_path / "model"
    if not model.exists():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(model)
        tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(model)
    environment = {"env": f"{__file__}:Outage", "args": {"down": str(tmp_path / "down")}}
    return recipe(
        {
            "model": {"name": str(model)},
            "environments": {"outage": environment},
            **{name: stages.get(name) for name in ("collect", "sft", "rl", "evaluate")},
        }
    )


def test_an_outage_does_not_stay_in_an_evaluation(tmp_path: Path) -> None:
    evaluate = {"tasks": {"outage": 80}, "seeds": 1, "sampling": {"max_tokens": 8}, "baselines": False}
    run, path = made(tmp_path, evaluate=evaluate), tmp_path / "tiny"
    (tmp_path / "down").touch()
    with pytest.raises(TooManyFailuresError, match="the server is down"):
        play(run, path)
    before = RunDir(path).ids("evaluate-untrained")
    assert before, "what failed is on disk"

    (tmp_path / "down").unlink()
    summary, _ = play(run, path)
    assert summary is not None
    found = summary["outage"]["untrained"]
    assert (found["n"], found["failed"]) == (80, 0)
    assert found["greedy"] is not None
    played = list(RunDir(path).read("evaluate-untrained"))
    assert len({one.id for one in played}) == len(played) == 160 + len(before)
    assert {episode_of(one.id) for one in played if one.reward is None} == before
    drawn_at = {(is_greedy(one.id), one.sampling.temperature) for one in played if one.sampling is not None}
    assert drawn_at == {(False, 1.0), (True, 0.0)}

    again, _ = play(run, path)
    assert again == summary and len(RunDir(path).ids("evaluate-untrained")) == len(played)


def test_an_outage_costs_no_lessons(tmp_path: Path) -> None:
    run, path = made(tmp_path, collect={"episodes": {"outage": 80}}), tmp_path / "tiny"
    (tmp_path / "down").touch()
    with pytest.raises(TooManyFailuresError):
        play(run, path)
    (tmp_path / "down").unlink()
    play(run, path)
    done = RunDir(path).done("collect")
    assert done is not None and done["kept"] == {"outage": 80}


def test_greedy_play_is_told_by_its_id_and_not_by_its_temperature() -> None:
    def episode(name: str, reward: float) -> tuple[str, Trajectory]:
        return "rl", Trajectory(
            id=f"evaluate/rl/game/0/{name}",
            group_id="evaluate/rl/game/0",
            env="game",
            task={},
            seed=0,
            segments=(),
            rewards={"game": Reward(value=reward)},
            stop_reason=StopReason.TERMINATED,
            sampling=Sampling(temperature=0.0),
            policy="engine",
        )

    episodes = [episode("s0", 0.5), episode("greedy~1", 1.0)]
    found = summarise(episodes, resamples=100, seed=0)["game"]["rl"]
    assert (found["mean"], found["n"], found["greedy"]) == (0.5, 1, 1.0)
