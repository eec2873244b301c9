"""A page with the maps of some images: points with colours, pictures on hover, two models side by side.

It needs no other file and fetches nothing. Its script is map.js beside this file, allowed by its hash; all that comes
from data is base64 in elements that are no scripts, and is shown as text. Columns of numbers and names are gzipped.
Shapes: n images, m maps.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import pluralize
from grappa_dist.data.rng import Purpose, generator
from grappa_dist.files import write_utf8
from grappa_dist.output import HARMFUL
from grappa_dist.report.html import MARK, STYLE, page_head, text
from grappa_dist.retrieval.map import Layout
from grappa_dist.retrieval.sprites import Read, Sprites, draw_sprites
from grappa_dist.stages.ground_truth import GroundTruth
from grappa_dist.stages.insight import spread_over_classes

MOST_BYTES = 10_000_000  # of the page
MOST_IMAGES = 100_000
NAMES_SHARE = 0.5  # of these bytes, at most for names
NAME_LENGTHS = (300, 100, 60, 30)  # characters to which names are cut, tried in this order
_ENCLOSING = 20_000  # bytes around the sheets
_LAST = 65_535  # the largest coordinate on the page
_STYLE = """
main.wide,header.wide{max-width:1500px}
.tools{display:flex;flex-wrap:wrap;gap:10px 18px;align-items:center;margin:0 0 14px}
.tools label{display:inline-flex;gap:7px;align-items:center}
.tools input[type=search]{min-width:0;width:240px;max-width:100%}
.tools input,.tools select,.tools button,.both button{font:inherit;color:inherit;background:var(--wash);
border:1px solid var(--rule);border-radius:7px;padding:5px 9px}
.both{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.both h2{font-size:16px;margin:0 0 6px}
.both small{font-weight:400;color:var(--muted)}
.plane{position:relative;width:100%;aspect-ratio:1;border:1px solid var(--rule);border-radius:9px;overflow:hidden;
touch-action:none;cursor:crosshair;background:var(--card)}
.plane:focus-visible{outline:2px solid var(--accent)}
.plane canvas{position:absolute;inset:0;width:100%;height:100%;pointer-events:none}
.zoom{position:absolute;right:8px;top:8px;display:flex;gap:5px}
.zoom button{width:32px;height:32px;padding:0;font-size:17px;line-height:1;cursor:pointer}
.groups{display:flex;flex-wrap:wrap;gap:5px;max-height:190px;overflow-y:auto;margin:0;padding:2px}
.groups button{font:inherit;font-size:13px;color:inherit;background:none;border:1px solid var(--rule);
border-radius:20px;padding:1px 10px 1px 7px;display:inline-flex;gap:6px;align-items:center;cursor:pointer;
overflow-wrap:anywhere;text-align:left}
.groups button[aria-pressed=true]{background:var(--wash);border-color:var(--accent);font-weight:600}
.groups i{width:11px;height:11px;border-radius:50%;flex:none}
.groups small{color:var(--muted);font-weight:400}
.shown{display:flex;gap:14px;align-items:center;min-height:112px;overflow-wrap:anywhere}
.shown p{margin:0}
.shown canvas{width:96px;height:96px;border-radius:7px;flex:none;background:var(--wash)}
.tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);border:1px solid var(--rule);border-radius:9px;
padding:8px;max-width:240px;font-size:12.5px;line-height:1.35;overflow-wrap:anywhere;box-shadow:0 3px 14px #0003}
.tip canvas{display:block;width:96px;height:96px;border-radius:6px;margin-bottom:5px}
.found{list-style:none;margin:10px 0 0;padding:0;max-height:170px;overflow-y:auto}
.found button{font:inherit;font-size:13px;color:var(--accent);background:none;border:0;padding:2px 0;cursor:pointer;
text-align:left;overflow-wrap:anywhere}
[hidden]{display:none!important}
"""


@dataclass(frozen=True)
class MapContent:
    """What the page shows."""

    title: str
    layouts: Sequence[Layout]
    names: Sequence[str] = field(repr=False)  # (n,) of files
    ground_truth: GroundTruth = field(repr=False)  # task and label of each image
    notes: Sequence[str] = ()  # sentences, such as how many images were left out


@dataclass(frozen=True)
class Written:
    """What a page came to."""

    path: Path
    bytes: int
    pictures: int  # images that have one
    side_px: int  # of a picture


def write_map(
    path: Path, content: MapContent, read: Read, *, most_bytes: int = MOST_BYTES, threads: int = 2
) -> Written:
    """Writes the page; as many images have a picture as fit into `most_bytes`, spread over the classes.

    Args:
        read: the file of an image, by its place.

    Raises:
        ValueError: the points and names alone take more than `most_bytes`.
    """
    columns = {**_columns(content), "names": _packed_names(content.names, int(NAMES_SHARE * most_bytes))}
    frame = len(_page(content, columns, _about(content, Sprites(96, 1, 1, [], [])), []).encode())
    left = most_bytes - frame - _ENCLOSING
    if left < 0:
        raise ValueError(
            f"{path}: {pluralize(len(content.names), 'image')} take {frame:,} bytes without a picture, of "
            f"{most_bytes:,} that the page may have; expected fewer images (--most)"
        )
    sprites = draw_sprites(
        picture_order(content.ground_truth).tolist(), read, left * 3 // 4, each_bytes=5, threads=threads
    )
    columns["pictured"] = _packed(np.array(sprites.rows, "<u4").tobytes())
    sheets = [base64.b64encode(sheet).decode() for sheet in sprites.sheets]
    page = _page(content, columns, _about(content, sprites), sheets)
    write_utf8(path, page)
    return Written(path, len(page.encode()), len(sprites.rows), sprites.side_px)


def picture_order(ground_truth: GroundTruth) -> NDArray[np.int64]:
    """The order in which images get a picture, (n,): one of each class of each task, then a second one, by chance."""
    count = len(ground_truth.labels)
    order = generator(Purpose.MAP, count, 1).permutation(count)
    classes = np.unique(np.stack([ground_truth.tasks, ground_truth.labels]), axis=1, return_inverse=True)[1].reshape(-1)
    return order[spread_over_classes(classes[order], count)]


def quantised(points: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Points (n, 2) in a square of 0 to 65,535, its middle that of the points; y grows downwards."""
    low, high = points.min(0), points.max(0)
    side = max(float((high - low).max()), 1e-12)
    inside = ((points - (low + high) / 2) / side + 0.5) * [1, -1] + [0, 1]
    return np.rint(np.clip(inside, 0, 1) * _LAST).astype("<u2")


def _columns(content: MapContent) -> dict[str, str]:
    points = np.stack([quantised(layout.points).T for layout in content.layouts])  # (m, 2, n)
    return {
        "points": _packed(points.tobytes()),
        "tasks": _packed(content.ground_truth.tasks.astype("<i4").tobytes()),
        "labels": _packed(content.ground_truth.labels.astype("<i4").tobytes()),
    }


def _about(content: MapContent, sprites: Sprites) -> Mapping[str, Any]:
    return {
        "count": len(content.names),
        "models": [layout.model for layout in content.layouts],
        "tasks": [_shown(name) for name in content.ground_truth.task_names],
        "classes": [_shown(name) for name in content.ground_truth.label_names],
        "side": sprites.side_px,
        "columns": sprites.columns,
        "perSheet": sprites.per_sheet,
    }


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def _packed_names(names: Sequence[str], most_bytes: int) -> str:
    """The names, cut in their middle to a length at which they fit, or to the shortest."""
    for length in NAME_LENGTHS:
        packed = _packed(json.dumps([_shown(name, length) for name in names], ensure_ascii=False).encode())
        if len(packed) <= most_bytes:
            break
    return packed


def _shown(name: str, length: int = NAME_LENGTHS[0]) -> str:
    """A name without characters that do harm, its end kept where it is long: the end of a path says most."""
    plain = HARMFUL.sub("\N{REPLACEMENT CHARACTER}", name)
    return plain if len(plain) <= length else f"{plain[: length // 3]}…{plain[-(length - length // 3 - 1) :]}"


@cache
def script() -> str:
    return files("grappa_dist.retrieval").joinpath("map.js").read_text(encoding="utf-8")


def policy() -> str:
    """The page's content policy: this one script, and nothing that is fetched."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _page(content: MapContent, columns: Mapping[str, str], about: Mapping[str, Any], sheets: Sequence[str]) -> str:
    columns = {**columns, "about": _packed(json.dumps(about).encode())}
    data = [f'<script type="text/plain" id="{name}">{packed}</script>' for name, packed in columns.items()]
    data += [f'<script type="text/plain" id="sheet-{i}">{sheet}</script>' for i, sheet in enumerate(sheets)]
    pictures = _describe_pictures(len(content.names), columns, about)
    figures = "".join(map(_figure, content.layouts))
    notes = "".join(f"<li>{text(note)}</li>" for note in (*content.notes, *pictures))
    return (
        f"{page_head(text(content.title), style=f'{STYLE}{_STYLE}', policy=policy())}"
        f'<header class="wide">{MARK}<div><h1>{text(content.title)}</h1>'
        f"<p>{pluralize(len(content.names), 'image')}; a point is an image, near points are alike</p></div></header>"
        f'<main class="wide"><section>{_TOOLS}<div class="both">{figures}</div></section>'
        f"{_PANELS}<section><h2>How to read it</h2><p class='lead'>{_READING}</p><ul class='reading'>{notes}</ul>"
        f"</section></main>{''.join(data)}<script>{script()}</script></body></html>\n"
    )


def _describe_pictures(count: int, columns: Mapping[str, str], about: Mapping[str, Any]) -> list[str]:
    if "pictured" not in columns:
        return []
    pictured = len(gzip.decompress(base64.b64decode(columns["pictured"]))) // 4
    if pictured == count:
        return []
    return [
        f"{pictured:,} of {pluralize(count, 'image')} have a picture, spread over the classes: more would not fit, or "
        "could not be read. Of the others the nearest picture on the map is shown, and named."
    ]


def _figure(layout: Layout) -> str:
    named = text(layout.model)
    buttons = "".join(
        f'<button type="button" data-zoom="{how}" aria-label="{what} {named}">{sign}</button>'
        for how, sign, what in (("in", "+", "Zoom into"), ("out", "−", "Zoom out of"), ("all", "⤢", "Show all of"))
    )
    return (
        f"<figure><h2>{named} <small>keeps {100 * layout.kept:.0f} % of the nearest images nearest</small></h2>"
        f'<div class="plane" tabindex="0" role="application" aria-label="Map of {named}: arrows move, plus and minus '
        'zoom, 0 shows all, Enter chooses the image in the middle"><canvas></canvas><canvas></canvas>'
        f'<div class="zoom">{buttons}</div></div></figure>'
    )


_TOOLS = (
    '<div class="tools"><label>Search <input type="search" id="search" placeholder="part of a name"></label>'
    '<label>Colours <select id="colours"></select></label>'
    '<label><input type="checkbox" id="together" checked> Move both maps</label>'
    '<span id="state" role="status">Loading</span></div>'
)
_PANELS = (
    '<section><h2>Groups</h2><div class="groups" id="groups" role="group" aria-label="Groups: choose those to see">'
    '</div><ul class="found" id="found" hidden></ul></section>'
    '<section><h2>Chosen image</h2><div class="shown" aria-live="polite"><canvas id="picture" width="96" height="96">'
    '</canvas><p id="chosen">Click a point, or a name that was found.</p></div></section>'
    '<div class="tip" id="tip" hidden><canvas width="96" height="96"></canvas><span></span></div>'
)
_READING = (
    "UMAP puts images that a model finds alike next to each other. Which images are neighbours can be trusted as far "
    "as the share above each map says; the size of a group, its shape and how far groups lie apart say little. Both "
    "maps begin at the same places, and the second is turned onto the first. Scores, not maps, say which is better."
)
