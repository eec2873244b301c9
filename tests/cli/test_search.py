"""`grappa-dist search` on a folder and on embeddings that were kept, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.cli.search import command
from tests.cli.calling import called
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
