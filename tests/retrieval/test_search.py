"""Search: hits with names and cosines, contact sheets, queries that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from grappa_dist.retrieval.collection import open_collection
from grappa_dist.retrieval.search import describe, search, write_sheet
from tests.retrieval.photos import embedder, model_in, write_photos
from tests.stages import tiny


def test_a_query_of_the_collection_finds_itself_first_and_names_are_printable(tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos", bad=("cat/1.png",))
    run = embedder(model_in(tmp_path / "run"))
    collection = open_collection([str(tmp_path / "photos")], lambda: run)
    queries = [str(tmp_path / "photos" / name) for name in ("brücke\n/2.png", "cat/0.png")]
    found = search(queries, collection, run, k=3)
    answers = found.answers
    assert [answer.hits[0].name for answer in answers] == ["brücke\n/2.png", "cat/0.png"]
    assert [len(answer.hits) for answer in answers] == [3, 3]
    assert all(answer.hits[0].cosine == pytest.approx(1, abs=1e-5) for answer in answers)
    lines = describe(found).splitlines()
    assert len(lines) == 8
    assert lines[1] == r"1.000  brücke\n/2.png"
    alone = search(queries[:1], collection, run, k=99)
    assert sorted(hit.name for hit in alone.answers[0].hits) == [name for name in names if name != "cat/1.png"]
    assert len(describe(alone).splitlines()) == len(names) - 1


def test_contact_sheets_are_a_page_without_other_files_or_a_picture(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "<b>.png").write_bytes(tiny.picture(99))
    run = embedder(model_in(tmp_path / "run"))
    collection = open_collection([str(tmp_path / "photos")], lambda: run, keep=tmp_path / "keep")
    queries = [str(tmp_path / "photos" / "cat" / name) for name in ("0.png", "<b>.png")]
    found = search(queries, collection, run, k=4)
    assert write_sheet(tmp_path / "sheet.html", found, collection) == 0
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 10
    assert "<b>.png" not in page
    assert "&lt;b&gt;.png" in page
    for name in ("sheet.jpg", "sheet.png"):
        write_sheet(tmp_path / name, found, collection)
        assert Image.open(tmp_path / name).size == (5 * 172, 2 * 200)
    again = open_collection([str(tmp_path / "keep")], lambda: run)
    found = search(queries[:1], again, run, k=2)
    (tmp_path / "photos" / found.answers[0].hits[0].name).rename(tmp_path / "elsewhere.png")
    assert write_sheet(tmp_path / "sheet.html", found, again) == 1
    assert "not found" in (tmp_path / "sheet.html").read_text()
    with pytest.raises(ValueError, match=r"sheet.pdf: expected a name that ends in .html"):
        write_sheet(tmp_path / "sheet.pdf", found, collection)


def test_what_cannot_be_searched_for_or_in_is_said(tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos", bad=("cat/1.png",))
    run = embedder(model_in(tmp_path / "run"))
    collection = open_collection([str(tmp_path / "photos")], lambda: run)
    with pytest.raises(ValueError, match=r"the query 1.png cannot be read: no JPEG"):
        search([str(tmp_path / "photos" / "cat" / "1.png")], collection, run)
    with pytest.raises(ValueError, match=r"nowhere.jpg: does not exist"):
        search([str(tmp_path / "nowhere.jpg")], collection, run)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search([str(tmp_path / "photos" / "cat" / "0.png")], collection, run, k=0)
    write_photos(tmp_path / "bad", bad=tuple(names))
    bad = open_collection([str(tmp_path / "bad")], lambda: run)
    with pytest.raises(ValueError, match="nothing to search: none of 12 images could be read"):
        search([str(tmp_path / "photos" / "cat" / "0.png")], bad, run)


def test_a_query_that_cannot_be_read_is_named_and_the_others_are_searched_for(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    run = embedder(model_in(tmp_path / "run"))
    collection = open_collection([str(tmp_path / "photos")], lambda: run)
    (tmp_path / "notes.txt").write_text("no image")
    cat = tmp_path / "photos" / "cat"
    queries = [str(path) for path in (cat / "1.png", tmp_path / "notes.txt", cat / "2.png", cat / "0.png")]
    found = search(queries, collection, run, k=1)
    assert [answer.hits[0].name for answer in found.answers] == ["cat/2.png", "cat/0.png"]
    assert [name for name, _ in found.unreadable] == [str(tmp_path / "notes.txt"), "1.png"]
    write_sheet(tmp_path / "sheet.png", found, collection)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 172, 2 * 200)
    one = search(queries[:3], collection, run, k=1)
    assert describe(one) == "2.png\n1.000  cat/2.png"
    with pytest.raises(ValueError, match=r"the query .*notes.txt cannot be read: is no folder, image, list or table"):
        search(queries[1:2] * 2, collection, run)
