"""guess_number and echo."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.library.echo import WORDS, Echo
from turnwise.envs.library.guess_number import GuessNumber


def start(env, task, seed=0):
    env.rng = random.Random(seed)
    return env.reset(task)


def test_guesses_are_answered_and_the_right_one_pays():
    env = GuessNumber(1, 16, discount=0.5)
    assert start(env, {"secret": 11}) == "Guess a number from 1 to 16."
    assert (env.guess(8).observation, env.guess(12).observation) == ("higher", "lower")
    last = env.guess(11)
    assert (last.observation, last.reward, last.terminated, last.truncated) == ("correct", 0.25, True, False)


def test_the_last_wrong_guess_truncates():
    env = GuessNumber(1, 16, guesses=2)
    start(env, {"secret": 11})
    assert env.guess(99).observation == "lower"
    last = env.guess(-5)
    assert (last.observation, last.reward) == ("higher; that was the last guess", 0.0)
    assert (last.terminated, last.truncated) == (False, True)


@settings(max_examples=50, deadline=None)
@given(low=st.integers(-50, 50), span=st.integers(1, 200), data=st.data())
def test_the_teacher_bisects(low, span, data):
    env = GuessNumber(low, low + span)
    secret = data.draw(st.integers(low, low + span))
    start(env, {"secret": secret})
    step = env.guess(**env.teacher([]).tool_calls[0].arguments)
    while not step.terminated:
        step = env.guess(**env.teacher([]).tool_calls[0].arguments)
    assert step.reward == 1.0
    assert env.tries <= (span + 1).bit_length()


def test_an_erring_teacher_errs_as_often_as_it_is_set():
    env = GuessNumber(1, 100, error=0.4)
    wrong = 0
    for seed in range(1000):
        start(env, {"secret": 1}, seed)
        wrong += env.teacher([]).tool_calls[0].arguments["number"] != 50
    assert abs(wrong / 1000 - 0.4) < 0.05


@pytest.mark.parametrize(("low", "high", "test"), [(1, 2, 1), (1, 100, 20), (1, 4, 1)])
def test_held_out_numbers_are_never_a_training_secret(low, high, test):
    env = GuessNumber(low, high)
    rows = {split: [row["secret"] for row in env.tasks(split)] for split in ("train", "test")}
    assert len(rows["test"]) == test
    assert sorted(rows["train"] + rows["test"]) == list(range(low, high + 1))


def test_guess_number_baselines():
    env = GuessNumber(1, 16)
    assert env.constant_reply().tool_calls[0].arguments == {"number": 8}
    drawn = {env.random_reply(random.Random(seed)).tool_calls[0].arguments["number"] for seed in range(300)}
    assert drawn == set(range(1, 17))


@pytest.mark.parametrize("args", [{"low": 5, "high": 5}, {"guesses": 0}, {"discount": 0}, {"error": 2}])
def test_guess_number_refuses_what_cannot_be(args):
    with pytest.raises(ValueError, match="="):
        GuessNumber(**args)


def test_a_secret_out_of_range_is_refused():
    with pytest.raises(ValueError, match="secret 99 is not between 1 and 16"):
        start(GuessNumber(1, 16), {"secret": 99})


def test_echo_pays_for_the_text_and_nothing_else():
    env = Echo()
    assert start(env, {"text": "cedar otter slate"}) == "Repeat exactly: cedar otter slate"
    for reply, reward in {"cedar otter slate": 1, " cedar otter slate\n": 1, "cedar otter": 0, "": 0}.items():
        step = env.step(reply)
        assert (step.reward, step.terminated) == (float(reward), True)


def test_echo_teacher_errs_by_leaving_out_the_last_word():
    env = Echo(error=0.25)
    said = []
    for seed in range(1000):
        start(env, {"text": "cedar otter slate"}, seed)
        said.append(env.teacher([]))
    assert set(said) == {"cedar otter slate", "cedar otter"}
    assert abs(said.count("cedar otter") / 1000 - 0.25) < 0.05


def test_echo_splits_share_no_text_and_cover_small_spaces():
    env = Echo(words=1)
    rows = {split: [row["text"] for row in env.tasks(split)] for split in ("train", "test")}
    assert sorted(rows["train"] + rows["test"]) == sorted(WORDS)
    assert rows["test"]
    assert len(list(Echo(size=70).tasks("train"))) == 70


def test_echo_baselines():
    env = Echo(words=2)
    assert env.constant_reply().text == "amber amber"
    assert set(env.random_reply(random.Random(3)).text.split()) <= set(WORDS)
