"""The page of a map: what it holds, that it stays within its size, and that it works in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from grappa_dist.retrieval.map import Layout
from grappa_dist.retrieval.map_page import MOST_BYTES, MapContent, picture_order, quantised, write_map
from grappa_dist.stages.ground_truth import GroundTruth
from tests.chromium import Tab, browsing
from tests.retrieval.test_sprites import noise, shade

if TYPE_CHECKING:
    from playwright.sync_api import Locator

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>.png"


def content(count: int, *, classes: int = 3, names: list[str] | None = None) -> MapContent:
    """Classes in tight groups; the second map is the first one upside down."""
    draws = np.random.default_rng(0)
    labels = np.arange(count) % classes
    points = (draws.normal(size=(classes, 2))[labels] * 10 + draws.normal(size=(count, 2)) * 0.2).astype(np.float32)
    layouts = [Layout("backbone", points, 0.5), Layout("<average>", points[:, ::-1] * -1, 0.625)]
    named = names or [f"class {labels[row]}/{row:05d}.png" for row in range(count)]
    ground_truth = GroundTruth(labels % 2, labels, ["<food>", "birds"], [f"class {i}" for i in range(classes)], [])
    return MapContent("A <map>", layouts, named, ground_truth, ["Five were left out."])


def data_of(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1]))


def test_points_lie_in_a_square_with_equal_axes_and_y_downwards() -> None:
    found = quantised(np.array([[0, 0], [4, 2], [2, 1]], np.float32)).astype(int)
    assert found[0].tolist() == [0, 49151]
    assert found[1].tolist() == [65535, 16384]
    assert np.abs(found[2] - 32768).max() <= 1
    assert quantised(np.zeros((3, 2), np.float32)).tolist() == [[32768, 32768]] * 3


def test_every_class_of_every_task_has_a_picture_before_any_has_two() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 7 + [-1] * 5)
    ground_truth = GroundTruth(np.array([0] * 60 + [1] * 5), labels, ["a", "b"], ["x", "y", "z"], [])
    order = picture_order(ground_truth)
    assert sorted(order.tolist()) == list(range(65))
    assert sorted(labels[order[:4]].tolist()) == [-1, 0, 1, 2]
    assert sorted(labels[order[4:8]].tolist()) == [-1, 0, 1, 2]


def test_a_page_holds_names_groups_and_places_and_no_markup_of_theirs(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(29)] + [HOSTILE]
    written = write_map(tmp_path / "map.html", content(30, names=names), shade)
    page = (tmp_path / "map.html").read_text()
    assert (written.bytes, written.pictures) == (len(page.encode()), 30)
    assert "onerror" not in page
    assert "<average>" not in page
    assert "&lt;average&gt;" in page
    assert json.loads(data_of(page, "names")) == names
    assert json.loads(data_of(page, "about"))["tasks"] == ["<food>", "birds"]
    assert np.frombuffer(data_of(page, "labels"), "<i4").tolist() == [row % 3 for row in range(30)]
    points = np.frombuffer(data_of(page, "points"), "<u2").reshape(2, 2, 30)
    np.testing.assert_array_equal(points[0].T, quantised(content(30).layouts[0].points))
    assert sorted(np.frombuffer(data_of(page, "pictured"), "<u4").tolist()) == list(range(30))


def test_a_page_stays_within_its_bytes_and_says_how_many_images_have_a_picture(tmp_path: Path) -> None:
    full = write_map(tmp_path / "full.html", content(300), noise)
    assert full.pictures == 300
    assert "have a picture" not in (tmp_path / "full.html").read_text().split("<script")[0]
    least = (tmp_path / "full.html").stat().st_size // 20
    written = write_map(tmp_path / "small.html", content(300), noise, most_bytes=max(least, 80_000))
    assert written.bytes == (tmp_path / "small.html").stat().st_size <= max(least, 80_000)
    assert 0 < written.pictures < 300
    assert f"{written.pictures} of 300 images have a picture" in (tmp_path / "small.html").read_text()
    with pytest.raises(ValueError, match=r"nothing\.html: 300 images take .* expected fewer images"):
        write_map(tmp_path / "nothing.html", content(300), noise, most_bytes=30_000)
    assert not (tmp_path / "nothing.html").exists()


def test_long_names_are_cut_in_their_middle_where_they_would_fill_the_page(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    names = ["".join(draws.choice(list("abcdefghijklmnopqrstuvwxyz"), 250)) + ".png" for _ in range(400)]
    write_map(tmp_path / "map.html", content(400, names=names), shade, most_bytes=120_000)
    shown = json.loads(data_of((tmp_path / "map.html").read_text(), "names"))
    assert all(len(name) <= 100 and name.endswith(".png") for name in shown)
    assert all(name[:10] == given[:10] for name, given in zip(shown, names, strict=True))


def opened(tab: Tab, path: Path) -> None:
    tab.page.goto(path.as_uri())
    tab.page.locator("html[data-ready]").wait_for(state="attached", timeout=120_000)


def colours(canvas: Locator) -> int:
    """How many pixels of a map are drawn."""
    return int(
        canvas.evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter(Boolean).length")
    )


def test_the_page_shows_the_image_under_the_pointer_in_both_maps_and_finds_names(tmp_path: Path) -> None:
    names = [f"class {row % 3}/{row:05d}.png" for row in range(59)] + [HOSTILE]
    write_map(tmp_path / "map.html", content(60, names=names), shade)
    with browsing() as tab:
        opened(tab, tmp_path / "map.html")
        page, maps = tab.page, tab.page.locator(".plane")
        assert maps.count() == 2
        assert [colours(maps.nth(i).locator("canvas").first) > 1000 for i in (0, 1)] == [True, True]
        page.locator("#search").fill("onerror")
        assert page.locator("#state").inner_text() == "1 of 60 images"
        page.locator("#found button").click()  # in the middle of both maps now
        assert page.locator("#chosen").inner_text().splitlines()[0] == HOSTILE
        box = maps.nth(1).bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert page.locator("#tip span").inner_text().splitlines() == [HOSTILE, "class 2, <food>"]
        page.locator("#tip canvas[data-drawn='59']").wait_for()
        grey = page.locator("#tip canvas").evaluate("c => c.getContext('2d').getImageData(48, 48, 1, 1).data[0]")
        assert abs(grey - 59) <= 4
        marked = maps.first.locator("canvas").nth(1)  # the same image, on the other map
        assert colours(marked) > 100
        page.locator("#search").fill("")
        page.locator("#colours").select_option("class")
        assert page.locator("#groups button").count() == 3
        page.locator("#groups button").nth(1).click()
        assert page.locator("#state").inner_text() == "20 of 60 images"
        assert page.locator("#groups button").nth(1).get_attribute("aria-pressed") == "true"
        assert page.title() == "A <map>"
        assert tab.errors == []


def test_on_a_narrow_dark_window_the_page_fits_and_is_worked_by_keys(tmp_path: Path) -> None:
    write_map(tmp_path / "map.html", content(60), noise, most_bytes=62_000)
    with browsing(390, 844, "dark") as tab:
        opened(tab, tmp_path / "map.html")
        page = tab.page
        assert page.locator("body").evaluate("b => b.scrollWidth") <= 390
        first, other = page.locator(".plane").nth(0), page.locator(".plane").nth(1)
        before = colours(first.locator("canvas").first), colours(other.locator("canvas").first)
        first.focus()
        for key in ("+", "+", "+", "+", "ArrowLeft"):
            page.keyboard.press(key)
        page.wait_for_timeout(100)
        after = colours(first.locator("canvas").first), colours(other.locator("canvas").first)
        assert after[0] != before[0]
        assert after[1] != before[1]  # both move
        page.locator("#together").uncheck()
        page.keyboard.press("Tab")
        first.focus()
        page.keyboard.press("0")
        page.wait_for_timeout(100)
        assert colours(first.locator("canvas").first) == before[0]
        assert colours(other.locator("canvas").first) == after[1]
        page.keyboard.press("Enter")  # the image next to the middle
        assert ".png" in page.locator("#chosen").inner_text()
        assert tab.errors == []


@pytest.mark.long
def test_a_map_of_100_000_images_takes_at_most_10_mb_and_opens(tmp_path: Path) -> None:
    count = 100_000
    names = [f"class {row % 500}/{np.random.default_rng(row).bytes(16).hex()}.jpg" for row in range(count)]
    written = write_map(tmp_path / "map.html", content(count, classes=500, names=names), noise)
    assert written.bytes <= MOST_BYTES == 10_000_000
    assert written.pictures > 1000
    with browsing() as tab:
        opened(tab, tmp_path / "map.html")
        tab.page.locator("#search").fill("class 7/")
        assert tab.page.locator("#state").inner_text() == "200 of 100,000 images"
        assert tab.errors == []
