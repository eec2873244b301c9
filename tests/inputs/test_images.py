"""Lists of images, and what entries leave out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grappa_dist.inputs import look, prepared, shards_of
from tests.inputs.test_entries import config, names_of, rows_of, write_images
from tests.stages import tiny


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "file,label,task\na/1.png,x,birds\nb/1.png,y,food\n"),
        ("list.tsv", "file\tlabel\ttask\na/1.png\tx\tbirds\nb/1.png\ty\tfood\n"),
        ("metadata.csv", "file_name,class,dataset\na/1.png,x,birds\nb/1.png,y,food\n"),
        (
            "list.jsonl",
            '{"file": "a/1.png", "label": "x", "task": "birds"}\n\n{"file": "b/1.png", "label": ["y"], "task": "food"}',
        ),
    ],
)
def test_a_list_names_images_below_its_folder_with_labels_and_tasks(photos: Path, name: str, text: str) -> None:
    (photos / name).write_text(text)
    rows = rows_of(shards_of([str(photos / name)], photos.parent / "run"))
    assert [(row["name"], row["label"], row["task"]) for row in rows] == [
        ("a/1.png", "x", "birds"),
        ("b/1.png", "y", "food"),
    ]


def test_a_list_may_name_files_anywhere_by_absolute_paths_alone(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "list.csv"
    path.write_text(f"file\n{photos}/a/1.png\n{photos}/b/1.png\n")
    assert names_of(shards_of([str(path)], tmp_path / "run")) == [f"{photos}/a/1.png", f"{photos}/b/1.png"]
    path.write_text("file\n../photos/a/1.png\n")
    with pytest.raises(ValueError, match=r"list\.csv line 2: '\.\./photos/a/1\.png' lies outside of"):
        shards_of([str(path)], tmp_path / "run")


def test_the_column_split_divides_a_list_and_validation_is_left_out_beside_a_test_part(photos: Path) -> None:
    path = photos / "list.csv"
    path.write_text("file,split\na/1.png,train\nb/1.png,Validation\n")
    made = prepared(config(path), photos.parent / "run").data
    assert (names_of(made.train), names_of(made.test)) == (["a/1.png"], ["b/1.png"])
    path.write_text("file,split\na/1.png,train\nb/1.png,valid\nb/2.png,test\n")
    lines = list[str]()
    made = prepared(config(path), photos.parent / "run", log=lines.append).data
    assert (names_of(made.train), names_of(made.test)) == (["a/1.png"], ["b/2.png"])
    assert any(
        line.startswith("left out: 1 file, in valid, which neither trains nor tests (")
        and line.endswith("photos/b/1.png)")
        for line in lines
    )


@pytest.mark.parametrize(
    ("name", "text", "label_field", "message"),
    [
        ("list.csv", "photo\na/1.png\n", None, "no column 'file'; it has photo"),
        ("list.csv", "file\n", None, "no rows"),
        ("list.csv", "file,label\na/1.png,x\n", "breed", "no column 'breed'; it has file, label"),
        ("list.csv", "file,breed\na/1.png,\n", "breed", "column 'breed' names no label in any of 1 row"),
        ("list.csv", "file\na/9.png\n", None, "line 2: 'a/9.png' is not in"),
        ("list.jsonl", "[1]\n", None, "line 1: list; expected an object"),
        ("list.jsonl", '{"file": "a/1.png"\n', None, "line 1"),
        ("list.jsonl", '{"file": "a/1.png"}\n{"label": 1}\n', None, "line 2: 'file' is missing or empty"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_line_or_column(
    photos: Path, name: str, text: str, label_field: str | None, message: str
) -> None:
    (photos / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        shards_of([str(photos / name)], photos.parent / "run", label_field=label_field)


def test_all_that_is_left_out_is_listed_by_name_and_the_path_is_said_once(photos: Path, tmp_path: Path) -> None:
    for name in ("a/notes.txt", ".hidden/3.png", "c/video.mp4", "noname"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    lines = list[str]()
    prepared(config(photos), tmp_path / "run", log=lines.append)
    path = tmp_path / "run" / "left_out.csv"
    with path.open(newline="") as file:
        listed = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert listed == {
        f"{photos}/a/notes.txt": "of the suffix '.txt'",
        f"{photos}/.hidden/3.png": "hidden",
        f"{photos}/c/video.mp4": "of the suffix '.mp4'",
        f"{photos}/noname": "without a suffix",
    }
    assert sum(str(path) in line for line in lines) == 1
    for name in ("a/notes.txt", ".hidden/3.png", "c/video.mp4", "noname"):
        (photos / name).unlink()
    prepared(config(photos), tmp_path / "run")
    assert not path.exists()


def test_a_test_set_of_a_split_folder_is_its_test_part(photos: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", ["train/1.png", "test/2.png"])
    assert names_of(prepared(config(photos, other), tmp_path / "run").data.test) == ["test/2.png"]
    found = look(config(photos, other), tmp_path / "run")
    assert found.sizes == {"train": 4, "test": 1}
    assert tiny.files_below(photos)
