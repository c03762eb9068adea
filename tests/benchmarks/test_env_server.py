"""The benchmark of environment servers at test size: both do the same work, and the table has its rows."""

import json
from pathlib import Path

import pytest
import uvloop
from benchmarks.env_server import GenericEnvClient, heard, main, ours, play, reply, row, running, said

from benchmarks import env_server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_of_each_kind_at_test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_server, "OPENED", 30)
    table = tmp_path / "rows.json"
    names = "tool,sessions,client_train"
    main(["--json", str(table), "--sessions", "4", "--pairs", "1", "--rows", names])
    found = json.loads(table.read_text())
    assert [(one["name"], one["unit"]) for one in found] == [
        ("tool", "us/step"),
        ("sessions", "KiB"),
        ("opening", "s"),
        ("client_train", "steps/s"),
    ]
    assert all(set(one) == {"name", "unit", "ours", "theirs", "ratio"} for one in found)
    assert all(one["ours"] > 0 and one["theirs"] > 0 for one in found)


@pytest.mark.slow
def test_a_server_that_answers_something_else_is_no_row() -> None:
    server = ours("Echo", sessions=2)

    def garbled(text: str) -> dict[str, object]:
        return reply(text.replace("0", "1"))

    with running(server), pytest.raises(RuntimeError, match=r"said '0.* heard .*'1111"):
        uvloop.run(play(GenericEnvClient, server, garbled, sessions=2, steps=2))


def test_answers_differ_from_step_to_step_and_are_read_in_both_spellings() -> None:
    assert len(said(7)) == 100 and said(7) != said(8)
    assert heard({"text": said(7), "messages": []}) == said(7)
    assert heard({"tool_name": "echo", "result": said(7)}) == said(7)
    assert heard({"tool_name": "echo", "result": {"data": said(7), "is_error": False}}) == said(7)


def test_ratios_say_how_many_times_better_ours_is() -> None:
    pairs = [(1.0, 3.0), (2.0, 4.0), (9.0, 3.5)]
    assert row("x", "us", pairs) == {"name": "x", "unit": "us", "ours": 2.0, "theirs": 3.5, "ratio": 1.75}
    assert row("x", "steps/s", pairs, more_is_better=True)["ratio"] == pytest.approx(0.57)
