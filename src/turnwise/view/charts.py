"""Line charts as inline SVG: made of text, coloured by the page's style sheet, legible at any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turnwise.view.rows import short
from turnwise.view.text import escape

WIDTH, HEIGHT = 360, 210
"""Of the drawing. Charts are shown near this size, so that their text is never scaled far."""
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 24
LABELS = 74
"""Room on the right for the names of reference lines."""

MOST_TOOLTIPS = 400
"""Points of a longer line have none: the page would grow without use."""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """(step, value), in order."""
    colour: int = 0
    """Index into the style sheet's colours."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A level to compare with: a dashed line across the chart, named at its end."""

    name: str
    value: float
    strong: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    references: Sequence[Reference] = (),
    floor: float | None = None,
    ceiling: float | None = None,
    x_name: str = "step",
) -> str:
    """A chart as a ``<figure>``, or nothing where there are no points.

    Args:
        title: Stands above it.
        series: Lines; where there are several, a legend names them.
        references: Dashed levels.
        floor: The value axis reaches down at least to here.
        ceiling: And up at least to here.
        x_name: What the steps are.
    """
    series = [Series(one.name, _finite(one.points), one.colour) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return ""
    values = [y for one in series for _, y in one.points] + [one.value for one in references]
    values += [bound for bound in (floor, ceiling) if bound is not None]
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    steps = [x for one in series for x, _ in one.points]
    first, last = min(steps), max(steps)
    right = WIDTH - RIGHT - (LABELS if references else 0)

    def across(x: float) -> float:
        return LEFT + (right - LEFT) * ((x - first) / (last - first) if last > first else 0.5)

    def down(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low))

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right:.1f}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text class="tick end" x="{LEFT - 6}" y="{down(tick) + 3.5:.1f}">{tick_text(tick)}</text>'
        for tick in ticks
    ]
    for x, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        name = f"{x_name} {x:g}" if anchor != "end" else f"{x:g}"
        place = f'x="{across(x):.1f}" y="{HEIGHT - 7}"'
        parts.append(f'<text class="tick {anchor}" {place}>{escape(name)}</text>')
    parts += _references(references, down, right)
    for one in series:
        parts += _line(one, across, down)
    legend = "".join(f'<span class="key c{one.colour}">{escape(one.name)}</span>' for one in series)
    caption = f"<figcaption>{escape(title)}{legend if len(series) > 1 else ''}</figcaption>"
    return (
        f'<figure class="chart">{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers at even distances that reach from ``low`` to ``high`` or a little beyond."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            high = 1.0
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A centred moving average, weighted like a tent, which lags behind nothing."""
    reach = max(2, len(points) // 16)
    out = []
    for middle, (x, _) in enumerate(points):
        inside = range(max(0, middle - reach), min(len(points), middle + reach + 1))
        window = [(reach + 1 - abs(i - middle), points[i][1]) for i in inside]
        out.append((x, sum(weight * y for weight, y in window) / sum(weight for weight, _ in window)))
    return out


def tick_text(value: float) -> str:
    """A tick without needless digits."""
    return short(value) if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-12 else "0"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _line(one: Series, across: Scale, down: Scale) -> list[str]:
    """The values, faint where a smoothed line is drawn over them, with a tooltip at each point."""
    noisy = len(one.points) > 12

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)

    parts = [f'<path class="line c{one.colour}{" raw" if noisy else ""}" d="{path(one.points)}"/>']
    if noisy:
        parts.append(f'<path class="line c{one.colour}" d="{path(smoothed(one.points))}"/>')
    if len(one.points) <= MOST_TOOLTIPS:
        parts += [
            f'<circle class="hit{"" if len(one.points) > 1 else " dot"} c{one.colour}" cx="{across(x):.1f}" '
            f'cy="{down(y):.1f}" r="4"><title>{escape(one.name)}, {x:g}: {short(y)}</title></circle>'
            for x, y in one.points
        ]
    return parts


def _references(references: Sequence[Reference], down: Scale, right: float) -> list[str]:
    """Dashed lines, their names moved apart where the levels are close."""
    parts, free = [], float(HEIGHT)
    for one in sorted(references, key=lambda one: one.value):
        y = down(one.value)
        free = min(y, free - 12)
        strong = " strong" if one.strong else ""
        parts.append(
            f'<line class="reference{strong}" x1="{LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="name{strong}" x="{right + 5:.1f}" y="{free + 3.5:.1f}">'
            f"{escape(one.name)} {one.value:.2f}</text>"
        )
    return parts
