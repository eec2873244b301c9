"""The benchmark of reading, on few small images: all sides see the same. Nothing here looks at how long it took."""

from __future__ import annotations

import json
import math
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import (
    ALONE,
    AUGMENTED,
    OURS,
    PLAIN,
    SAME,
    TEST,
    DataFindings,
    DataSettings,
    Sides,
    as_json,
    as_text,
    drawn_photo,
    drawn_shards,
    measure_data,
)
from tests.data.written import write_tar

SMALL = DataSettings(rows=20, width=60, height=40, image_size=24, batch=8, threads=2, repeats=1)


@pytest.fixture(scope="module")
def findings() -> DataFindings:
    return measure_data(SMALL, lambda line: None)


@pytest.mark.parametrize("view", [AUGMENTED, TEST])
def test_all_sides_make_the_same_pixels(tmp_path: Path, view: str) -> None:
    images, _ = drawn_shards(tmp_path, 6, (60, 40), 0)
    sides = Sides(images, view, SMALL)
    for row in range(6):
        ours, pillows = (by(images.image_bytes(row), row).astype(int) for by in (sides.by_ours, sides.by_pillow))
        inside = np.abs(ours - pillows)[2:-2, 2:-2]  # Pillow looks beyond the edges of a crop
        assert inside.max() <= 3
        assert inside.mean() < 0.3


def test_ratios_are_numbers_and_every_view_ends_with_a_verdict(findings: DataFindings) -> None:
    written = json.loads(json.dumps(as_json({"command": "bench.py"}, findings)))
    assert [found["view"] for found in written["views"]] == [AUGMENTED, TEST]
    for found in written["views"]:
        assert {side["name"] for side in found["sides"]} > {OURS, PLAIN, SAME, ALONE}
        assert all(side["images"] == 20 and len(side["runs_s"]) == 1 for side in found["sides"])
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in found["ratio"].values())
    text = as_text({"command": "bench.py"}, findings)
    assert "drawn: 20 JPEGs of 60 x 40 pixels" in text
    for view in (AUGMENTED, TEST):
        assert re.search(rf"^{view}: ours [\d.]+x webdataset .* [\d.]+x decoding alone ", text, re.MULTILINE)


def test_real_shards_may_hold_bad_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": drawn_photo(30, 20, 0), "y.jpg": b"no image", "z.png": b""})
    settings = DataSettings(shards=(str(tmp_path),), image_size=8, batch=2, threads=1, repeats=1, views=(TEST,))
    found = measure_data(settings, lambda line: None)
    assert found.source.startswith("real: 3 images")
    assert found.views[0].speeds[OURS].rows == 3


def test_drawn_photos_are_a_function_of_the_seed_and_weigh_what_photographs_do() -> None:
    photo = drawn_photo(500, 375, 1)
    assert photo == drawn_photo(500, 375, 1) != drawn_photo(500, 375, 2)
    assert 0.3 < len(photo) / (500 * 375) < 1.0
    assert Image.open(BytesIO(photo)).size == (500, 375)
