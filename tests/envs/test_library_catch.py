"""catch plays by OpenSpiel's rules; its teacher errs as often as it is told to."""

import random

import pytest

from turnwise.envs.library.catch import Catch
from turnwise.envs.library.splits import split_of
from turnwise.errors import TaskError


def start(env: Catch, column: int, seed: int = 0) -> str:
    env.rng = random.Random(seed)
    return env.reset({"column": column, "seed": seed})


def test_a_game_by_openspiels_rules():
    env = Catch(rows=4, columns=5)
    assert start(env, column=4) == "ball 4 paddle 2 rows 3"
    first = env.move("right")
    assert (first.observation, first.reward, first.terminated) == ("ball 4 paddle 3 rows 2", None, False)
    assert env.move("right").observation == "ball 4 paddle 4 rows 1"
    last = env.move("right")  # the wall holds the paddle
    assert (last.observation, last.reward, last.terminated) == ("caught", 1.0, True)


def test_the_left_wall_holds_the_paddle_and_a_miss_pays_what_it_is_set_to():
    env = Catch(rows=4, columns=3, miss_reward=-1.0)
    start(env, column=1)
    assert env.move("left").observation == "ball 1 paddle 0 rows 2"
    assert env.move("left").observation == "ball 1 paddle 0 rows 1"
    last = env.move("stay")
    assert (last.observation, last.reward, last.terminated) == ("missed", -1.0, True)


def test_the_grid_shows_ball_and_paddle():
    env = Catch(rows=3, columns=3, observation="grid")
    assert start(env, column=0) == "o . .\n. . .\n. = ."
    assert env.move("left").observation == ". . .\no . .\n= . ."


def test_openspiels_defaults_take_nine_moves():
    env = Catch()
    assert start(env, column=0) == "ball 0 paddle 2 rows 9"
    ends = [env.move("stay").terminated for _ in range(9)]
    assert ends == [False] * 8 + [True]


def caught(env: Catch, reply, games: int) -> float:
    total = 0.0
    for game in range(games):
        start(env, column=game % env.columns, seed=game)
        while True:
            step = env.move(**reply().tool_calls[0].arguments)
            if step.terminated:
                total += step.reward
                break
    return total / games


def test_teacher_without_error_catches_every_ball_also_in_the_wind():
    for env in (Catch(6, 5), Catch(), Catch(6, 5, wind=0.5)):
        assert caught(env, lambda env=env: env.teacher([]), 100) == 1.0


def test_baselines_catch_one_in_five():
    env = Catch(6, 5)
    rng = random.Random(0)
    assert caught(env, env.constant_reply, 100) == 0.2
    assert abs(caught(env, lambda: env.random_reply(rng), 2000) - 0.2) < 0.03


def decisions(env: Catch, games: int) -> list[tuple[str, str]]:
    """(what would be best, what the teacher said) for each move."""
    out = []
    for game in range(games):
        start(env, column=game % env.columns, seed=game)
        ended = False
        while not ended:
            target, paddle = env.path[-1], env.paddle
            best = "left" if target < paddle else "right" if target > paddle else "stay"
            said = env.teacher([]).tool_calls[0].arguments["direction"]
            out.append((best, said))
            ended = env.move(said).terminated
    return out


def test_random_errors_come_as_often_as_they_are_set():
    said = decisions(Catch(6, 5, error=0.3), 400)
    assert abs(sum(best != did for best, did in said) / len(said) - 0.3) < 0.03


def test_systematic_errors_are_always_to_stay():
    said = [pair for pair in decisions(Catch(6, 5, error=0.55, error_kind="stay"), 400) if pair[0] != "stay"]
    assert {did for best, did in said if did != best} == {"stay"}
    assert abs(sum(did == "stay" for _, did in said) / len(said) - 0.55) < 0.04


def test_asking_the_teacher_changes_nothing_about_the_game():
    env = Catch(6, 5, wind=0.5, error=0.5)
    start(env, column=1, seed=3)
    asked = [(env.teacher([]), env.move("stay").observation)[1] for _ in range(5)]
    start(env, column=1, seed=3)
    assert [env.move("stay").observation for _ in range(5)] == asked


def test_rows_without_wind_spread_over_the_columns_and_differ_between_splits():
    env = Catch(6, 5, size=10)
    train, test = list(env.tasks("train")), list(env.tasks("test"))
    assert train[:2] == [{"column": 0, "seed": 0}, {"column": 1, "seed": 1}]
    assert [row["column"] for row in train] == [row["column"] for row in test] == [0, 1, 2, 3, 4] * 2
    assert not {row["seed"] for row in train} & {row["seed"] for row in test}


def test_in_the_wind_no_held_out_path_is_trained_on():
    env = Catch(6, 5, wind=0.4, size=300)
    paths = {
        split: {str(env._path(row["column"], row["seed"])) for row in env.tasks(split)}
        for split in ("train", "test")
    }
    assert len(paths["train"]) > 50 and len(paths["test"]) > 20
    assert not paths["train"] & paths["test"]
    assert {split_of(path, 0.2) for path in paths["test"]} == {"test"}


def test_equal_states_have_equal_keys():
    env = Catch(6, 5)
    start(env, column=4)
    env.move("left")
    env.move("right")
    there_and_back = env.state_key()
    start(env, column=4)
    env.move("stay")
    env.move("stay")
    assert env.state_key() == there_and_back == "4 2 2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rows": 2, "columns": 5}, "at least 3 rows"),
        ({"wind": 1.5}, "wind=1.5"),
        ({"error": -0.1}, "error=-0.1"),
        ({"observation": "pixels"}, "'text' and 'grid'"),
        ({"error_kind": "left"}, "'random' and 'stay'"),
    ],
)
def test_arguments_that_cannot_be_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        Catch(**args)


def test_an_unknown_split_is_named():
    with pytest.raises(TaskError, match="no split 'dev'; it has 'train' and 'test'"):
        list(Catch().tasks("dev"))
