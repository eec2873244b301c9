"""The section on attention: the weights that each fusion gives the adaptor sets, by task and layer.

Heat maps are inline SVG; an even share stays blank, so that a map without a pattern is empty.

Shapes: L layers, N adaptor sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grappa_dist.console import pluralize
from grappa_dist.report.content import ReportContent
from grappa_dist.report.html import absent, decimal, sentences, text
from grappa_dist.report.plots import COLOURS, Axes, Series, figure, grid, line_chart
from grappa_dist.report.sentences import read_attention, uniform

CELL_HEIGHT, HEAD_HEIGHT = 18, 20  # of a cell, and of the names of columns, in units of the drawing
LEAST = 1.5  # the weakest contrast that is stretched to full colour
MOST_GROUPS = 24  # maps of one fusion
_LEAD = (
    '<p class="lead">In every layer a learned fusion shares its attention among the adaptor sets, anew for each image. '
    "The maps show the mean share over the images of a task, sets running across from coarse to fine. "
    '<b class="ink-more">Blue</b> is more than an even share of one in N, <b class="ink-less">orange</b> is less, '
    "and what is even is blank.</p>"
)


def attention_section(content: ReportContent) -> str:
    """Entropy over layers, then sentences and maps for every fusion."""
    if not content.attention and not content.entropy:
        return absent("No fusion was trained in this run, so there is no attention to show. An average has none.")
    variants = list(dict.fromkeys([*content.attention, *content.entropy]))
    return _LEAD + _entropy_chart(content.entropy) + "".join(_variant(content, name) for name in variants)


def _entropy_chart(entropy: dict[str, list[float]]) -> str:
    if not entropy:
        return ""
    lines = [Series(name, range(1, len(values) + 1), values) for name, values in entropy.items()]
    lowest = min((v for s in lines for v in s.y if math.isfinite(v)), default=0.0)
    axes = Axes(
        title="Entropy of the attention, layer by layer",
        x_label="layer",
        y_label="entropy / log N",
        y_range=(math.floor(min(lowest, 0.95) * 20) / 20, 1.004),
        note="1 is uniform attention: every image weights all sets alike, as the average does. Lower is sharper.",
    )
    return grid([line_chart(lines, axes)])


def _variant(content: ReportContent, variant: str) -> str:
    entropy = content.entropy.get(variant, [])
    groups = content.attention.get(variant, {})
    shown = {name: values for name, values in list(groups.items())[:MOST_GROUPS] if values}
    sets = content.random_sets.get(variant, content.sets)
    reading = sentences(read_attention(groups, entropy, sets, content.decay.get(variant, [])))
    curves = _in_training(content, variant, sets)
    maps = _maps(shown, sets) if shown else ""
    hidden = len(groups) - len(shown)
    maps += f'<p class="note">{pluralize(hidden, "more group")} not shown.</p>' if hidden else ""
    if maps and uniform(entropy):
        maps = f'<details class="fold"><summary>Its maps, close to blank</summary>{maps}</details>'
    return f"<h3>{text(variant, 40)}</h3>{reading}{curves}{maps}"


def _in_training(content: ReportContent, variant: str, sets: list[str]) -> str:
    """The mean attention of each set and the entropy of each layer, over the steps of training."""
    shares = [step for step in content.shares.get(variant, []) if len(step) == len(sets) > 1]
    entropies = content.entropies.get(variant, [])
    note = "Mean over layers and over the training images of a step. Lines that stay together are an average."
    charts = _drift(shares, sets, Axes(title="Attention of each set, step by step", y_label="mean share", note=note))
    layers = [f"layer {i}" for i in range(1, 1 + (len(entropies[0]) if entropies else 0))]
    title = "Entropy of each layer, step by step"
    charts += _drift(entropies, layers, Axes(title=title, y_label="entropy / log N", note="1 is uniform attention."))
    return grid(charts) if charts else ""


def _drift(steps: list[list[float]], names: list[str], axes: Axes) -> list[str]:
    """A chart with a line for each name over the steps of training, (steps, names); none for a single step."""
    if len(steps) < 2:
        return []
    numbers = range(1, len(steps) + 1)
    lines = [Series(name, numbers, [step[i] for step in steps], i, i >= COLOURS) for i, name in enumerate(names)]
    return [line_chart(lines, replace(axes, x_label="step of training"))]


def _maps(groups: dict[str, list[list[float]]], sets: list[str]) -> str:
    """The mean over layers of all groups in one map, then a map of layers for each group."""
    wide = max(len(row) for values in groups.values() for row in values)
    columns = [sets[j].removeprefix("k=") if j < len(sets) else str(j) for j in range(wide)]
    most = saturation(list(groups.values()))
    means = {name: _over_layers(values) for name, values in groups.items()}
    means = {name: mean for name, mean in means.items() if mean}
    least = saturation([list(means.values())])
    overview = heat_map(list(means.values()), (list(means), columns), title="Mean over layers, by task", most=least)
    layers = "".join(
        heat_map(values, ([str(i) for i in range(1, len(values) + 1)], columns), title=f"{name}, by layer", most=most)
        for name, values in groups.items()
    )
    scale = (
        f"Colour saturates at {least:.2f} times an even share in the first map and at {most:.2f} times in the others."
    )
    return f'<div class="maps">{overview}{layers}</div><p class="note">{scale}</p>'


def _over_layers(values: list[list[float]]) -> list[float]:
    """Mean share of each set, (N,), or nothing if layers differ in length."""
    if len({len(row) for row in values}) != 1:
        return []
    return [float(v) for v in np.asarray(values, dtype=np.float64).mean(0)]


def saturation(maps: Sequence[Sequence[Sequence[float]]]) -> float:
    """The largest share in the maps as a multiple of an even one, where their colour saturates; at least `LEAST`."""
    ratios = [share * len(row) for rows in maps for row in rows for share in row if math.isfinite(share)]
    return max([LEAST, *ratios])


def heat_map(
    values: Sequence[Sequence[float]], names: tuple[Sequence[str], Sequence[str]], *, title: str, most: float
) -> str:
    """Shares of each row, coloured by how far they are from an even share; `names` are those of rows and columns.

    The colour saturates at `most` times an even share, and at as many times below it.
    """
    rows, columns = names
    wide = max(26, min(48, 380 // max(1, len(columns))))
    left = 14 + max((min(len(name), 14) for name in rows), default=0) * 7
    parts = [_column_names(columns, left, wide)]
    for i, (name, shares) in enumerate(zip(rows, values, strict=True)):
        y = HEAD_HEIGHT + i * CELL_HEIGHT
        parts.append(f'<text x="{left - 7}" y="{y + 13}" text-anchor="end">{text(name, 14)}</text>')
        for j, share in enumerate(shares):
            column = columns[j] if j < len(columns) else str(j)
            tip = f"{name}, {column}: {decimal(share, 4)}"
            parts.append(_cell(share, share * len(shares), math.log2(most), (left + j * wide, y, wide)))
            parts.append(f"<title>{text(tip)}</title></g>")
    width, height = left + max(1, len(columns)) * wide + 2, HEAD_HEIGHT + len(rows) * CELL_HEIGHT + 2
    box = f'class="heat" viewBox="0 0 {width} {height}" style="max-width:{width * 1.12:.0f}px"'
    return figure(title, f'<svg {box} role="img" aria-label="{text(title)}">{"".join(parts)}</svg>')


def _column_names(columns: Sequence[str], left: int, wide: int) -> str:
    every = max(1, math.ceil(max((len(c) for c in columns), default=0) * 6.4 / wide))
    return "".join(
        f'<text x="{left + (j + 0.5) * wide:.1f}" y="13" text-anchor="middle">{text(name, 12)}</text>'
        for j, name in enumerate(columns)
        if j % every == 0
    )


def _cell(share: float, ratio: float, bound: float, at: tuple[int, int, int]) -> str:
    """The cell of a share that is `ratio` times the even one, as a group to which the caller adds a title."""
    x, y, wide = at
    strength = min(1.0, abs(math.log2(max(ratio, 1e-9))) / bound) if math.isfinite(ratio) else 0.0
    box = f'x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{CELL_HEIGHT - 2}" rx="2"'
    shade = f'<rect class="{"more" if ratio > 1 else "less"}" {box} fill-opacity="{strength:.2f}"/>'
    number = ""
    if wide >= 32:
        shown = decimal(share, 2).removeprefix("0")
        strong = " strong" if strength > 0.7 else ""
        number = f'<text class="in{strong}" x="{x + wide / 2:.1f}" y="{y + 13}" text-anchor="middle">{shown}</text>'
    return f'<g><rect class="cell" {box}/>{shade}{number}'
