"""What goes wrong in TRL 1.16's agent loop, and does not here. Where it is cheap, TRL is seen doing it."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.compat.referee.packages import PACKAGES, PackageName, Run, train, trainer
from tests.compat.referee.scripted import Messages, answers, calls, says, scripted_model, tokenizer, user
from tests.compat.referee.scripts import GAME_ROWS, Counter, games, model, place, uneven

PATIENCE: dict[PackageName, float] = {"trl": 0.2, "turnwise": 60.0}
"""Seconds to wait for another episode: in TRL it does not come, here a busy machine may take long."""


class Meter:
    """How many are inside at once, at most; whoever is inside waits for ``wanted`` to have been."""

    def __init__(self, package: PackageName = "trl", wanted: int = 1) -> None:
        self.inside = self.peak = self.count = 0
        self.lock = threading.Lock()
        self.met = threading.Event()
        self.wanted, self.patience = wanted, PATIENCE[package]

    def __enter__(self) -> Meter:
        with self.lock:
            self.inside, self.count = self.inside + 1, self.count + 1
            self.peak = max(self.peak, self.inside)
        if self.peak >= self.wanted:
            self.met.set()
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1


class House:
    """Tools that wait, hang, end; what happens in it is counted on the class."""

    naps = Meter()
    resets = Meter()
    closed = 0
    made = 0
    called: tuple[str, ...] = ()
    met = Meter()
    """Who has looked."""

    def __init__(self) -> None:
        House.made += 1
        self.done = False

    def reset(self, what: str, **row: Any) -> str:
        self.what, self.done = what, False
        with House.resets as resets:
            resets.met.wait(resets.patience)
        return f" {what}"

    async def nap(self) -> str:
        """Sleep a little."""
        House.called += ("nap",)
        with House.naps as naps:
            await asyncio.to_thread(naps.met.wait, naps.patience)
        return "rested"

    def look(self) -> str:
        """Look around."""
        House.called += ("look",)
        with House.met:
            return "nothing"

    async def meet(self) -> str:
        """Wait for somebody to look."""
        met = await asyncio.to_thread(House.met.met.wait, House.met.patience)
        return "met" if met else "alone"

    def leave(self) -> str:
        """Go for good."""
        House.called += ("leave",)
        self.done = True
        return "gone"

    def hang(self) -> str:
        """Never return."""
        time.sleep(600)
        return "never"

    def get_reward(self) -> float:
        return 1.0


class Closing(House):
    """As `House`. (In TRL a method of this name is a tool, and needs a docstring that says what for.)"""

    def close(self) -> None:
        House.closed += 1


HOUSES = {"trl": House, "turnwise": Closing}


@pytest.fixture(autouse=True)
def house() -> type[House]:
    House.naps, House.resets, House.met = Meter(), Meter(), Meter()
    House.closed = House.made = 0
    House.called = ()
    return House


def _told(what: str, *said: dict[str, Any]) -> Messages:
    return [user(f"Go. {what}"), *said]


BROKEN = '<tool_call>\n{"name": "look", "arguments": {}\n</tool_call>'
HOUSE: list[Messages] = [
    _told("Rest.", calls(("nap", {})), answers("nap", "rested"), says("Good morning.")),
    _told("Both.", calls(("nap", {}), ("look", {})), answers("nap", "rested"), answers("look", "nothing"),
          says("In order.")),
    _told("Both.", calls(("nap", {}), ("look", {})), answers("look", "nothing"), answers("nap", "rested"),
          says("Out of order.")),
    _told("Meet.", calls(("meet", {})), answers("meet", "met"), says("Hello.")),
    _told("Meet.", calls(("meet", {})), answers("meet", "alone"), says("Alone.")),
    _told("Rest and look.", calls(("nap", {})), answers("nap", "rested"), calls(("look", {})),
          answers("look", "nothing"), says("Seen.")),
    _told("Leave.", calls(("leave", {}), ("look", {})), answers("leave", "gone"), answers("look", "nothing"),
          says("Back again.")),
    _told("Break.", says(BROKEN)),
    _told("Hang.", calls(("hang", {}))),
]  # fmt: skip


@cache
def _house_model() -> Any:
    return scripted_model(HOUSE, [House.hang, House.leave, House.look, House.meet, House.nap])


def visits(package: PackageName, out: Path, whats: list[str], **settings: Any) -> tuple[Run, list[Any]]:
    """Episodes of the house, two siblings each, and the completions that a reward function was shown."""
    from copy import deepcopy

    said: list[Any] = []

    def listen(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        said.extend(completions)
        return [float(sibling) for sibling in place(prompts)]

    settings = {"num_generations": 2, "per_device_train_batch_size": 2 * len(whats), "max_steps": 1,
                "max_completion_length": 100, **settings}  # fmt: skip
    rows = [{"prompt": [user("Go.")], "what": what} for what in whats]
    run = train(
        package, deepcopy(_house_model()), out, rows=rows,
        given={"reward_funcs": listen, "environment_factory": HOUSES[package]}, **settings,
    )  # fmt: skip
    return run, said


def roles(completion: list[dict[str, Any]]) -> list[str]:
    return [message.get("name") or message["role"] for message in completion]


def test_async_tools_of_different_episodes_overlap(tmp_path: Path) -> None:
    """TRL gathers within one episode, and waits for it before it begins the next."""
    peaks = {}
    for package in PACKAGES:
        House.naps = Meter(package, wanted=3)
        visits(package, tmp_path / package, ["Rest."], num_generations=4, per_device_train_batch_size=4)
        assert House.naps.count == 4
        peaks[package] = House.naps.peak
    assert peaks["trl"] == 1
    assert peaks["turnwise"] >= 3


@pytest.mark.slow
def test_resets_of_different_episodes_overlap(tmp_path: Path) -> None:
    peaks = {}
    for package in PACKAGES:
        House.resets = Meter(package, wanted=2)
        visits(package, tmp_path / package, ["Rest."], num_generations=8, per_device_train_batch_size=8)
        peaks[package] = House.resets.peak
    assert peaks["trl"] == 1
    assert peaks["turnwise"] > 1


def test_no_episode_waits_for_another(tmp_path: Path) -> None:
    """One's second turn can happen while another's first tool runs: in TRL a turn is over for all or none."""
    ends = {}
    for package in PACKAGES:
        House.met = Meter(package)
        _, said = visits(package, tmp_path / package, ["Meet.", "Rest and look."])
        ends[package] = {completion[-1]["content"] for completion in said}
    assert ends["trl"] == {"Alone.", "Seen."}
    assert ends["turnwise"] == {"Hello.", "Seen."}


def test_results_stand_in_the_order_of_their_calls(tmp_path: Path) -> None:
    """A sync and an async tool in one reply; TRL puts the sync ones first."""
    ends = {}
    for package in PACKAGES:
        _, said = visits(package, tmp_path / package, ["Both."])
        ends[package] = {(*roles(completion), completion[-1]["content"]) for completion in said}
    assert ends["trl"] == {("assistant", "look", "nap", "assistant", "Out of order.")}
    assert ends["turnwise"] == {("assistant", "nap", "look", "assistant", "In order.")}


def test_no_tool_runs_after_the_end(tmp_path: Path) -> None:
    """``done`` ends an episode, for a parallel call in the same reply too. TRL does not read it."""
    called = {}
    for package in PACKAGES:
        House.called = ()
        _, said = visits(package, tmp_path / package, ["Leave."])
        called[package] = set(House.called)
        if package == "trl":
            assert {completion[-1]["content"] for completion in said} == {"Back again."}
    assert called["trl"] == {"leave", "look"}
    assert called["turnwise"] == {"leave"}


@pytest.mark.slow
def test_environments_are_closed(tmp_path: Path) -> None:
    """TRL makes as many as a batch has episodes, uses them again, and leaves them as they are."""
    for package in PACKAGES:
        House.made = House.closed = 0
        visits(package, tmp_path / package, ["Rest."], max_steps=3)
        assert House.made <= 3, "instances are used again"
        assert House.closed == (0 if package == "trl" else House.made)


def test_a_malformed_call_is_told_to_the_model(tmp_path: Path) -> None:
    """In TRL it is text, and the end."""
    turns = {}
    for package in PACKAGES:
        _, said = visits(package, tmp_path / package, ["Break."])
        turns[package] = [roles(completion) for completion in said]
        assert all('"look"' in str(completion[0]["content"]) for completion in said), package
    assert turns["trl"] == [["assistant"]] * 2
    for found in turns["turnwise"]:
        assert len(found) > 1 and found[1] != "assistant", found


def test_a_tool_that_hangs_has_a_deadline(tmp_path: Path) -> None:
    """TRL would wait for ever."""
    began = time.monotonic()
    run, said = visits("turnwise", tmp_path, ["Hang."], tool_timeout=5.0)
    assert time.monotonic() - began < 60
    assert len(said) == 2 and run.steps[0]["completions/clipped_ratio"] == 1.0


BUDGETS: dict[str, dict[str, Any]] = {
    # The second call of the row whose target is 3 leaves no room for what it answers.
    "tokens": {"max_completion_length": 75},
    "calls": {"max_tool_calling_iterations": 1},
}


@pytest.mark.parametrize("budget", ["tokens", pytest.param("calls", marks=pytest.mark.slow)])
def test_a_budget_that_ends_after_a_tool_call_is_truncation(budget: str, tmp_path: Path) -> None:
    """For TRL such an episode ended well: its last token is the end of a reply, a call."""
    rows = [row for row in GAME_ROWS if row["target"] == 3]
    lines = {}
    for package in PACKAGES:
        lengths: list[int] = []

        def measure(completion_ids: list[Any], lengths: list[int] = lengths, **given: Any) -> list[float]:
            lengths.extend(map(len, completion_ids))
            return uneven(**given)

        settings = {"rows": rows, "per_device_train_batch_size": 2, **BUDGETS[budget]}
        run = games(package, tmp_path / package, measure, **settings)
        lines[package] = run.steps[0]
        assert max(lengths) <= settings.get("max_completion_length", 200), package
    assert lines["trl"]["completions/clipped_ratio"] == 0.0
    assert lines["turnwise"]["completions/clipped_ratio"] == 1.0
    assert lines["turnwise"]["completions/mean_length"] <= lines["trl"]["completions/mean_length"]


def test_truncated_after_a_tool_call_is_masked_when_asked(tmp_path: Path) -> None:
    """``mask_truncated_completions``: TRL learns from such an episode all the same."""
    rows = [row for row in GAME_ROWS if row["target"] == 3]
    moved = {}
    for package in PACKAGES:
        # A model that is a little less sure of its words: one that is certain has no gradient.
        unsure = model("games")
        unsure.lm_head.weight.data *= 0.5
        before = {name: p.clone() for name, p in unsure.state_dict().items()}
        run = train(
            package, unsure, tmp_path / package, rows=rows, num_generations=2, per_device_train_batch_size=2,
            max_completion_length=75, mask_truncated_completions=True, max_steps=1, learning_rate=1e-3,
            given={"reward_funcs": uneven, "environment_factory": Counter},
        )  # fmt: skip
        assert run.steps[0]["completions/mean_length"] == 50, package
        moved[package] = max(float((p - before[name]).abs().max()) for name, p in run.weights().items())
    assert moved["trl"] > 1e-6
    assert moved["turnwise"] == 0


def test_a_forked_chat_template_works(tmp_path: Path) -> None:
    """TRL knows templates by their whole text; one character more and it refuses."""
    forked = tokenizer()
    forked.chat_template = "{#- ours -#}" + forked.chat_template
    given = {"reward_funcs": uneven, "environment_factory": Counter}

    def play(package: PackageName) -> Run:
        made = trainer(
            package, model("games"), tmp_path / package, rows=GAME_ROWS, given=given, tokens=forked,
            max_steps=1, num_generations=2, per_device_train_batch_size=10, max_completion_length=200,
        )  # fmt: skip
        made.train()
        return Run(log=made.state.log_history, trainer=made)

    with pytest.raises(ValueError, match="template"):
        play("trl")
    assert play("turnwise").steps[0]["rewards/Counter/mean"] == pytest.approx(0.6)


@pytest.mark.slow
def test_inside_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook: whoever calls ``train()`` has an event loop that runs."""

    async def cell(package: PackageName) -> Run:
        return games(package, tmp_path / package, uneven)

    for package in PACKAGES:
        assert asyncio.run(cell(package)).steps[0]["rewards/Counter/mean"] == pytest.approx(0.6)
