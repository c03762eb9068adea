"""The summary against episodes whose numbers are known."""

from dataclasses import replace

from turnwise.pipeline.summary import summarise
from turnwise.types import Failure, Reward, Sampling, StopReason, Trajectory


def episode(
    stage: str, task: int, k: int, reward: float | None, *, greedy: bool = False
) -> tuple[str, Trajectory]:
    return stage, Trajectory(
        id=f"evaluate/{stage}/game/{task}/{'greedy' if greedy else f's{k}'}",
        group_id=f"evaluate/{stage}/game/{task}",
        env="game",
        task={},
        seed=0,
        segments=(),
        rewards={"game": Reward(value=reward)} if reward is not None else {},
        stop_reason=StopReason.TERMINATED if reward is not None else StopReason.ENV_FAILED,
        error=None if reward is not None else Failure(kind="EnvLostError", message="gone", where="reset"),
        sampling=Sampling(temperature=0.0 if greedy else 1.0),
        policy="engine",
    )


def test_stages_pair_by_task_and_failures_are_no_zeros():
    episodes = [
        episode("sft", 0, 0, 0.0), episode("sft", 0, 1, 1.0),
        episode("sft", 1, 0, 0.0), episode("sft", 1, 1, 0.0),
        episode("rl", 0, 0, 1.0), episode("rl", 0, 1, 1.0),
        episode("rl", 1, 0, 1.0), episode("rl", 1, 1, None),
        episode("rl", 0, 0, 1.0, greedy=True), episode("rl", 1, 0, 0.0, greedy=True),
    ]  # fmt: skip
    summary = summarise(episodes, resamples=200, seed=0)["game"]
    assert list(summary) == ["sft", "rl"]
    assert summary["sft"]["mean"] == 0.25 and summary["sft"]["n"] == 4
    assert summary["sft"]["pass_at"] == {"1": 0.25, "2": 0.5}
    assert summary["sft"]["greedy"] is None and "gain" not in summary["sft"]
    assert summary["rl"]["mean"] == 1.0 and summary["rl"]["n"] == 3 and summary["rl"]["failed"] == 1
    assert summary["rl"]["greedy"] == 0.5
    assert summary["rl"]["gain"]["over"] == "sft" and summary["rl"]["gain"]["mean"] == 0.75


def test_a_stage_without_a_scored_episode_has_no_mean():
    summary = summarise([episode("rl", 0, 0, None)], resamples=100, seed=0)["game"]["rl"]
    assert summary["mean"] is None and summary["n"] == 0 and summary["failed"] == 1


def test_the_order_in_which_episodes_ended_says_nothing():
    episodes = [episode("rl", task, k, (task * 7 + k * 3) % 10 / 10) for task in range(12) for k in range(3)]
    wanted = summarise(episodes, resamples=100, seed=0)
    assert wanted["game"]["rl"]["low"] < wanted["game"]["rl"]["high"]
    for other in (episodes[::-1], episodes[17:] + episodes[:17]):
        assert summarise(other, resamples=100, seed=0) == wanted


def test_of_several_attempts_the_last_counts():
    stage, first = episode("rl", 0, 0, 1.0)
    again = replace(first, id=f"{first.id}~1", rewards={"game": Reward(value=0.25)})
    summary = summarise([(stage, first), (stage, again)], resamples=100, seed=0)["game"]["rl"]
    assert (summary["mean"], summary["n"]) == (0.25, 1)
