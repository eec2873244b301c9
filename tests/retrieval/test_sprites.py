from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.decoding import BadImage
from grappa_dist.retrieval.sprites import SIDES_PX, draw_sprites

SHADES = 230


def shade(row: int) -> bytes:
    """A picture of one grey, which is its row."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (row % SHADES,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def noise(row: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_every_image_has_its_picture_at_its_place_over_several_sheets() -> None:
    rows = [int(row) for row in np.random.default_rng(0).permutation(130)]
    found = draw_sprites(rows, shade, 10**6)
    assert found.side_px == SIDES_PX[0]
    assert found.rows == rows
    assert len(found.sheets) > 1
    for place, row in enumerate(found.rows):
        sheet = Image.open(io.BytesIO(found.sheets[place // found.per_sheet])).convert("L")
        inside = place % found.per_sheet
        x, y = (inside % found.columns + 0.5) * found.side_px, (inside // found.columns + 0.5) * found.side_px
        assert sheet.getpixel((int(x), int(y))) == pytest.approx(row, abs=4)  # WebP


@pytest.mark.parametrize("most", [40_000, 9_000, 400, 0, -5])
def test_pictures_get_smaller_and_fewer_and_never_take_more_bytes_than_asked_for(most: int) -> None:
    found = draw_sprites(range(60), noise, most)
    assert sum(map(len, found.sheets)) <= max(0, most)
    assert found.rows == list(range(len(found.rows)))  # those first that come first
    assert found.side_px < SIDES_PX[0]
    assert (len(found.rows) > 10) == (most >= 9_000)


def test_what_is_no_image_has_no_picture() -> None:
    def read(row: int) -> bytes | BadImage:
        return BadImage("gone") if row == 1 else b"no image" if row == 2 else shade(row)

    assert draw_sprites([0, 1, 2, 3], read, 10**6).rows == [0, 3]
    assert draw_sprites([1, 2], read, 10**6).sheets == []
    assert draw_sprites([], read, 10**6).rows == []
