"""What trains, what tests, and what is said of it; columns and splits that are asked for are there, or refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards.cli import main
from tests.stages import tiny


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(14):
        path = folder / f"class {number // 2:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.picture(number))
    return folder


def run(images: Path, *options: str, text: str | None = None) -> tuple[int, Path]:
    """Exit status and output of make_shards for the images, with a CSV of this text."""
    out, where = images.parent / "out", list[str]()
    if text is not None:
        (images.parent / "list.csv").write_text(text)
        where = ["--csv", str(images.parent / "list.csv")]
    return main(["--images", str(images), *where, "--out", str(out), "--workers", "1", *options]), out


LISTED = "file,breed,split,empty,dataset\n" + "".join(
    f"class {number // 2:02d}/{number}.png,b{number},{'train' if number % 2 else 'Validation'},,t\n"
    for number in range(14)
)


def test_all_images_test_where_the_split_is_test(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(images, "--split", "test")
    shards = ImageShards.open([out / "test"], None)
    assert (status, len(shards), (out / "train").exists()) == (0, 14, False)
    assert (shards.labels(13) or {})["label"] == "class 06"


def test_which_classes_train_and_test_is_said_and_all_are_in_a_file_where_they_are_many(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run(images, "--split", "test")
    said = capsys.readouterr().err
    assert "classes that test: 7 (class 00, class 01, class 02, class 03, class 04, ...)" in said
    assert f"all classes: {out / 'classes.csv'}" in said
    rows = list(csv.reader((out / "classes.csv").open(newline="")))
    assert rows[:2] == [["side", "task", "class", "images"], ["test", "images", "class 00", "2"]]
    assert len(rows) == 8


def test_a_few_classes_are_all_said_and_in_no_file(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6, 14):
        (images / f"class {number // 2:02d}" / f"{number}.png").unlink()
    _, out = run(images)
    said = capsys.readouterr().err
    assert "classes that train: 2 (class 00, class 01)\n" in said
    assert "classes that test: 1 (class 02)\n" in said
    assert not (out / "classes.csv").exists()


@pytest.mark.parametrize("names", [("val", "test"), ("Valid", "testing"), ("validation", "eval")])
def test_a_split_column_says_val_as_folders_do(
    images: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    val, test = names
    text = f"file,fine,dataset,split\nclass 00/0.png,x,t,train\nclass 00/1.png,x,t,{val}\nclass 01/2.png,x,t,{test}\n"
    status, out = run(images, "--split", "column", text=text)
    assert (status, len(ImageShards.open([out / "test"], None))) == (0, 1)
    assert f"left out: 1 file, in {val}, which neither trains nor tests (class 00/1.png)" in capsys.readouterr().err
    assert (out / "left_out.csv").read_text() == (
        f'file,reason\nclass 00/1.png,"in {val}, which neither trains nor tests"\n'
    )


def test_val_tests_where_nothing_else_does_and_labels_may_be_said_to_be_none(images: Path) -> None:
    status, out = run(images, "--split", "column", "--label-column", "breed", text=LISTED)
    assert (status, len(ImageShards.open([out / "test"], None))) == (0, 7)
    status, _ = run(
        images, "--split", "column", "--label-column", "", "--out", str(images.parent / "plain"), text=LISTED
    )
    assert status == 0
    assert (ImageShards.open([images.parent / "plain" / "test"], None).labels(0) or {})["label"] is None


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (["--split", "column"], LISTED, "no column 'fine'; it has file, breed, split, empty, dataset (--label-column"),
        (["--split", "column", "--label-column", "bred"], LISTED, "no column 'bred'; it has file, breed"),
        (["--split", "column", "--label-column", "empty"], LISTED, "column 'empty' names no label in any of 14 rows"),
        (["--split", "none", "--label-column", "empty"], LISTED, "column 'empty' names no label in any of 14 rows"),
        (["--split", "none", "--task-column", "kind"], LISTED, "no column 'kind'; it has file"),
        (["--split", "none", "--task-column", "empty"], LISTED, "column 'empty' is empty"),
        (["--label-column", "breed"], None, "breed: a column, and there is no CSV to have it"),
        (["--task-column", "breed"], None, "breed: a column, and there is no CSV to have it"),
        (["--task-column", "dataset", "--task", "t"], LISTED, "task_column=dataset and task=t; expected one of them"),
        (["--label-column", ""], LISTED, "label_column is empty, but classes are divided by labels"),
        (
            ["--split", "column"],
            LISTED.replace("breed", "fine").replace("Validation", "holdout"),
            "split is 'holdout'; ex",
        ),
    ],
)
def test_a_column_that_is_asked_for_and_not_there_or_empty_is_refused_before_anything_is_written(
    images: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str | None, message: str
) -> None:
    status, out = run(images, *options, text=text)
    assert (status, out.exists()) == (2, False)
    assert message in capsys.readouterr().err
