"""Folders called train, val or test hold the parts of a data set, not images of classes of these names."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from grappa_dist.make_shards.class_folders import part_of
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards

CLASSES = ("cat", "dog", "owl")


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def below(*parts: str, classes: Sequence[str] = CLASSES) -> list[str]:
    return [f"{half}/{label}/{number}.jpg" for half in parts for label in classes for number in range(2)]


def made(images: Path, out: Path, split: str | None = None) -> tuple[dict[str, list[tuple[str, str | None]]], str]:
    """(name, label) of the images by folder of shards, and what was logged."""
    logged: list[str] = []
    make_shards([(None, str(images))], out, CollectionConfig(split=split), Work(1, logged.append))  # type: ignore[arg-type]
    found: dict[str, list[tuple[str, str | None]]] = {}
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            members = [json.load(tar.extractfile(m)) for m in tar.getmembers() if m.name.endswith(".json")]  # type: ignore[arg-type]
        found.setdefault(path.parent.name, []).extend((member["name"], member["label"]) for member in members)
    return {half: sorted(rows) for half, rows in found.items()}, "\n".join(logged)


def expected(names: Sequence[str]) -> list[tuple[str, str | None]]:
    return sorted((name, name.split("/")[1]) for name in names)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("train", "validation"),
        ("training", "test"),
        ("Train", "VAL"),
        ("TRAIN", "Testing"),
        ("train2017", "val2017"),
        ("train_set", "test_set"),
        ("train", "dev"),
    ],
)
def test_folders_of_a_split_train_and_test_and_classes_are_below_them(tmp_path: Path, train: str, test: str) -> None:
    rows, logged = made(write(tmp_path / "data", *below(train, test)), tmp_path / "out")
    assert rows == {"train": expected(below(train)), "test": expected(below(test))}
    assert f"taken as a split: {train}/ train, {test}/ test; the folders below are the classes" in logged


def test_images_that_lie_directly_in_train_and_test_have_no_label(tmp_path: Path) -> None:
    rows, logged = made(write(tmp_path / "data", "train/1.jpg", "train/2.jpg", "test/3.jpg"), tmp_path / "out")
    assert rows == {"train": [("train/1.jpg", None), ("train/2.jpg", None)], "test": [("test/3.jpg", None)]}
    assert "so no labels" in logged


def test_one_part_may_have_classes_and_the_other_none(tmp_path: Path) -> None:
    rows, _ = made(write(tmp_path / "data", *below("train"), "test/3.jpg", "test/4.jpg"), tmp_path / "out")
    assert rows == {"train": expected(below("train")), "test": [("test/3.jpg", None), ("test/4.jpg", None)]}


def test_a_folder_that_all_images_share_below_the_split_is_no_class(tmp_path: Path) -> None:
    rows, _ = made(write(tmp_path / "data", "train/images/1.jpg", "val/images/2.jpg"), tmp_path / "out")
    assert rows == {"train": [("train/images/1.jpg", None)], "test": [("val/images/2.jpg", None)]}


def test_with_train_val_and_test_val_is_left_out_and_counted(tmp_path: Path) -> None:
    rows, logged = made(write(tmp_path / "data", *below("train", "val", "test")), tmp_path / "out")
    assert rows == {"train": expected(below("train")), "test": expected(below("test"))}
    assert "left out: val/" in logged
    assert "left out: 6 files, in val/" in logged


def test_the_folders_of_a_tar_are_read_likewise(tmp_path: Path) -> None:
    data = write(tmp_path / "data", *below("train", "val"))
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(data, ".")
    rows, _ = made(tmp_path / "data.tar", tmp_path / "out")
    assert rows == {"train": expected(below("train")), "test": expected(below("val"))}


def test_classes_that_are_really_called_so_are_taken_by_an_option(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "train/1.jpg", "test/2.jpg")
    assert made(data, tmp_path / "out", "classes")[0] == {
        "train": [("test/2.jpg", "test")],
        "test": [("train/1.jpg", "train")],
    }


@pytest.mark.parametrize("names", [("bus/1.jpg", "train/2.jpg", "car/3.jpg"), ("test/1.jpg", "rest/2.jpg")])
def test_a_class_among_others_stays_a_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    rows, logged = made(write(tmp_path / "data", *names), tmp_path / "out")
    assert sorted(label or "" for half in rows.values() for _, label in half) == sorted(n.split("/")[0] for n in names)
    assert "split" not in logged


def test_a_split_within_the_classes_is_not_taken_and_it_is_said(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg")
    rows, logged = made(data, tmp_path / "out")
    assert [label for _, label in rows["train"]] == ["cat", "cat"]
    assert "in the class folders lie test/, train/, which is not taken as a split" in logged
    assert "not taken" not in made(data, tmp_path / "none", "none")[1]


def test_without_a_split_all_images_train_and_the_classes_are_still_below(tmp_path: Path) -> None:
    data = write(tmp_path / "data", *below("train", "val"))
    assert made(data, tmp_path / "out", "none")[0] == {"train": expected(below("train", "val"))}
    write(data, "extra/1.jpg")
    more = sorted([*expected(below("train", "val")), ("extra/1.jpg", None)], key=lambda row: row[0])
    assert made(data, tmp_path / "more", "none")[0] == {"train": more}


def test_other_folders_beside_a_split_are_left_out_by_wish(tmp_path: Path) -> None:
    data = write(tmp_path / "data", *below("train", "val"), "figures/1.jpg")
    rows, logged = made(data, tmp_path / "out", "folders")
    assert rows == {"train": expected(below("train")), "test": expected(below("val"))}
    assert "left out: 1 file, in figures/" in logged


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (below("train"), None, "holds only train/, which looks like one part of a split; name .*data/train "),
        (below("val", "test"), None, "holds only test/, val/, which looks like one part"),
        (
            [*below("train", "val"), "figures/1.jpg"],
            None,
            "and also figures/; give --split folders .* or --split class",
        ),
        ([*below("train", "val"), "1.jpg"], None, "and also images in no folder; give --split folders"),
        ([*below("train"), "figures/1.jpg"], None, "holds train/ and also figures/; give --split folders"),
        ([*below("train", "val"), "val/1.jpg"], None, r"'val/1\.jpg' lies in no class folder, others in val/ do"),
        (below("cat", "dog"), "folders", "expects a folder train and one of val, .* found cat/, dog/"),
        (below("wrapper/train", "wrapper/val"), None, r"one class folder, 'wrapper'; .* \(name that folder"),
    ],
)
def test_what_leaves_open_what_is_meant_is_refused_with_what_to_write(
    tmp_path: Path, names: list[str], split: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(write(tmp_path / "data", *names), tmp_path / "out", split)
    assert not (tmp_path / "out").exists()


def test_parts_that_are_named_one_by_one_are_no_tasks(tmp_path: Path) -> None:
    data = write(tmp_path / "data", *below("train", "val"))
    pairs = [(None, str(data / "train")), (None, str(data / "val"))]
    with pytest.raises(ValueError, match="would be two tasks, but look like parts of one data set"):
        make_shards(pairs, tmp_path / "out", CollectionConfig(), Work())
    make_shards(pairs, tmp_path / "out", CollectionConfig(task="animals"), Work())


def test_folders_of_the_system_and_of_other_programs_hold_no_images(tmp_path: Path) -> None:
    foreign = ("@eaDir/1.jpg/THUMB.jpg", "__MACOSX/cat/._1.jpg", "cat/@eaDir/1.jpg/S.jpg", "$RECYCLE.BIN/2.jpg")
    hidden = ("cat/._1.jpg", ".Trash/3.jpg", "dog/.nfs0001.jpg", "cat/Thumbs.db", ".DS_Store")
    rows, logged = made(write(tmp_path / "data", "cat/1.jpg", "dog/2.jpg", *foreign, *hidden), tmp_path / "out")
    assert rows == {"train": [("cat/1.jpg", "cat")], "test": [("dog/2.jpg", "dog")]}
    assert "left out: 3 files, in a folder of the system or of another program" in logged


@pytest.mark.parametrize("name", ["cat", "trains", "trainer", "test tube", "value", "devil", "", "evaluate", "attest"])
def test_other_names_are_no_parts(name: str) -> None:
    assert part_of(name) is None
