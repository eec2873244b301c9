"""Charts as inline SVG. Colours are CSS variables (html.py), so one drawing serves light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from grappa_dist.report.html import number, text

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 12, 38
COLOURS = 8  # --c0 .. --c7; later series are dashed
MOST_POINTS = 160  # of one line
MOST_SERIES = 24
TINY = 1e-290  # smaller values are not drawn on a log scale
MOST_NAME = 18  # characters of a row of a forest plot
LEAST_SPAN = 1e-3  # of a linear axis, as a share of its largest value
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARKERS = 40  # lines of up to this many points show them, with their values on hover


@dataclass(frozen=True)
class Series:
    """One line, broken at values that are not finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None  # its place in the palette, by default its place in the chart
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Title, labels and scales of a chart."""

    title: str
    x_label: str = ""
    y_label: str = ""
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    x_names: list[str] = field(default_factory=list)  # names of x = 0, 1, ... instead of numbers
    whole_y: bool = False  # whether values are counts
    note: str = ""


@dataclass(frozen=True)
class _Frame:
    """Data to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool

    def px(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        low, high = (math.log10(v) for v in self.y) if self.log_y else self.y
        at = math.log10(y) if self.log_y else y
        return HEIGHT - BOTTOM - (at - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float], int]:
    """At most `most` points, each the mean of a run of finite values, and how many values were not finite."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(ys) & np.isfinite(xs)
    bad = int(len(ys) - good.sum())
    if len(ys) <= most:
        return xs.tolist(), ys.tolist(), bad
    bucket = np.arange(len(ys)) * most // len(ys)
    count = np.bincount(bucket[good], minlength=most)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x = np.bincount(bucket[good], weights=xs[good], minlength=most) / count
        mean_y = np.bincount(bucket[good], weights=ys[good], minlength=most) / count
    return mean_x.tolist(), mean_y.tolist(), bad


def line_chart(series: Sequence[Series], axes: Axes) -> str:
    """Lines over a common frame, as a figure with a title and a legend."""
    shown = [s for s in series if _finite(s.x, s.y, axes.log_y)][:MOST_SERIES]
    if not shown:
        return figure(axes.title, '<p class="absent">No finite values to draw.</p>', axes.note)
    thinned = [thin(s.x, s.y)[:2] for s in shown]
    longest = max(len(s.y) for s in shown)
    merged = f"A point is the mean of about {longest / MOST_POINTS:.0f} values." if longest > MOST_POINTS * 1.5 else ""
    frame = _frame(thinned, axes)
    parts = [_grid(frame, axes)]
    legend = []
    for place, (one, (xs, ys)) in enumerate(zip(shown, thinned, strict=True)):
        index = place if one.colour is None else one.colour
        dash = ' stroke-dasharray="5 4"' if one.dashed or index >= COLOURS else ""
        colour = f"var(--c{index % COLOURS})"
        parts.append(f'<g style="--s:{colour}">{_line(frame, xs, ys, dash)}{_markers(frame, one.name, xs, ys)}</g>')
        swatch = f'<svg class="key" viewBox="0 0 22 8"><path d="M1 4H21" style="--s:{colour}"{dash}/></svg>'
        legend.append(f"<span>{swatch}{text(one.name, 40)}</span>")
    hidden = len(series) - len(shown)
    extra = f"<span>{hidden} more not shown</span>" if hidden else ""
    keys = f'<p class="legend">{"".join(legend)}{extra}</p>' if len(series) > 1 else ""
    return figure(axes.title, _svg("".join(parts), axes.title) + keys, f"{axes.note} {merged}".strip())


def _finite(x: Sequence[float], y: Sequence[float], positive: bool) -> list[tuple[float, float]]:
    pairs = zip(x, y, strict=True)
    return [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b) and (b > TINY or not positive)]


def _frame(lines: Sequence[tuple[list[float], list[float]]], axes: Axes) -> _Frame:
    pairs = [pair for xs, ys in lines for pair in _finite(xs, ys, axes.log_y)]
    x = (min(a for a, _ in pairs), max(a for a, _ in pairs))
    if axes.x_names:
        x = (-0.3, len(axes.x_names) - 0.7)
    low, high = axes.y_range or (min(b for _, b in pairs), max(b for _, b in pairs))
    if axes.y_range is None and axes.log_y:
        low, high = low / 1.15, high * 1.15
    elif axes.y_range is None:
        short = max(0.0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low))  # else labels would not differ
        low, high = low - short / 2, high + short / 2
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 0.5
        low, high = (0.0 if 0 <= low < pad else low - pad), high + pad
    return _Frame(x, (low, high), axes.log_y)


def ticks(low: float, high: float, about: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], about `about` of them; integers on request."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if size * m >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high] and, of a short range, numbers between them; about six at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        every = math.ceil(len(decades) / 6) if steps == (1,) else 1
        found = [m * 10.0**d for d in decades[::every] for m in steps if low <= m * 10.0**d <= high]
        if len(found) > 2:
            return found
    return ticks(low, high)


def tick_labels(values: Sequence[float]) -> tuple[list[str], str]:
    """Evenly spaced numbers as texts that differ as they do; and what all are multiplied with, such as "× 10⁻³".

    Large and small numbers are divided by a power of ten, as a label is seven characters at most.
    """
    most = max((abs(v) for v in values), default=0.0)
    power = math.floor(math.log10(most) + 1e-9) if most and math.isfinite(most) else 0
    power = 0 if 1e-2 <= most < 1e5 else power
    step = min((b - a for a, b in pairwise(values)), default=most) / 10.0**power
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * abs(step)), 9)
    scale = f"× 10{str(power).translate(_RAISED)}" if power else ""
    return [f"{v / 10.0**power:,.{decimals}f}".replace("-", "−") for v in values], scale


def _grid(frame: _Frame, axes: Axes) -> str:
    parts = []
    levels = log_ticks(*frame.y) if frame.log_y else ticks(*frame.y, whole=axes.whole_y)
    labels, scale = ([_tick(v) for v in levels], "") if frame.log_y else tick_labels(levels)
    for value, label in zip(levels, labels, strict=True):
        y = frame.py(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    every = math.ceil(len(axes.x_names) / 8) if axes.x_names else 1
    named = [(float(i), text(name, 12)) for i, name in enumerate(axes.x_names) if i % every == 0]
    few = 5 if frame.x[1] < 1e5 else 3
    for value, label in named or [(v, f"{v:,.0f}".replace("-", "−")) for v in ticks(*frame.x, few, whole=True)]:
        parts.append(f'<text x="{frame.px(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{label}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{text(axes.x_label)}</text>'
    )
    y_label = f"{axes.y_label} {scale}".strip()
    turn = f'transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" text-anchor="middle" {turn}>{text(y_label)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    """A number on a log scale."""
    if abs(value) >= 1e5 or abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    return number(round(value, 10))


def _line(frame: _Frame, xs: Sequence[float], ys: Sequence[float], dash: str) -> str:
    path, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not _finite([x], [y], frame.log_y):
            pen = "M"
            continue
        path.append(f"{pen}{frame.px(x):.1f} {frame.py(y):.1f}")
        pen = "L"
    return f'<path class="line" d="{"".join(path)}"{dash}/>'


def _markers(frame: _Frame, name: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    if not 2 < len(xs) <= MARKERS:  # a line of two points is a level
        return f"<title>{text(name, 40)}</title>"
    spots = [(frame.px(x), frame.py(y), number(y)) for x, y in _finite(xs, ys, frame.log_y)]
    tip = text(name, 40)
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tip}: {v}</title></circle>' for x, y, v in spots)


def bar_chart(values: Sequence[float], names: Sequence[str], axes: Axes) -> str:
    """Vertical bars from zero, one for each name, with their values on hover."""
    if not any(math.isfinite(v) and v > 0 for v in values):
        return figure(axes.title, '<p class="absent">Nothing to draw.</p>', axes.note)
    high = max(v for v in values if math.isfinite(v))
    frame = _Frame((-0.6, len(values) - 0.4), axes.y_range or (0.0, high * 1.06), log_y=False)
    parts = [_grid(frame, replace(axes, x_names=list(names), whole_y=True))]
    width = 0.8 * (frame.px(1) - frame.px(0))
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        if math.isfinite(value) and value > 0:
            x, y = frame.px(place) - width / 2, frame.py(value)
            box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            parts.append(f'<rect class="column" {box} rx="2"><title>{text(name)}: {number(value)}</title></rect>')
    return figure(axes.title, _svg("".join(parts), axes.title), axes.note)


@dataclass(frozen=True)
class Interval:
    """A row of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    shown: str  # the value as text
    tip: str = ""

    @property
    def colour(self) -> str:
        return "up" if self.low > 0 else "down" if self.high < 0 else "muted"


def forest_plot(rows: Sequence[Interval], axes: Axes) -> str:
    """Values with their intervals, one below the other, about a common zero; the first row stands out."""
    left, right, step, top = 118, 52, 26, 8
    bottom = top + step * len(rows)
    low, high = min(0.0, *(r.low for r in rows)), max(0.0, *(r.high for r in rows))
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def px(x: float) -> float:
        return left + (x - low) / (high - low) * (WIDTH - left - right)

    parts = []
    values = ticks(low, high, 4)
    labels, scale = tick_labels(values)
    for value, label in zip(values, labels, strict=True):
        parts.append(f'<path class="grid" d="M{px(value):.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{px(value):.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{px(0):.1f} {top}V{bottom}"/>')
    for place, row in enumerate(rows):
        y, weight = top + step * (place + 0.5), ' font-weight="700"' if place == 0 else ""
        name = row.name if len(row.name) <= MOST_NAME else f"{row.name[: MOST_NAME - 1]}…"
        line = f'<path class="line" d="M{px(row.low):.1f} {y:.1f}H{px(row.high):.1f}"/>'
        dot = f'<circle cx="{px(row.value):.1f}" cy="{y:.1f}" r="{5 if place == 0 else 4}"/>'
        parts.append(f'<text x="0" y="{y + 4:.1f}"{weight}>{text(name)}</text>')
        parts.append(f'<g style="--s:var(--{row.colour})"><title>{text(row.tip or row.name)}</title>{line}{dot}</g>')
        parts.append(f'<text x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end"{weight}>{text(row.shown)}</text>')
    parts.append(
        f'<text x="{(left + WIDTH - right) / 2}" y="{bottom + 32}" text-anchor="middle">'
        f"{text(f'{axes.x_label} {scale}'.strip())}</text>"
    )
    return figure(axes.title, _svg("".join(parts), axes.title, bottom + 38), axes.note)


def grid(figures: Sequence[str]) -> str:
    """Figures side by side as the width allows: two columns for a few, else three."""
    few = " few" if len(figures) in (1, 2, 4) else ""
    return f'<div class="charts{few}">{"".join(figures)}</div>' if figures else ""


def _svg(body: str, title: str, height: int = HEIGHT) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(title)}">{body}</svg>'


def figure(title: str, body: str, note: str = "") -> str:
    """A titled figure with an optional note below."""
    below = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<figure><figcaption>{text(title)}</figcaption>{body}{below}</figure>"
