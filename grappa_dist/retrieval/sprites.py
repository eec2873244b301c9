"""Small pictures of many images in few files, within a number of bytes: sheets with a square of each image.

A picture is the square in the middle of its image. As many images as fit get one, those first that come first. Shapes:
n images, of which t have a picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image, ImageOps

from grappa_dist.data.decoding import BadImage, decode
from grappa_dist.prefetch import prefetch

SIDES_PX = (96, 64, 48, 32)  # of a picture, tried in this order
SHEET_PX = 1024  # the side of a sheet, at most
SAMPLE = 64  # images by which the bytes of a picture are estimated
QUALITY = 55  # of WebP
READ_AHEAD = 32
Read = Callable[[int], bytes | BadImage]  # the file of an image


@dataclass(frozen=True)
class Sprites:
    """Sheets of pictures, row by row, each picture `side_px` wide and high."""

    side_px: int
    columns: int  # of a sheet
    per_sheet: int
    rows: list[int] = field(repr=False)  # (t,) the images that have a picture, in the order of the pictures
    sheets: list[bytes] = field(repr=False)  # WebP; all but the last hold `per_sheet` pictures


def draw_sprites(rows: Sequence[int], read: Read, most_bytes: int, *, each_bytes: int = 0, threads: int = 2) -> Sprites:
    """Pictures of some images, of the largest side at which all fit; else of the smallest, and of as many as fit.

    Args:
        rows: (n,) which images, those first that matter most. What does not decode gets no picture.
        most_bytes: of all sheets together.
        each_bytes: what a picture takes elsewhere, counted among these.
    """
    sample = [square for _, square in _squares(rows[:SAMPLE], read, SIDES_PX[0], threads)]
    side = next(
        (side for side in SIDES_PX if (_estimate(sample, side) + each_bytes) * len(rows) <= most_bytes), SIDES_PX[-1]
    )
    columns = max(1, min(SHEET_PX // side, round(len(rows) ** 0.5)))
    per_sheet, used = columns * columns, 0
    drawn, sheets = list[int](), list[bytes]()
    squares = _squares(rows, read, side, threads)
    while part := list(islice(squares, per_sheet)):
        sheet, count = _fitting_sheet(
            [square for _, square in part], columns, side, most_bytes - used - each_bytes * len(part)
        )
        if count:
            drawn += [row for row, _ in part[:count]]
            sheets.append(sheet)
            used += len(sheet) + each_bytes * count
        if count < len(part):
            break
    squares.close()
    return Sprites(side, columns, per_sheet, drawn, sheets)


def _squares(
    rows: Sequence[int], read: Read, side: int, threads: int
) -> Generator[tuple[int, Image.Image], None, None]:
    """The pictures of those images that decode."""

    def square(row: int) -> tuple[int, Image.Image | None]:
        data = read(row)
        try:
            return row, None if isinstance(data, BadImage) else ImageOps.fit(decode(data), (side, side))
        except BadImage:
            return row, None

    for row, found in prefetch(square, rows, threads=threads, depth=READ_AHEAD):
        if found is not None:
            yield row, found


def _estimate(sample: Sequence[Image.Image], side: int) -> float:
    """Bytes of a picture, by a sheet of some."""
    if not sample:
        return 0.0
    small = [square.resize((side, side)) for square in sample]
    return len(_sheet(small, round(len(small) ** 0.5), side)) / len(small)


def _fitting_sheet(squares: Sequence[Image.Image], columns: int, side: int, most_bytes: int) -> tuple[bytes, int]:
    """A sheet of the first pictures, as many as fit into the bytes that are left, and how many these are."""
    count = len(squares)
    while count:
        sheet = _sheet(squares[:count], columns, side)
        if len(sheet) <= most_bytes:
            return sheet, count
        count = min(count - 1, int(count * 0.95 * max(most_bytes, 0) / len(sheet)))
    return b"", 0


def _sheet(squares: Sequence[Image.Image], columns: int, side: int) -> bytes:
    columns = max(1, min(columns, len(squares)))
    sheet = Image.new("RGB", (columns * side, -(-len(squares) // columns) * side))
    for place, square in enumerate(squares):
        sheet.paste(square, (place % columns * side, place // columns * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
