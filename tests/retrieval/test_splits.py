"""Which images are queries, gallery and distractors; tasks and labels of both sides."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grappa_dist.retrieval.splits import Given, Hashed, Split, open_split
from tests.retrieval.photos import write_photos
from tests.stages import tiny


def listed(folder: Path, sides: list[str], column: str = "side") -> str:
    """A list of the photos with a column; its path."""
    names = write_photos(folder)
    with (folder / "list.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file", "label", column])
        lines.writerows([name, name.split("/")[0], side] for name, side in zip(names, sides * 12, strict=False))
    return str(folder / "list.csv")


def sides(split: Split) -> list[str]:
    return [
        f"{'q' * bool(query)}{'g' * bool(gallery)}"
        for query, gallery in zip(split.is_query, split.is_searched, strict=True)
    ]


def test_all_images_are_queries_and_gallery_where_nothing_divides_them(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    split = open_split(Given([str(tmp_path / "photos")]))
    assert (split.leave_one_out, split.distractors, sides(split)) == (True, None, ["qg"] * 12)


@pytest.mark.parametrize("column", ["side", "split"])
def test_a_column_divides_a_list_and_what_it_names_otherwise_is_left_out(tmp_path: Path, column: str) -> None:
    path = listed(tmp_path / "photos", ["query", "gallery", "train", "distractor"], column)
    split = open_split(Given([path]), split_column=column)
    assert sides(split) == ["q", "g", "", ""] * 3
    assert not split.leave_one_out
    assert split.distractors is not None
    assert [split.distractors.name(row) for row in range(3)] == [f"{c}/3.png" for c in ("anemone", "brücke\n", "cat")]
    assert next(iter(split.distractors.images([1]))) == (tmp_path / "photos" / "brücke\n" / "3.png").read_bytes()
    assert split.remarks == [f"3 images left out, as {column!r} is none of query, gallery and distractor: 'train' (3)"]


def test_a_key_divides_shards(tmp_path: Path) -> None:
    label = lambda row: "ab"[row % 2]  # noqa: E731
    paths = tiny.write_shards(
        tmp_path / "shards", (6,), bad=(), label=label, task=lambda row: ["query", "gallery"][row // 3]
    )
    split = open_split(Given([str(path) for path in paths]), split_column="task")
    assert sides(split) == ["q"] * 3 + ["g"] * 3


def test_two_folders_are_one_task_and_several_tasks_keep_their_names(tmp_path: Path) -> None:
    for name in ("asked", "shop"):
        write_photos(tmp_path / name)
    asked, shop = str(tmp_path / "asked"), str(tmp_path / "shop")
    split = open_split(Given(queries=[asked], gallery=[shop], distractors=[asked]))
    assert split.ground_truth.task_names == ["shop"]
    assert sides(split) == ["q"] * 12 + ["g"] * 12
    assert split.ground_truth.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] * 2
    assert [split.images.name(row) for row in (3, 23)] == ["anemone/3.png", "cat/3.png"]
    assert split.images.where(23).startswith(shop)
    assert len(split.distractors or ()) == 12
    several = open_split(Given(queries=[asked], gallery=[asked, shop]))
    assert several.ground_truth.task_names == ["asked", "shop"]


def test_files_are_hashed_when_they_are_read(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    (tmp_path / "photos" / "cat" / "copy.png").write_bytes((tmp_path / "photos" / "cat" / "0.png").read_bytes())
    images = open_split(Given([str(tmp_path / "photos")])).images
    assert isinstance(images, Hashed)
    list(images.images([8, 12]))
    assert images.hashes[8] == images.hashes[12] != 0
    assert images.hashes[0] == 0


@pytest.mark.parametrize(
    ("given", "column", "message"),
    [
        (Given(["a"], ["b"]), None, "--images makes every image a query .* --gallery-weights"),
        (Given(queries=["a"]), None, "--gallery is missing"),
        (Given(gallery=["a"]), None, "--queries is missing"),
        (Given(distractors=["a"]), None, "no images are given"),
        (Given(queries=["a"], gallery=["b"]), "side", "--split-column divides --images"),
    ],
)
def test_what_does_not_fit_together_is_refused(given: Given, column: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_split(given, split_column=column)


def test_a_column_that_is_not_there_or_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    path = listed(tmp_path / "photos", ["query", "train"])
    with pytest.raises(ValueError, match="is of the gallery side: the column has others, query; expected query and"):
        open_split(Given([path]), split_column="side")
    with pytest.raises(ValueError, match="no column 'sides'; it has file, label, side"):
        open_split(Given([path]), split_column="sides")
    with pytest.raises(ValueError, match=r"is a folder; expected a CSV or \.jsonl list with a column 'side'"):
        open_split(Given([str(tmp_path / "photos")]), split_column="side")
