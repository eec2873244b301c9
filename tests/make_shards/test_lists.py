"""CSVs as programs write them: separators, marks, blanks, paths; what does not fit is refused by file and line."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from grappa_dist.make_shards.lists import Columns, csv_items
from grappa_dist.make_shards.sources import open_source

FILES = ("a/1.jpg", "b/2.jpg", "3.jpg", "4.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    return tmp_path / "images"


def read(folder: Path, text: str | bytes, **columns: object) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(name, label) of the rows of a CSV, and what was logged."""
    path, logged = folder.parent / "list.csv", list[str]()
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    source = open_source(str(folder))
    items = csv_items(str(path), source, Columns(task_name="t", **columns), logged.append)  # type: ignore[arg-type]
    return [(item.name, item.label) for item in items], logged


@pytest.mark.parametrize(
    "text",
    [
        "file,fine\na/1.jpg,x\nb/2.jpg,y\n",
        "\ufefffile,fine\r\na/1.jpg,x\r\nb/2.jpg,y\r\n",
        "file;fine\na/1.jpg;x\nb/2.jpg;y\n",
        "fine\tfile\nx\ta/1.jpg\ny\tb/2.jpg\n",
        "file | fine\na/1.jpg|x\nb/2.jpg|y",
        ' file , fine \n"a/1.jpg", x \n./b/2.jpg,y\n',
        "file,fine\n{folder}/a/1.jpg,x\nb//../b/2.jpg,y\n",
        "file,fine\na\\1.jpg,x\nb\\2.jpg,y\n",
    ],
)
def test_one_list_in_many_ways_of_writing(folder: Path, text: str) -> None:
    assert read(folder, text.replace("{folder}", str(folder))) == ([("a/1.jpg", "x"), ("b/2.jpg", "y")], [])


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_however_its_letters_are_composed(folder: Path, forms: tuple[str, str]) -> None:
    listed, there = (unicodedata.normalize(form, "é.jpg") for form in forms)
    (folder / there).write_bytes(b"x")
    assert read(folder, f"file,fine\n{listed},x\n")[0] == [(there, "x")]


def test_labels_follow_the_rule_of_evaluation_and_their_absence_is_said(folder: Path) -> None:
    text = "file,fine\na/1.jpg,1\nb/2.jpg,1.0\n3.jpg,nan\n4.jpg,\n"
    rows, logged = read(folder, text, label_required=False)
    assert [label for _, label in rows] == ["1", "1", None, None]
    assert "column 'fine' names no label for 2 of 4 images" in logged[0]


def test_a_label_column_that_is_not_there_is_said_with_those_that_are(folder: Path) -> None:
    rows, logged = read(folder, "file,label,split\na/1.jpg,x,train\n", label_required=False, split="split")
    assert rows == [("a/1.jpg", None)]
    assert "warning: " in logged[0]
    assert "no column 'fine', so its images get no labels; it has file, label, split (--label-column" in logged[0]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("path,fine\na/1.jpg,x\n", {}, "no column 'file'; it has path, fine"),
        ("file;label\na/1.jpg;x\n", {}, "no column 'fine'; it has file, label"),
        ("file,label\na/1.jpg,x\n", {"label_required": False, "label_named": True}, "no column 'fine'"),
        ("file,fine,fine\na/1.jpg,x,y\n", {}, "2 columns are called 'fine'"),
        ("file,fine\na/1.jpg,null\n", {}, r"list.csv line 2: column 'fine' is 'null', which counts as none"),
        ("file,fine\na/1.jpg,\u200b\n", {}, r"line 2: column 'fine' is .*, which counts as none \(blank\)"),
        ("file,fine\na/1.jpg\0,x\n", {}, "line 2: .* has a NUL byte"),
        ("file,fine\n../images/a/1.jpg,x\n", {}, "line 2: .* lies outside of"),
        ("file,fine\n/etc/x.jpg,x\n", {}, "line 2: '/etc/x.jpg' lies outside of"),
        ("file,fine\na/1.jpg,x\n./a/./1.jpg,x\n", {}, "line 3: 'a/1.jpg' is listed twice"),
        ("file,fine\nnew\nline.jpg,x\n", {}, "line 2: 1 field; expected 2"),
        ("file,fine\n9.jpg,x\n", {}, r"line 2: '9\.jpg' is not in"),
        ("file,fine\na/1.jpg,x\n".encode("utf-16"), {}, "not a CSV in UTF-8"),
        ("file,fine\n\udcff.jpg,x\n", {}, "not a CSV in UTF-8"),
        (f"file,fine\n{'x' * 200_000}.jpg,x\n", {}, "not a CSV in UTF-8: field larger than field limit"),
        ("file,fine\n", {}, "no rows"),
        ("", {}, "no column 'file'; it has none"),
    ],
)
def test_what_does_not_fit_is_refused_by_line_or_column(
    folder: Path, text: str | bytes, columns: dict[str, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(folder, text, **columns)
