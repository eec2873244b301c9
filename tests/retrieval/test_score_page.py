"""The page of an evaluation: its figures, its images, and what it looks like in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.retrieval.evaluation import evaluate
from grappa_dist.retrieval.score_page import score_page, write_page
from grappa_dist.retrieval.scores import Evaluated
from tests.chromium import browsing
from tests.retrieval.photos import model_in, write_photos
from tests.stages import tiny


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root = tmp_path_factory.mktemp("evaluated")
    for task in ("photos", "more <b>photos</b>"):
        write_photos(root / task, bad=("cat/1.png",))
    (root / "photos" / "alone").mkdir()
    (root / "photos" / "alone" / "a.png").write_bytes(tiny.picture(77))
    return evaluate(model_in(root / "run"), [root / "photos", root / "more <b>photos</b>"])


def test_the_page_has_figures_classes_and_queries_and_escapes_names(found: Evaluated) -> None:
    page = score_page(found)
    for heading in ("Scores", "Among all tasks", "Classes", "Most improved queries", "Worst queries of neighbours"):
        assert f"<h2>{heading}</h2>" in page
    assert "more &lt;b&gt;photos&lt;/b&gt;" in page
    assert "<b>photos</b>" not in page
    assert "<script" not in page
    assert "cat/1.png" in page
    assert page.count("<image ") <= 24  # each is stored once


def test_a_single_model_has_its_worst_classes_and_queries(found: Evaluated, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    alone = evaluate("tests.models.tiny:create", tmp_path / "photos", against=None)
    write_page(alone, tmp_path / "scores.html")
    page = (tmp_path / "scores.html").read_text(encoding="utf-8")
    assert "Least R-Precision" in page
    assert "Most improved" not in page
    assert "Among all tasks" not in page
    with pytest.raises(ValueError, match=r"ends in \.html or \.htm"):
        write_page(alone, tmp_path / "scores.png")


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_window_and_shows_its_images(found: Evaluated, width: int, tmp_path: Path) -> None:
    write_page(found, tmp_path / "scores.html")
    with browsing(width=width) as tab:
        tab.page.goto((tmp_path / "scores.html").as_uri())
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.page.locator(".card").count() >= 12
        box = tab.page.locator(".hit .tile").first.bounding_box()
        assert box is not None
        assert box["width"] > 30
        assert tab.errors == []
