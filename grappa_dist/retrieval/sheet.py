"""Contact sheets: rows of small images with captions, as a page that needs no other file or as one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from grappa_dist.data.decoding import BadImage, decode
from grappa_dist.files import write_bytes
from grappa_dist.output import printable_line
from grappa_dist.report.html import STYLE, page_head, text

THUMBNAIL_PX = 160
HTML, PICTURES = (".html", ".htm"), (".jpg", ".jpeg", ".png")
_HEADING_PX = 22
_STYLE = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px;margin:10px 0 26px}
.sheet figure{margin:0;font-size:12.5px;overflow-wrap:anywhere}
.sheet img,.sheet span{display:grid;place-items:center;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;
background:var(--wash);color:var(--muted)}
.sheet .marked img{outline:2px solid var(--accent)}
"""


@dataclass(frozen=True)
class Tile:
    """One image of a sheet."""

    image: Image.Image | None  # None: it was not found
    caption: str  # such as a cosine
    name: str  # of its file
    marked: bool = False  # whether it is outlined, as a query is


@dataclass(frozen=True)
class Strip:
    """Images that belong together: a row of the picture, a section of the page."""

    tiles: Sequence[Tile]
    heading: str = ""


def check_sheet(path: Path) -> None:
    """Raises ValueError for a name that does not say which kind of sheet it is."""
    if path.suffix.lower() not in (*HTML, *PICTURES):
        raise ValueError(f"{path}: expected a name that ends in {', '.join((*HTML, *PICTURES))}")


def thumbnail(data: bytes | BadImage) -> Image.Image | None:
    """A file of an image, small; None where it is bad."""
    try:
        if isinstance(data, BadImage):
            return None
        image = decode(data)
    except BadImage:
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image


def data_url(image: Image.Image) -> str:
    """An image inside of a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(image, 'JPEG')).decode()}"


def sheet_sections(strips: Sequence[Strip]) -> Iterator[str]:
    """The markup of the strips, for a page with the style `SHEET_STYLE`."""
    for strip in strips:
        figures = []
        for tile in strip.tiles:
            drawn = "<span>not found</span>" if tile.image is None else f'<img alt="" src="{data_url(tile.image)}">'
            marked = ' class="marked"' if tile.marked else ""
            figures.append(f"<figure{marked}>{drawn}<b>{text(tile.caption)}</b><br>{text(tile.name)}</figure>")
        heading = f"<h2>{text(strip.heading)}</h2>" if strip.heading else ""
        yield f'<section>{heading}<div class="sheet">{"".join(figures)}</div></section>'


SHEET_STYLE = f"{STYLE}{_STYLE}"


def draw_sheet(path: Path, title: str, strips: Sequence[Strip]) -> None:
    """Writes the sheet: a page that needs no other file, or one picture with a row for each strip.

    Raises:
        ValueError: the name of the file says neither.
    """
    check_sheet(path)
    suffix = path.suffix.lower()
    write_bytes(path, _page(title, strips) if suffix in HTML else _picture(strips, suffix))


def _page(title: str, strips: Sequence[Strip]) -> bytes:
    return (
        f"{page_head(text(title), style=SHEET_STYLE)}<header><h1>{text(title)}</h1></header>"
        f"<main>{''.join(sheet_sections(strips))}</main></body></html>\n"
    ).encode()


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    return buffer.getvalue()


def _picture(strips: Sequence[Strip], suffix: str) -> bytes:
    """A row of tiles for each strip, below its heading; below each tile its caption and, as far as it fits, name."""
    cell, line = THUMBNAIL_PX + 12, THUMBNAIL_PX + 40
    heights = [line + _HEADING_PX * bool(strip.heading) for strip in strips]
    sheet = Image.new("RGB", (cell * max(len(strip.tiles) for strip in strips), sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 6
    for strip, height in zip(strips, heights, strict=True):
        if strip.heading:
            draw.text((6, top), _latin(strip.heading), fill="black")
        upper = top + _HEADING_PX * bool(strip.heading)
        for wide, tile in enumerate(strip.tiles):
            left = wide * cell + 6
            if (image := tile.image) is not None:
                inside = (left + (THUMBNAIL_PX - image.width) // 2, upper + (THUMBNAIL_PX - image.height) // 2)
                sheet.paste(image, inside)
            shown = tile.name if len(tile.name) <= 26 else f"...{tile.name[-23:]}"
            draw.text((left, upper + THUMBNAIL_PX + 2), f"{tile.caption}\n{_latin(shown)}", fill="black")
        top += height
    return _encoded(sheet, "PNG" if suffix == ".png" else "JPEG")


def _latin(shown: str) -> str:
    """As Pillow's own font has it."""
    return printable_line(shown).encode("latin-1", "replace").decode("latin-1")
