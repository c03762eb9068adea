"""The report: complete, self-contained, and unable to run what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.support.trajectories import trajectory

from turnwise.store import RunDir
from turnwise.types import StopReason
from turnwise.view.charts import Reference, Series, line_chart, nice_ticks, smoothed
from turnwise.view.digest import choices, digest
from turnwise.view.report import page, write_report
from turnwise.view.text import LONGEST, escape, shortened
from turnwise.view.transcripts import transcript

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \x00 \ud800"
VOID = {"meta", "link", "line", "path", "circle", "text", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """A run whose RL solved task 0, unlearned task 1, and left task 2 unsolved; task 3 was always solved."""
    before, after = (0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)
    with RunDir(tmp_path / "small & <b>").lock() as run:
        for stage, rewards in (("sft", before), ("rl", after)):
            for task, reward in enumerate(rewards):
                run.append(
                    f"evaluate-{stage}",
                    trajectory(
                        id=f"evaluate/{stage}/catch/{task}/s0", reward=reward, question=f"task {task} {EVIL}"
                    ),
                )
            run.append(
                f"evaluate-{stage}",
                trajectory(id=f"evaluate/{stage}/catch/4/s0", stop_reason=StopReason.ENV_FAILED),
            )
        run.append("collect", trajectory(id="collect/catch/0/s0", policy="teacher"))
        for step in range(1, 31):
            values = {"reward/catch": step / 30, "entropy": 0.5, "clip_high": None, "episodes": 16.0}
            run.metrics("rl", step, values | {"rollout_seconds": 3.0, "learn_seconds": 1.0})
            run.metrics("sft", step, {"nll": 3 / step})
        run.mark_done("rl", {"seconds": 120.0})
        run.write_recipe("name: small\n")
        run.write_summary({
            "catch": {
                "sft": {
                    "mean": 0.5, "low": 0.3, "high": 0.7, "n": 4, "greedy": 0.5, "pass_at": {}, "failed": 1,
                },
                "rl": {
                    "mean": 0.75, "low": 0.5, "high": 1.0, "n": 4, "greedy": 1.0, "pass_at": {}, "failed": 1,
                    "gain": {"over": "sft", "mean": 0.25, "low": 0.1, "high": 0.4},
                },
            }
        })  # fmt: skip
        yield run


def test_the_report(run: RunDir) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "On held-out tasks", "Learning", "RL, step by step", "Where the time went", "How episodes ended",
        "Trajectories", "Recipe",
    ]  # fmt: skip
    assert "0.500 →</span> 0.750" in text and "+25.0 points</span> over SFT" in text
    assert "+25.0 [+10.0, +40.0]" in found.text
    assert "2 min 00 s of work · 30 RL steps on 480 episodes" in found.text
    assert "75% rollouts, 25% learning" in found.text
    assert "env failed: 1" in text
    titles = [tag for tag, _ in found.tags].count("figure")
    assert titles == 3  # reward, SFT loss, entropy; nothing for a metric that is always null


def test_the_order_in_which_episodes_ended_says_nothing(tmp_path: Path) -> None:
    """A resumed run has the episodes of an unbroken one in another order."""
    ends = (StopReason.TERMINATED, StopReason.MAX_TURNS, StopReason.TERMINATED, StopReason.MAX_TURNS)
    episodes = [
        trajectory(id=f"evaluate/rl/{env}/{task}/s0", env=env, stop_reason=end)
        for env in ("catch", "sums")
        for task, end in enumerate(ends)
    ]
    pages = []
    for order in (episodes, episodes[::-1], [*episodes[5:], *episodes[:5]]):
        directory = RunDir(tmp_path / f"{len(pages)}" / "run")
        with directory.lock():
            for one in order:
                directory.append("evaluate-rl", one)
        pages.append(page(directory))
    assert "max turns" in pages[0]
    assert pages[0] == pages[1] == pages[2]


def test_it_needs_nothing_else(run: RunDir) -> None:
    found = Page(page(run))
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & {tag for tag, _ in found.tags}
    assert [attrs["href"] for tag, attrs in found.tags if tag == "link"] == ["data:,"]
    for _, attrs in found.tags:
        assert not any(name.startswith("on") or name == "src" for name in attrs)
    assert "http://" not in page(run) and "https://" not in page(run) and "@import" not in page(run)


def test_what_a_model_wrote_is_text(run: RunDir) -> None:
    found = Page(page(run))
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' & ␀ \\ud800" in found.text
    assert "small & <b>" in found.text


def test_tasks_that_changed_are_chosen(run: RunDir) -> None:
    found = digest(run)
    chosen = {choice.title: choice.ids for choice in choices(found)}
    assert list(chosen) == [
        "learned · held-out task 0", "unlearned · held-out task 1", "worst · held-out task 2",
        "best · held-out task 3",
    ]  # fmt: skip
    assert chosen["learned · held-out task 0"] == (
        ("sft", "evaluate/sft/catch/0/s0"),
        ("rl", "evaluate/rl/catch/0/s0"),
    )
    assert found.ends["evaluate-rl", "catch"] == {"terminated": 4, "env_failed": 1}


def test_a_run_that_has_done_nothing(tmp_path: Path) -> None:
    text = page(RunDir(tmp_path / "new"))
    assert "Nothing has been played or learned yet." in Page(text).text and "<h2>" not in text


def test_a_run_in_its_middle(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock() as run:
        run.append("collect", trajectory(policy="teacher"))
        run.metrics("sft", 1, {"nll": 2.0})
    text = page(RunDir(tmp_path))
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Learning", "How episodes ended"]


def test_a_transcript() -> None:
    text = transcript(trajectory(reward=0.5), "after RL")
    found = Page(text)
    assert '<span class="chip some">0.500</span>' in text
    assert "2 turns · 6 tokens · terminated · 0.5 s" in found.text
    assert 'move(direction="left")' in found.text and "3 tokens · reward 0.500" in found.text
    failed = Page(transcript(trajectory(reward=None, stop_reason=StopReason.ENV_FAILED)))
    assert (
        "not scored" in failed.text
        and "environment catch: call: EnvLostError: the server is gone" in failed.text
    )


def test_long_text_is_shortened_in_the_middle() -> None:
    text = shortened("a" * 10_000 + "b")
    assert text.endswith("ab") and len(text) < LONGEST + 60 and "4,001 characters left out" in text
    assert shortened("short") == "short"


def test_escape() -> None:
    assert escape("<a b=\"c\" d='e'>&\t\n\x1b") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;\t\n␛"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 0.94, [0, 0.25, 0.5, 0.75, 1]),
        (0.0, 0.0, [0, 0.25, 0.5, 0.75, 1]), (-1, 3, [-1, 0, 1, 2, 3]), (5, 5, [0, 2, 4, 6]),
        (0, 2e-6, [0, 5e-7, 1e-6, 1.5e-6, 2e-6]), (-4, -4, [-4, -3, -2, -1, 0]),
    ],
)  # fmt: skip
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_smoothing_does_not_lag() -> None:
    line = [(float(x), 2.0 * x) for x in range(40)]
    assert smoothed(line)[5:-5] == [(x, pytest.approx(y)) for x, y in line[5:-5]]
    assert [y for _, y in smoothed([(float(x), 3.0) for x in range(5)])] == pytest.approx([3.0] * 5)


def test_a_chart() -> None:
    text = line_chart(
        "a < b",
        [Series("x", [(1, 0.0), (2, 1.0), (3, float("nan"))])],
        references=[Reference("low", 0.50), Reference("high", 0.52, strong=True)],
    )
    Page(text)
    assert 'd="M46.0 186.0L276.0 12.0"' in text  # from the lower left to the upper right
    levels = [float(y) for y in re.findall(r'class="name[^"]*" x="[^"]*" y="([^"]*)"', text)]
    assert levels[0] - levels[1] >= 12  # names do not overlap
    assert "<title>x, 2: 1.000</title>" in text and "a &lt; b" in text
    assert line_chart("empty", [Series("x", [])]) == ""
    Page(line_chart("one", [Series("x", [(1, 2.0)])]))
