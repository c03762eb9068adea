"""What environments import beside models and bases: it does as openenv-core's does, by the same names."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openenv.core.env_server.base_transforms as their_transforms
import openenv.core.env_server.serialization as their_serialization
import openenv.core.env_server.types as their_types
import openenv.core.env_server.web_interface as their_web
import openenv.core.rubrics as their_rubrics
import pytest

from turnwise import openenv as ours
from turnwise.openenv.models import Observation

THEIRS = {
    "Rubric": their_rubrics,
    "TrajectoryRubric": their_rubrics,
    "ExponentialDiscountingTrajectoryRubric": their_rubrics,
    "CodeExecResult": their_types,
    "Observation": their_types,
    "EnvironmentMetadata": their_types,
    "CompositeTransform": their_transforms,
    "NullTransform": their_transforms,
    "Transform": their_transforms,
    "serialize_observation": their_serialization,
    "load_environment_metadata": their_web,
}


def same(scenario: Any) -> Any:
    """What a scenario comes to with their classes, which is what it comes to with ours."""
    theirs = scenario(lambda name: getattr(THEIRS[name], name))
    assert scenario(lambda name: getattr(ours, name)) == theirs
    return theirs


def test_rubrics_within_rubrics() -> None:
    def scenario(get: Any) -> Any:
        class Leaf(get("Rubric")):  # type: ignore[misc]
            def __init__(self, worth: float) -> None:
                super().__init__()
                self.worth = worth

            def forward(self, action: Any, observation: Any) -> float:
                return self.worth * float(action)

        class Tree(get("Rubric")):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.style, self.won = Leaf(0.25), Leaf(0.5)
                self.won.by_mate = Leaf(1.0)

            def forward(self, action: Any, observation: Any) -> float:
                return self.style(action, observation) + self.won(action, observation)

        tree, seen = Tree(), []
        tree.register_forward_pre_hook(lambda rubric, action, observation: seen.append((action, observation)))
        tree.register_forward_hook(lambda rubric, action, observation, score: seen.append(score))
        before = tree.last_score
        with pytest.raises(KeyError):
            tree.get_rubric("won.nowhere")
        return (
            (before, tree(2, "o"), tree.last_score, tree.style.last_score, seen),
            [name for name, _ in tree.named_rubrics()],
            [name for name, _ in tree.named_children()],
            [one.worth for one in tree.rubrics()],
            [one.worth for one in tree.children()],
            tree.get_rubric("won.by_mate").worth,
            (tree.reset(), tree.state_dict(), tree.load_state_dict({})),
        )

    assert same(scenario)[0] == (None, 1.5, 1.5, 0.5, [(2, "o"), 1.5])


def test_a_rubric_may_be_a_coroutine() -> None:
    def scenario(get: Any) -> Any:
        class Slow(get("Rubric")):  # type: ignore[misc]
            async def forward(self, action: Any, observation: Any) -> float:
                return 0.5

        rubric, seen = Slow(), []

        async def hook(*given: Any) -> None:
            seen.append(given[1:])

        rubric.register_forward_pre_hook(hook)
        rubric.register_forward_hook(hook)
        return asyncio.run(rubric("a", "o")), rubric.last_score, seen

    assert same(scenario) == (0.5, 0.5, [("a", "o"), ("a", "o", 0.5)])


def test_a_trajectory_is_scored_at_its_end() -> None:
    def scenario(get: Any) -> Any:
        class Last(get("ExponentialDiscountingTrajectoryRubric")):  # type: ignore[misc]
            def score_trajectory(self, trajectory: Any) -> float:
                return float(trajectory[-1][0])

        observation = get("Observation")
        rubric = Last(gamma=0.5, intermediate_reward=0.1)
        none = rubric.compute_step_rewards()
        paid = [rubric(n, observation(done=n == 4)) for n in (2, 3, 4)]
        shared, length = rubric.compute_step_rewards(), len(rubric.trajectory)
        kept = rubric.state_dict()
        rubric.reset()
        other = Last()
        other.load_state_dict(kept)
        with pytest.raises(ValueError, match="gamma"):
            Last(gamma=1.5)
        return none, paid, shared, length, kept, rubric.trajectory, (other.gamma, other.intermediate_reward)

    assert same(scenario)[1:3] == ([0.1, 0.1, 4.0], [1.0, 2.0, 4.0])


def test_transforms_follow_one_another() -> None:
    def scenario(get: Any) -> Any:
        class Twice(get("Transform")):  # type: ignore[misc]
            def __call__(self, observation: Any) -> Any:
                return observation.model_copy(update={"reward": observation.reward * 2})

        both = get("CompositeTransform")([Twice(), get("NullTransform")(), Twice()])
        return get("serialize_observation")(both(get("Observation")(reward=3, metadata={"m": 1})))

    assert same(scenario) == {"observation": {}, "reward": 12, "done": False}


def test_what_an_environment_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Garden:
        pass

    def plant() -> Garden:
        return Garden()

    def scenario(get: Any) -> Any:
        class Says(Garden):
            def get_metadata(self) -> Any:
                return get("EnvironmentMetadata")(name="says", description="itself")

        load = get("load_environment_metadata")
        asked = [(env, name) for env in (Garden, plant, Garden(), Says()) for name in (None, "garden")]
        return [load(env, name).model_dump() for env, name in asked]

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENV_README_PATH", raising=False)
    assert {one["readme_content"] for one in same(scenario)} == {None}
    folder = tmp_path / "src" / "envs" / "garden"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("Grün")
    assert [one["readme_content"] for one in same(scenario)][:2] == [None, "Grün"]
    (tmp_path / "other.md").write_text("Other")
    monkeypatch.setenv("ENV_README_PATH", "other.md")
    assert [one["readme_content"] for one in same(scenario)][:2] == ["Other", "Other"]


def test_what_a_program_left() -> None:
    same(lambda get: get("CodeExecResult")(stdout="1", stderr="", exit_code=0).model_dump())


def test_an_environment_may_be_paid_by_one() -> None:
    class Right(ours.Rubric):
        def forward(self, action: Any, observation: Any) -> float:
            return 1.0

    class Env(ours.Environment[Any, Any, Any]):
        def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Observation:
            self._reset_rubric()
            return Observation()

        def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Observation:
            return Observation(reward=self._apply_rubric(action, Observation()))

        @property
        def state(self) -> Any:
            return ours.State()

    env = Env(rubric=Right())
    env.reset()
    assert env.step(None).reward == 1.0
    assert isinstance(ours.LocalDockerProvider(), ours.ContainerProvider)
