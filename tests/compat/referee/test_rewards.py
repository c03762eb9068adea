"""Reward functions: which keyword arguments they are given, in which shape, and what they say counts for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.compat.referee.packages import PACKAGES, PackageName
from tests.compat.referee.scripted import tokenizer
from tests.compat.referee.scripts import GAME_ROWS, Counter, games, place, sums


class Heard:
    """A reward function that writes down each episode's arguments, whoever calls it how often."""

    __name__ = "heard"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[float]:
        self.calls.append({**given, "step": given["trainer_state"].global_step})
        return [0.5 * sibling for sibling in place(given["prompts"])]

    def episodes(self) -> dict[tuple[int, int], dict[str, Any]]:
        """What stood in each list for an episode, by its row's answer and which sibling it was."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for given in self.calls:
            lists = {name: value for name, value in given.items() if isinstance(value, list)}
            for i, sibling in enumerate(place(given["prompts"])):
                found[given["answer"][i], sibling] = {name: value[i] for name, value in lists.items()}
        return found


def told(
    package: PackageName, out: Path, script: Callable[..., Any] = sums, **settings: Any
) -> tuple[Heard, Any]:
    heard = Heard()
    return heard, script(package, out, heard, **settings)


def test_the_same_arguments(tmp_path: Path) -> None:
    (theirs, _), (ours, _) = (told(package, tmp_path / package, max_steps=1) for package in PACKAGES)
    assert {name for call in theirs.calls for name in call} == {name for call in ours.calls for name in call}
    assert ours.episodes() == theirs.episodes()
    assert len(theirs.episodes()) == 8
    for call in ours.calls:
        assert type(call["prompts"]) is type(call["completions"]) is type(call["completion_ids"]) is list
        assert len({len(value) for value in call.values() if isinstance(value, list)}) == 1
        assert isinstance(call["completion_ids"][0][0], int)
        assert call["step"] == 0
        assert callable(call["log_extra"]) and callable(call["log_metric"])


def test_tool_calls_and_their_results_are_in_the_completions(tmp_path: Path) -> None:
    """Messages as TRL's parser makes them, ids of the whole episode, tool results included."""
    theirs, ours = (told(package, tmp_path / package, games)[0].episodes() for package in PACKAGES)
    assert theirs.keys() == ours.keys() and len(theirs) == 2 * len(GAME_ROWS)
    own_words = [key for key in theirs if key[0] == 2]  # What a tool that raised says is in our words.
    speaker = tokenizer()
    for key, their in theirs.items():
        our = ours[key]
        assert our["prompts"] == their["prompts"]
        roles = [message["role"] for message in their["completions"]]
        assert [message["role"] for message in our["completions"]] == roles
        assert type(our["environments"]) is type(their["environments"]) is Counter
        assert our["environments"].value == their["environments"].value
        assert our["target"] == their["target"]
        if key in own_words:
            continue
        assert our["completion_ids"] == their["completion_ids"], speaker.decode(our["completion_ids"])
        for found, wanted in zip(our["completions"], their["completions"], strict=True):
            # Ours may say more (a call's id), never less or anything else.
            assert wanted.items() <= {**found, **_calls(found, wanted)}.items()


def _calls(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Our calls with the keys that theirs have."""
    if "tool_calls" not in wanted:
        return {}
    pairs = zip(found["tool_calls"], wanted["tool_calls"], strict=True)
    return {"tool_calls": [{key: our[key] for key in their} for our, their in pairs]}


def test_environments_are_those_that_were_played(tmp_path: Path) -> None:
    """One for each episode, in the order of the completions, none twice."""
    for package in PACKAGES:
        heard, _ = told(package, tmp_path / package, games)
        seen = [one for call in heard.calls for one in call["environments"]]
        assert len({id(one) for one in seen}) == len(seen) == 10, package
        for call in heard.calls:
            assert [one.target for one in call["environments"]] == call["target"], package


def test_text_prompts_have_text_completions(tmp_path: Path) -> None:
    """A data set of plain strings: no chat, no template."""
    rows = [{"prompt": "It is 3.", "answer": 0}, {"prompt": "It is 4.", "answer": 1}]
    settings = {"rows": rows, "max_steps": 1, "max_completion_length": 4}
    (theirs, _), (ours, _) = (told(package, tmp_path / package, **settings) for package in PACKAGES)
    assert {type(call["completions"][0]) for call in (*theirs.calls, *ours.calls)} == {str}
    assert {type(call["prompts"][0]) for call in (*theirs.calls, *ours.calls)} == {str}


def test_async_and_callable_objects_and_partials_have_their_names(tmp_path: Path) -> None:
    from functools import partial

    class Judge:
        async def __call__(self, completions: list[Any], **_: Any) -> list[float]:
            return [0.25] * len(completions)

    def scaled(completions: list[Any], scale: float, **_: Any) -> list[float]:
        return [scale] * len(completions)

    for package in PACKAGES:
        run = sums(package, tmp_path / package, [Judge(), partial(scaled, scale=0.75)], max_steps=1)
        line = run.steps[0]
        names = {key for key in line if key.startswith("rewards/") and key.endswith("/mean")}
        assert names == {"rewards/Judge/mean", "rewards/scaled/mean"}, package
        assert line["reward"] == pytest.approx(1.0), package


def test_extra_columns_and_metrics(tmp_path: Path) -> None:
    """``log_metric`` is a key of the log, ``log_extra`` a column of the completions table."""
    import pandas

    def marks(completions: list[Any], answer: list[int], log_extra: Any, log_metric: Any, **_: Any) -> Any:
        log_extra("marked", [f"answer {number}" for number in answer])
        log_metric("answers", float(sum(answer) / len(answer)))
        return [float(number) for number in answer]

    tables = {}
    for package in PACKAGES:
        out = tmp_path / package
        run = sums(package, out, marks, max_steps=1, log_completions=True, num_completions_to_print=1)
        assert run.steps[0]["answers"] == pytest.approx(0.5), package
        (path,) = (out / "completions").glob("*.parquet")
        assert path.name == "completions_00001.parquet", package
        tables[package] = pandas.read_parquet(path)
    theirs, ours = tables["trl"], tables["turnwise"]
    assert set(theirs.columns) <= set(ours.columns) and len(theirs) == len(ours) == 8
    assert sorted(ours["marked"]) == sorted(theirs["marked"])
    assert sorted(ours["marks"]) == sorted(theirs["marks"])
    assert sorted(ours["advantage"]) == pytest.approx(sorted(theirs["advantage"]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("said", [[1.0], "none", None], ids=["too few", "no list", "an exception"])
def test_a_function_that_never_says_what_was_worth_what_ends_the_run(said: Any, tmp_path: Path) -> None:
    """TRL stops at once; here an episode forfeits its reward, and too many in a row end the run."""

    def wrong(completions: list[Any], **_: Any) -> Any:
        if said is None:
            raise RuntimeError("wrong: the judge is away")
        return said

    for package in PACKAGES:
        with pytest.raises(Exception, match=r"wrong|float|rewards"):
            sums(package, tmp_path / package, wrong, max_steps=20)


def test_a_row_that_no_function_applies_to_is_left_out(tmp_path: Path) -> None:
    """Its siblings are compared among themselves; its advantage is 0."""

    def partly(prompts: list[Any], **_: Any) -> list[float | None]:
        return [[None, 0.0, 1.0, 1.0][sibling] for sibling in place(prompts)]

    for package in PACKAGES:
        line = sums(package, tmp_path / package, partly, max_steps=1).steps[0]
        assert line["reward"] == pytest.approx(2 / 3), package
        assert line["frac_reward_zero_std"] == 0.0, package
