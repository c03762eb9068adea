"""Reward functions that fail, and where they are called: nothing is learned from a reward not given."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.compat.playing import ROW, arena_of, play
from tests.compat.trainers import trainer
from tests.support.rollouts import model
from turnwise.compat.loop import Loop
from turnwise.compat.rewards import Board, in_turn, reward_functions
from turnwise.errors import AnswerError, EnvLostError, ScoringError, boundary
from turnwise.rollout.faults import Faults
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.types import StopReason

# -- what ends a run -----------------------------------------------------------------------------------


def misspelt(completions, answr, **_):
    return [1.0] * len(completions)


def raising(completions, **_):
    raise KeyError("answer")


def no_list(completions, **_):
    return 1.0


def nothing(completions, **_):
    return None


def too_short(completions, **_):
    return [1.0]


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (raising, KeyError, "answer"),
        (no_list, AnswerError, "returned float; expected a list of 4"),
        (nothing, AnswerError, "returned NoneType"),
        (too_short, AnswerError, "returned 1 values; expected a list of 4"),
    ],
)
def test_a_function_that_scores_nothing_ends_the_run_by_its_own_error(
    function: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, reward_funcs=function)
    with pytest.raises(error, match=said) as caught:
        made.train()
    assert made.state.global_step == 0 and made.state.log_history == []
    assert f"'{function.__name__}' could score none of 4" in caught.value.__notes__[0]
    if function is raising:
        assert caught.traceback[-1].name == "raising", "its own traceback, down to the line"


def failed(error: Exception) -> ScoringError:
    """As scoring has what a function raised."""
    with pytest.raises(ScoringError) as caught, boundary(ScoringError, "reward f"):
        raise error
    return caught.value


def test_what_has_worked_is_stopped_by_mistakes_in_code_alone() -> None:
    faults = Faults()
    faults.note("f", [1.0, failed(TypeError("x"))], ends_run=True)
    faults.note("f", [failed(KeyError("x")), failed(TypeError("x"))], ends_run=True)
    for error in (TypeError("t"), NameError("n"), AttributeError("a"), AnswerError("s")):
        with pytest.raises(type(error)):
            faults.note("f", [failed(error)] * 2, ends_run=True)
    assert faults.take() == 3 and faults.take() == 0
    judge = Faults()
    judge.note("judge", [EnvLostError("it does not answer")] * 2, ends_run=True)
    with pytest.raises(KeyError):
        judge.note("judge", [failed(KeyError("x"))] * 2, ends_run=True)


# -- what does not -------------------------------------------------------------------------------------


def picky(completions, **_):
    return [{"a": 1.0, "ab": 0.5}[one[0]["content"]] for one in completions]


def test_completions_that_cannot_be_scored_are_left_out_told_of_and_counted(caplog) -> None:
    said = {"0": "a", "1": "ab", "2": "abc", "3": "abcd"}
    policy = ScriptedPolicy(lambda context: said[context.session[-1]])
    board = Board()
    other = lambda completions, **_: [5.0] * len(completions)  # noqa: E731 - any name will do
    with caplog.at_level(logging.WARNING):
        groups = play(arena_of(None, [picky, other], board=board), policy, [ROW, ROW], size=4)
    for group in groups:
        assert [one.reward for one in group.trajectories] == [6.0, 5.5, None, None]
        assert {one.stop_reason for one in group.trajectories[2:]} == {StopReason.SCORING_FAILED}
    assert board.take_metrics() == {"rewards/picky/failed": 4.0} and board.take_metrics() == {}
    assert caplog.text.count("'picky' could not score 2 of 4") == 1, "once for each kind of error"
    frames = re.findall(r'File "(.*)", line', caplog.text)
    assert 'return [{"a": 1.0' in caplog.text and set(frames) == {__file__}, "none of ours"


def test_a_call_that_raises_is_made_once_more_for_each_completion() -> None:
    asked: list[int] = []

    def batch(completions, **_):
        asked.append(len(completions))
        if len(completions) > 1:
            raise IndexError
        return [float(len(asked))]

    [group] = play(arena_of(None, batch), model("x"), size=3)
    assert asked == [3, 1, 1, 1]
    assert sorted(one.reward or 0.0 for one in group.trajectories) == [2.0, 3.0, 4.0]


def test_the_mean_in_the_log_is_of_what_was_scored(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes(completions, **_):
        calls.append(len(completions))
        if len(calls) == 1:
            return [None, None, 1.0, 3.0]
        if len(completions) > 1 or len(calls) % 2:
            raise KeyError("answer")
        return [2.0]

    made = trainer(tmp_path, reward_funcs=sometimes, max_steps=1)
    made.train()
    line = made.state.log_history[0]
    assert line["rewards/sometimes/mean"] == pytest.approx((1.0 + 3.0 + 2.0 + 2.0) / 4)
    assert line["rewards/sometimes/failed"] == 2.0 and calls == [4, 4, 1, 1, 1, 1]


# -- where and when they are called --------------------------------------------------------------------


def test_sync_functions_are_called_where_train_is_in_order_one_at_a_time(tmp_path: Path) -> None:
    """So a timeout by alarm, a connection to SQLite and a cache that the next one reads work, as in TRL."""
    here, seen = threading.get_ident(), []
    database = sqlite3.connect(":memory:")
    database.execute("create table asked (text)")
    cache: dict[str, Any] = {}

    def too_late(*_: Any) -> None:
        raise TimeoutError

    async def last(completions, n, **_):
        seen.append(("last", n[0]))
        assert cache["n"] is None or cache["n"] != n[0]
        return [0.0] * len(completions)

    def fills(completions, n, **_):
        assert threading.get_ident() == here and cache.get("n") is None
        seen.append(("fills", n[0]))
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(30)
        time.sleep(0.02)  # Another group ends.
        signal.alarm(0)
        database.execute("insert into asked values ('x')")
        cache["n"] = n[0]
        return [float(k) for k in range(len(completions))]

    def reads(completions, n, **_):
        assert threading.get_ident() == here and cache["n"] == n[0]
        seen.append(("reads", n[0]))
        cache["n"] = None
        return [0.0] * len(completions)

    before = signal.getsignal(signal.SIGALRM)
    try:
        trainer(tmp_path, reward_funcs=[last, fills, reads], max_steps=2).train()
    finally:
        signal.signal(signal.SIGALRM, before)
    sync = [one for one in seen if one[0] != "last"]
    assert [name for name, _ in sync] == ["fills", "reads"] * 4
    assert [n for _, n in sync[::2]] == [n for _, n in sync[1::2]]
    assert all(seen.index(("reads", n)) < seen.index(("last", n)) for _, n in sync)
    assert database.execute("select count(*) from asked").fetchone() == (4,)


def test_async_functions_run_at_the_same_time() -> None:
    met = asyncio.Barrier(2)

    async def one(completions, **_):
        async with asyncio.timeout(5):
            await met.wait()
        return [0.0] * len(completions)

    class Two:
        async def __call__(self, completions, **_):
            return await one(completions)

    async def never(loop: Loop) -> None:
        functions = in_turn(reward_functions([one, Two()], weights=None, board=Board()), loop.here)
        assert [function.turn for function in functions] == [None, None]

    with Loop() as loop:
        loop.run(never(loop))
    [group] = play(arena_of(None, [one, Two()]), model("x"))
    assert {one.stop_reason for one in group.trajectories} == {StopReason.ANSWERED}


def test_ctrl_c_in_a_function_ends_training(tmp_path: Path) -> None:
    def slow(completions, **_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
        return [0.0] * len(completions)

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, reward_funcs=slow).train()
    assert time.perf_counter() - began < 20
