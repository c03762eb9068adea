"""``report.html``: a run on one page that needs nothing but itself.

    write_report(RunDir("runs/quickstart"))     # or: turnwise report runs/quickstart

It may be written at any time; what a run has not made yet is left out. No script, no request to anywhere;
everything that a model or an environment said is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from turnwise.journal import write_atomic
from turnwise.store import RunDir
from turnwise.view.charts import Reference, Series, line_chart
from turnwise.view.digest import EVALUATION, Digest, choices, digest, fetch
from turnwise.view.rows import NAMES, NONE, duration, share, summary_rows
from turnwise.view.text import escape
from turnwise.view.transcripts import comparison

Metrics = Sequence[Mapping[str, Any]]

TRAINING = (
    ("Entropy, nats per token", ("entropy",)),
    ("KL of the step's update", ("approx_kl",)),
    ("KL to the reference", ("kl_reference",)),
    ("Share of tokens clipped", ("clip_high", "clip_low")),
    ("Sampler against learner, nats", ("mismatch", "mismatch_max")),
    ("Gradient norm", ("grad_norm",)),
    ("Groups without a difference", ("flat_groups",)),
    ("Staleness, versions", ("staleness_mean", "staleness_max")),
)
"""Small charts of RL: title and the metrics in it. Those that a run lacks are left out."""
LABELS = {
    "clip_high": "above",
    "clip_low": "below",
    "mismatch": "mean",
    "mismatch_max": "largest",
    "staleness_mean": "mean",
    "staleness_max": "largest",
}
SPANS = (("rollout_seconds", "rollouts"), ("learn_seconds", "learning"), ("publish_seconds", "new weights"))


def write_report(run: RunDir) -> Path:
    """Write the report of a run, finished or not.

    Returns:
        Its path.

    Raises:
        StoreError: The run cannot be read, or the disk is full.
    """
    path = run.path / "report.html"
    write_atomic(path, page(run).encode())
    return path


def page(run: RunDir) -> str:
    """The report's HTML."""
    summary, rl, sft, found = (
        run.summary() or {},
        run.read_metrics("rl"),
        run.read_metrics("sft"),
        digest(run),
    )
    title = escape(run.path.resolve().name)
    style = files("turnwise.view").joinpath("report.css").read_text(encoding="utf-8")
    parts = [
        _heads(summary),
        _table(summary),
        _curves(rl, sft, summary),
        _small_charts(rl),
        _time(run, rl),
        _ends(found),
        _transcripts(run, found),
        _recipe(run),
    ]
    if not any(parts[:-1]):
        parts.insert(0, "<p>Nothing has been played or learned yet.</p>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} · Turnwise</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>'
        f'<h1>{title}</h1><p class="lead">{escape(_lead(run, rl))}</p>{"".join(parts)}'
        "<footer>Written by Turnwise. Everything here is in the run directory: summary.json, metrics.jsonl, "
        "trajectories/.</footer></main></body></html>\n"
    )


def _lead(run: RunDir, rl: Metrics) -> str:
    seconds = sum(float(info.get("seconds", 0)) for info in run.finished().values())
    episodes = sum(int(line.get("episodes") or 0) for line in rl)
    parts = [f"{duration(seconds)} of work"] if seconds else []
    parts += [f"{len(rl)} RL steps on {episodes:,} episodes"] if rl else []
    return " · ".join(parts)


# ---------------------------------------------------------------------------------------------------
# Results


def _heads(summary: Mapping[str, Any]) -> str:
    cards = []
    for env, stages in summary.items():
        means = [(name, stages[name]["mean"]) for name in ("untrained", "sft", "rl") if name in stages]
        means = [(name, mean) for name, mean in means if mean is not None]
        if not means:
            continue
        last, mean = means[-1]
        earlier = f'<span class="from">{share(means[-2][1])} →</span> ' if len(means) > 1 else ""
        gain = stages[last].get("gain")
        note = NAMES[last]
        if gain:
            sure = "up" if gain["low"] > 0 else ""
            over = NAMES.get(gain["over"], gain["over"]).removeprefix("after ")
            note += f': <span class="{sure}">{gain["mean"] * 100:+.1f} points</span> over {escape(over)}'
        cards.append(
            f'<div class="card head"><h3>{escape(env)}</h3><p class="big">{earlier}{share(mean)}</p>'
            f"<p>{note}</p></div>"
        )
    return f'<div class="heads">{"".join(cards)}</div>' if cards else ""


def _table(summary: Mapping[str, Any]) -> str:
    rows = summary_rows(summary)
    if not rows:
        return ""
    show_tries = any(row.best_of != NONE for row in rows)
    show_failed = any(row.failed != "0" for row in rows)
    heads = ["environment", "player", "mean reward", "", "95% interval", "gain", "greedy"]
    heads += [*(["pass@k"] if show_tries else []), "episodes", *(["failed"] if show_failed else [])]
    body, before = [], ""
    for row in rows:
        kind = [name for name, on in (("first", row.env != before), ("baseline", not row.model)) if on]
        gain = f'<span class="up">{escape(row.gain)}</span>' if row.sure else escape(row.gain)
        cells = [
            escape(row.env) if row.env != before else "",
            escape(row.name),
            row.mean,
            _track(summary[row.env][row.stage]),
            row.interval,
            gain,
            row.greedy,
            *([row.best_of] if show_tries else []),
            row.n,
            *([row.failed] if show_failed else []),
        ]
        body.append(f'<tr class="{" ".join(kind)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
        before = row.env
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        "<h2>On held-out tasks</h2><p>Mean rewards of sampled play, with bootstrap intervals over tasks. "
        "Gains are over the stage before, task by task, in points.</p>"
        f'<div class="card table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _track(found: Mapping[str, Any]) -> str:
    """A mean and its interval on a line from 0 to 1; nothing where rewards are on another scale."""
    mean, low, high = found.get("mean"), found.get("low"), found.get("high")
    if mean is None or low is None or high is None or not 0 <= low <= high <= 1:
        return ""
    return (
        f'<span class="track"><i style="left:{low * 100:.1f}%;width:{(high - low) * 100:.1f}%"></i>'
        f'<b style="left:{mean * 100:.1f}%"></b></span>'
    )


# ---------------------------------------------------------------------------------------------------
# Training


def _curves(rl: Metrics, sft: Metrics, summary: Mapping[str, Any]) -> str:
    envs = dict.fromkeys(name.partition("/")[2] for line in rl for name in line if name.startswith("reward/"))
    charts = []
    for number, env in enumerate(envs):
        points = _points(rl, f"reward/{env}")
        levels = [
            Reference(NAMES[stage].removeprefix("after "), found["mean"], strong=stage == "rl")
            for stage, found in summary.get(env, {}).items()
            if stage in ("untrained", "sft", "rl") and found.get("mean") is not None
        ]
        unit = all(0 <= y <= 1 for _, y in points)
        charts.append(
            line_chart(
                f"{env}: reward",
                [Series(env, points, number % 6)],
                references=levels,
                floor=0.0 if unit else None,
                ceiling=1.0 if unit else None,
            )
        )
    charts.append(
        line_chart(
            "SFT loss, nats per token", [Series("nll", _points(sft, "nll"), 3)], floor=0.0, x_name="update"
        )
    )
    if not any(charts):
        return ""
    return (
        "<h2>Learning</h2><p>Mean reward of each RL step's training episodes (bold: moving average). Dashed: "
        "what the model earned on held-out tasks, sampled, before and after.</p>"
        f'<div class="grid2">{"".join(charts)}</div>'
    )


def _small_charts(rl: Metrics) -> str:
    charts = []
    for title, names in TRAINING:
        series = [
            Series(LABELS.get(name, name), _points(rl, name), number)
            for number, name in enumerate(name for name in names if _points(rl, name))
        ]
        if title.startswith("Staleness") and not any(y for one in series for _, y in one.points):
            continue  # synchronous: nothing to see
        charts.append(line_chart(title, series, floor=0.0))
    for prefix, title in (
        ("sampled_tokens/", "Sampled tokens per episode"),
        ("turns/", "Turns per episode"),
        ("truncated/", "Share of episodes truncated"),
    ):
        envs = dict.fromkeys(name for line in rl for name in line if name.startswith(prefix))
        series = [Series(name.removeprefix(prefix), _points(rl, name), i % 6) for i, name in enumerate(envs)]
        charts.append(line_chart(title, series, floor=0.0))
    if not any(charts):
        return ""
    return f'<h2>RL, step by step</h2><div class="grid3">{"".join(charts)}</div>'


def _points(lines: Metrics, name: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]


# ---------------------------------------------------------------------------------------------------
# Time and ends


def _time(run: RunDir, rl: Metrics) -> str:
    stages = {name: float(info["seconds"]) for name, info in run.finished().items() if info.get("seconds")}
    spans = {label: sum(float(line.get(name) or 0) for line in rl) for name, label in SPANS}
    rows, longest = [], max(stages.values(), default=0.0)
    for name, seconds in stages.items():
        rows.append(_bar(_stage_name(name), [(name, seconds, 0)], longest, duration(seconds)))
    total = sum(spans.values())
    if total:
        shares = [(label, seconds, number) for number, (label, seconds) in enumerate(spans.items())]
        text = ", ".join(f"{seconds / total:.0%} {label}" for label, seconds, _ in shares)
        rows.append(
            _bar("RL, split", shares, total, duration(total)) + _legend([label for label, *_ in shares], text)
        )
    if not rows:
        return ""
    return f'<h2>Where the time went</h2><div class="card bars">{"".join(rows)}</div>'


def _ends(found: Digest) -> str:
    if not found.ends:
        return ""
    ends: Counter[str] = sum(found.ends.values(), start=Counter())
    reasons = sorted(ends, key=lambda reason: (-ends[reason], reason))
    rows = []
    for (stage, env), counts in sorted(found.ends.items(), key=lambda one: (_stage_order(one[0][0]), one[0])):
        total = sum(counts.values())
        shares = [
            (f"{reason.replace('_', ' ')}: {counts[reason]:,}", counts[reason], reasons.index(reason))
            for reason in reasons
            if counts[reason]
        ]
        rows.append(_bar(f"{_stage_name(stage)}, {env}", shares, total, f"{total:,}"))
    legend = _legend([reason.replace("_", " ") for reason in reasons], "")
    return f'<h2>How episodes ended</h2><div class="card bars">{"".join(rows)}{legend}</div>'


def _bar(name: str, shares: Sequence[tuple[str, float, int]], full: float, text: str) -> str:
    filled = "".join(
        f'<i class="c{min(colour, 5)}" style="width:{value / full * 100:.2f}%" title="{escape(label)}"></i>'
        for label, value, colour in shares
        if full and value
    )
    return (
        f'<div class="row"><span>{escape(name)}</span><div class="bar">{filled}</div>'
        f"<small>{escape(text)}</small></div>"
    )


def _legend(names: Sequence[str], text: str) -> str:
    keys = "".join(f'<span class="key c{min(i, 5)}">{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{keys}<span class="facts">{escape(text)}</span></div>'


def _stage_name(stage: str) -> str:
    if stage.startswith(EVALUATION):
        stage = stage.removeprefix(EVALUATION)
        return f"evaluation, {NAMES.get(stage, stage)}"
    return {"sft": "SFT", "rl": "RL", "init": "making the model"}.get(stage, stage)


def _stage_order(stage: str) -> tuple[int, str]:
    order = ["collect", "sft", "rl", *(EVALUATION + name for name in NAMES)]
    return (order.index(stage) if stage in order else len(order)), stage


# ---------------------------------------------------------------------------------------------------
# Reading matter


def _transcripts(run: RunDir, found: Digest) -> str:
    chosen = choices(found)
    by_id = fetch(run, chosen)
    parts = [
        comparison(choice.title, [(NAMES.get(stage, stage), by_id[id]) for stage, id in choice.ids])
        for choice in chosen
    ]
    if not parts:
        return ""
    return (
        "<h2>Trajectories</h2><p>The same held-out task before and after: where the reward changed most, and "
        f"the best and the worst of the rest.</p>{''.join(parts)}"
    )


def _recipe(run: RunDir) -> str:
    recipe = run.recipe()
    if recipe is None:
        return ""
    folded = f"<details><summary>Every setting, resolved</summary><pre>{escape(recipe)}</pre></details>"
    return f"<h2>Recipe</h2>{folded}"
