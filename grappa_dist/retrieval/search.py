"""Search: the images of a collection that look most like a query; printed, and drawn on a contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from grappa_dist.data.decoding import BadImage, decode
from grappa_dist.files import write_bytes
from grappa_dist.output import printable_line
from grappa_dist.report.html import POLICY, STYLE, text
from grappa_dist.retrieval.collection import Collection, open_collection
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.nearest import nearest

THUMBNAIL_PX = 160
HTML, PICTURES = (".html", ".htm"), (".jpg", ".jpeg", ".png")
_STYLE = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px;margin:10px 0 26px}
.sheet figure{margin:0;font-size:12.5px;overflow-wrap:anywhere}
.sheet img,.sheet span{display:grid;place-items:center;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;
background:var(--wash);color:var(--muted)}
.sheet .asked img{outline:2px solid var(--accent)}
"""


@dataclass(frozen=True)
class Hit:
    """An image of the collection that was found."""

    row: int  # in the collection
    name: str
    cosine: float


@dataclass(frozen=True)
class Answer:
    """What was found for one query, nearest first."""

    query: str
    hits: tuple[Hit, ...]


def search(
    queries: Sequence[str], collection: Collection, embedder: Embedder, *, k: int = 10
) -> tuple[list[Answer], Collection]:
    """The k nearest images of each query; and the queries as a collection of their own, for a contact sheet.

    An image that is in the collection itself finds itself.

    Args:
        queries: files of images.

    Raises:
        ValueError: a query cannot be read, or the collection has no image.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: it is the number of hits")
    if len(collection) == len(collection.bad):
        raise ValueError(f"there is nothing to search: none of {len(collection)} images could be read")
    asked = open_collection(queries, lambda: embedder)
    for row, why in asked.bad.items():
        raise ValueError(f"the query {asked.name(row)} cannot be read: {why}")
    found = nearest(np.concatenate(asked.rows), collection.rows, collection.bad, k, embedder.model.device)
    answers = []
    for number in range(len(asked)):
        pairs = zip(found.rows[number].tolist(), found.cosines[number].tolist(), strict=True)
        hits = tuple(Hit(row, collection.name(row), cosine) for row, cosine in pairs)
        answers.append(Answer(asked.name(number), hits))
    return answers, asked


def describe(answers: Sequence[Answer]) -> str:
    """A line for each hit, its cosine and name; below the query's name where there are several."""
    lines = []
    for answer in answers:
        lines += [printable_line(answer.query)] if len(answers) > 1 else []
        lines += [f"{hit.cosine:.3f}  {printable_line(hit.name)}" for hit in answer.hits]
    return "\n".join(lines)


def write_sheet(path: Path, answers: Sequence[Answer], collection: Collection, asked: Collection) -> int:
    """Draws queries with their hits: a page that needs no other file, or one picture.

    Returns:
        How many images could not be drawn, since they are no longer where they were embedded from.

    Raises:
        ValueError: the name of the file ends otherwise.
    """
    check_sheet(path)
    drawn: dict[int, Image.Image | None] = {}
    for hit in (hit for answer in answers for hit in answer.hits):
        drawn[hit.row] = drawn[hit.row] if hit.row in drawn else _thumbnail(collection.image(hit.row))
    strips = [
        [(_thumbnail(asked.image(number)), "query", answer.query)]
        + [(drawn[hit.row], f"{hit.cosine:.3f}", hit.name) for hit in answer.hits]
        for number, answer in enumerate(answers)
    ]
    write_bytes(path, _page(strips) if path.suffix.lower() in HTML else _picture(strips, path.suffix.lower()))
    return sum(image is None for image in drawn.values())


def check_sheet(path: Path) -> None:
    """Raises ValueError for a name that does not say which kind of sheet it is."""
    if path.suffix.lower() not in (*HTML, *PICTURES):
        raise ValueError(f"{path}: expected a name that ends in {', '.join((*HTML, *PICTURES))}")


_Tile = tuple[Image.Image | None, str, str]  # what is drawn, its caption and its name


def _thumbnail(data: bytes | BadImage) -> Image.Image | None:
    try:
        if isinstance(data, BadImage):
            return None
        image = decode(data)
    except BadImage:
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image


def _page(strips: Sequence[Sequence[_Tile]]) -> bytes:
    sheets = []
    for strip in strips:
        figures = []
        for place, (image, caption, name) in enumerate(strip):
            drawn = "<span>not found</span>" if image is None else f'<img alt="" src="{_data_url(image)}">'
            asked = ' class="asked"' if not place else ""
            figures.append(f"<figure{asked}>{drawn}<b>{text(caption)}</b><br>{text(name)}</figure>")
        sheets.append(f'<section><div class="sheet">{"".join(figures)}</div></section>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Search</title><style>{STYLE}{_STYLE}</style></head><body>"
        f"<header><h1>Search</h1></header><main>{''.join(sheets)}</main></body></html>\n"
    ).encode()


def _data_url(image: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(image, 'JPEG')).decode()}"


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    return buffer.getvalue()


def _picture(strips: Sequence[Sequence[_Tile]], suffix: str) -> bytes:
    """A line of tiles for each query; below each the cosine, as far as it fits the name."""
    cell, line = THUMBNAIL_PX + 12, THUMBNAIL_PX + 40
    sheet = Image.new("RGB", (cell * max(len(strip) for strip in strips), line * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    for high, strip in enumerate(strips):
        for wide, (image, caption, name) in enumerate(strip):
            left, top = wide * cell + 6, high * line + 6
            if image is not None:
                inside = (left + (THUMBNAIL_PX - image.width) // 2, top + (THUMBNAIL_PX - image.height) // 2)
                sheet.paste(image, inside)
            shown = name if len(name) <= 26 else f"...{name[-23:]}"
            latin = printable_line(shown).encode("latin-1", "replace").decode("latin-1")  # as Pillow's own font has it
            draw.text((left, top + THUMBNAIL_PX + 2), f"{caption}\n{latin}", fill="black")
    return _encoded(sheet, "PNG" if suffix == ".png" else "JPEG")
