"""Heat maps of shares, as inline SVG. What is even stays blank, so a map without a pattern looks like one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grappa_dist.report.markup import decimal, text
from grappa_dist.report.plots import figure

TALL = 18  # of a cell, in units of the drawing
HEAD = 20  # room for the names of columns
LEAST = 1.5  # the weakest contrast that is stretched to full colour


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
    parts = [_heads(columns, left, wide)]
    for i, (name, shares) in enumerate(zip(rows, values, strict=True)):
        y = HEAD + i * TALL
        parts.append(f'<text x="{left - 7}" y="{y + 13}" text-anchor="end">{text(name, 14)}</text>')
        for j, share in enumerate(shares):
            column = columns[j] if j < len(columns) else str(j)
            tip = f"{name}, {column}: {decimal(share, 4)}"
            parts.append(_cell(share, share * len(shares), math.log2(most), (left + j * wide, y, wide)))
            parts.append(f"<title>{text(tip)}</title></g>")
    width, height = left + max(1, len(columns)) * wide + 2, HEAD + len(rows) * TALL + 2
    box = f'class="heat" viewBox="0 0 {width} {height}" style="max-width:{width * 1.12:.0f}px"'
    return figure(title, f'<svg {box} role="img" aria-label="{text(title)}">{"".join(parts)}</svg>')


def _heads(columns: Sequence[str], left: int, wide: int) -> str:
    every = max(1, math.ceil(max((len(c) for c in columns), default=0) * 6.4 / wide))
    return "".join(
        f'<text x="{left + (j + 0.5) * wide:.1f}" y="13" text-anchor="middle">{text(name, 12)}</text>'
        for j, name in enumerate(columns)
        if j % every == 0
    )


def _cell(share: float, ratio: float, bound: float, at: tuple[int, int, int]) -> str:
    """An open group with the cell of a share that is `ratio` times the even one; the caller adds its title."""
    x, y, wide = at
    strength = min(1.0, abs(math.log2(max(ratio, 1e-9))) / bound) if math.isfinite(ratio) else 0.0
    box = f'x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{TALL - 2}" rx="2"'
    shade = f'<rect class="{"more" if ratio > 1 else "less"}" {box} fill-opacity="{strength:.2f}"/>'
    number = ""
    if wide >= 32:
        shown = decimal(share, 2).removeprefix("0")
        strong = " strong" if strength > 0.7 else ""
        number = f'<text class="in{strong}" x="{x + wide / 2:.1f}" y="{y + 13}" text-anchor="middle">{shown}</text>'
    return f'<g><rect class="cell" {box}/>{shade}{number}'
