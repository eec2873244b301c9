"""`grappa-dist search` on a folder and on embeddings that were kept, and what it refuses."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import NamedTuple

import pytest

from grappa_dist.cli.embed import command as embed
from grappa_dist.cli.search import command
from tests.cli.calling import called
from tests.retrieval.embedded import here
from tests.retrieval.photos import model_in, write_photos


def test_a_folder_is_searched_and_kept_and_what_is_bad_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    model, keep, sheet = model_in(tmp_path / "run"), str(tmp_path / "keep"), tmp_path / "sheet.html"
    query = str(tmp_path / "photos" / "cat" / "2.png")
    first = called(command, "--model", model, "--images", str(tmp_path / "photos"), "--keep", keep, "-k", "2", query)
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    assert lines[0] == "1.000  cat/2.png"
    assert len(lines) == 4
    assert lines[2] == "left out: 1 of 12 images could not be read"
    assert lines[3].startswith("  cat/1.png: no JPEG")
    again = called(command, "--model", model, "--images", keep, "--out", str(sheet), "-k", "2", query)
    assert again.out.splitlines()[:4] == lines
    assert again.out.splitlines()[4] == f"sheet  {sheet}"
    assert sheet.read_text().count("<figure") == 3
    listed = tmp_path / "left_out.csv"
    named = called(command, "--model", model, "--images", keep, "--left-out", str(listed), "-k", "1", query)
    assert named.out.splitlines()[1:] == [f"left out: 1 of 12 images could not be read; named in {listed}"]
    assert listed.read_text().startswith("file,reason\ncat/1.png,")


def test_the_list_of_what_was_left_out_has_its_columns_alone_where_nothing_was(tmp_path: Path) -> None:
    (name, *_) = write_photos(tmp_path / "photos")
    listed, photos = tmp_path / "left_out.csv", str(tmp_path / "photos")
    listed.write_text("file,reason\nof before,no JPEG\n")
    given = ["--model", model_in(tmp_path / "run"), "--images", photos, "--left-out", str(listed), f"{photos}/{name}"]
    assert called(command, *given).status == 0
    assert listed.read_text() == "file,reason\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": "nowhere.jpg"}, "error: QUERY nowhere.jpg: does not exist; expected an image"),
        ({"--images": "empty"}, "empty: no images; expected files ending in"),
        ({"--images": "nowhere"}, "error: nowhere: does not exist; expected a folder of images"),
        ({"--model": "nowhere"}, "error: nowhere: is no folder; expected a run directory"),
        ({"--device": "tpu"}, "error: device 'tpu': this machine has cpu"),
        ({"--out": "sheet.pdf"}, "error: sheet.pdf: expected a name that ends in .html"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    changed: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "inside" / "photos")
    given = {"--model": model_in(tmp_path / "inside" / "run"), "--images": "inside/photos"} | changed
    query = given.pop("query", "inside/photos/cat/0.png")
    found = called(command, *(word for pair in given.items() for word in pair), query)
    assert (found.status, found.out) == (2, "")
    assert message in found.err.splitlines()[-1]


class Indexed(NamedTuple):
    photos: Path
    model: str
    folder: str  # the embeddings with their index


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Indexed:
    here(monkeypatch)
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    made = Indexed(tmp_path / "photos", model_in(tmp_path / "run"), str(tmp_path / "out"))
    found = embed_index(made)
    assert found[1].startswith(f"index       {made.folder}/search: 11 images, IDMap2,Flat: exact")
    return made


def embed_index(made: Indexed) -> list[str]:
    settings = ["embed.batch_size=8", "data.max_bad_share=0.2"]
    given = ["--model", made.model, "--images", str(made.photos), "--out", made.folder, "--index", *settings]
    found = called(embed, *given)
    assert found.status == 0, found.err
    return [line for line in found.out.splitlines() if not line.startswith("left out")]


def test_an_index_answers_without_model_and_images_as_the_folder_does(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = str(indexed.photos / "cat" / "2.png")
    expected = called(command, "--model", indexed.model, "--images", str(indexed.photos), "-k", "5", query)
    found = called(command, "--index", indexed.folder, "-k", "5", query)
    assert (found.status, found.out.splitlines()) == (0, expected.out.splitlines()[:5])
    monkeypatch.setitem(sys.modules, "faiss", None)
    exact = called(command, "--index", indexed.folder, "-k", "5", query)
    assert exact.out == found.out
    assert "faiss is not installed, so all rows are compared, exactly: pip install 'grappa-dist[cpu]'" in exact.err


def test_a_sheet_is_opened_in_a_browser_where_there_is_one(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[str]()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or len(opened) == 1)
    query = str(indexed.photos / "cat" / "2.png")
    found = called(command, "--index", indexed.folder, "--open", query)
    (line,) = [line for line in found.out.splitlines() if line.startswith("sheet  ")]
    page = Path(line.removeprefix("sheet  "))
    assert opened == [page.as_uri()]
    assert page.read_text().count("<figure") == 11
    assert "no browser" not in found.err
    sheet = page.with_name("sheet.jpg")
    again = called(command, "--index", indexed.folder, "--open", "--out", str(sheet), query)
    assert f"warning: there is no browser here that could open {sheet}" in again.err
    assert opened[1] == sheet.as_uri()


def test_the_model_of_an_index_is_the_one_it_was_made_with_wherever_that_is(indexed: Indexed, tmp_path: Path) -> None:
    query = str(indexed.photos / "cat" / "2.png")
    Path(indexed.model).rename(tmp_path / "moved")
    gone = called(command, "--index", indexed.folder, query)
    assert gone.status == 2
    assert "its model (neighbours, sha256 " in gone.err
    assert f"is no longer in {indexed.model}; name where it is by --model" in gone.err
    assert called(command, "--index", indexed.folder, "--model", str(tmp_path / "moved"), query).status == 0
    other = called(command, "--index", indexed.folder, "--model", "tests.models.tiny:create", query)
    assert other.status == 2
    assert "than tests.models.tiny:create (backbone, sha256 " in other.err


def test_what_does_not_go_with_an_index_is_refused(indexed: Indexed) -> None:
    query = str(indexed.photos / "cat" / "2.png")
    for more in (["--images", "x"], ["--keep", "x"], ["--gallery", "x"], ["backbone.image_size=32"]):
        found = called(command, "--index", indexed.folder, *more, query)
        assert (found.status, "expected no --images, --keep, --gallery" in found.err) == (2, True)
    assert "expected --index DIR, or --model M and --images PLACE" in called(command, "--images", "x", query).err
    assert "there is no index; `grappa-dist embed --index`" in called(command, "--index", "nowhere", query).err


def test_one_query_that_cannot_be_read_leaves_the_others_their_hits(indexed: Indexed) -> None:
    queries = [str(indexed.photos / "cat" / name) for name in ("1.png", "2.png")]
    found = called(command, "--index", indexed.folder, "-k", "1", *queries)
    assert (found.status, found.out) == (0, "2.png\n1.000  cat/2.png\n")
    assert "warning: QUERY 1.png cannot be read: no JPEG" in found.err
    alone = called(command, "--index", indexed.folder, queries[0])
    assert (alone.status, alone.out) == (2, "")
    assert "error: the query 1.png cannot be read: no JPEG" in alone.err
