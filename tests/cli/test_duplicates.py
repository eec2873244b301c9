"""`grappa-dist duplicates` on a folder and on embeddings, which need no model."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from grappa_dist import pipeline
from grappa_dist.cli.duplicates import command
from grappa_dist.config import CONFIG_FILE, Config
from tests.cli.calling import called
from tests.retrieval.photos import model_in, write_photos
from tests.stages import tiny
from tests.stages.test_exclude import write_shards


def test_copies_are_one_group_in_the_csv_and_embeddings_need_no_model(tmp_path: Path) -> None:
    photos, keep, out = tmp_path / "photos", str(tmp_path / "keep"), tmp_path / "groups.csv"
    write_photos(photos, bad=("cat/1.png",))
    shutil.copyfile(photos / "cat" / "0.png", photos / "cat" / "copy\n.png")
    given = ["--images", str(photos), "--threshold", "0.999999", "--out", str(out)]
    first = called(command, "--model", model_in(tmp_path / "run"), "--keep", keep, *given)
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].startswith("1 group of near-duplicates among 12 images; without them, 11 images are left")
    assert lines[1] == f"groups  {out}"
    assert lines[2] == "left out: 1 of 13 images could not be read"
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))
    assert [line[:2] for line in found[1:]] == [["1", "cat/0.png"], ["1", "cat/copy\n.png"]]
    again = called(command, "--images", keep, "--threshold", "0.999999", "--out", str(out))
    assert again.out == first.out
    assert called(command, *given).err.endswith("images need a model that embeds them: --model (embeddings need none)")


def test_leaks_and_outliers_are_listed_without_groups_unless_these_are_asked_for(tmp_path: Path) -> None:
    train, test, lists = tmp_path / "train", tmp_path / "test", tmp_path / "lists"
    write_photos(train)
    (test / "cat").mkdir(parents=True)
    shutil.copyfile(train / "cat" / "2.png", test / "cat" / "copy.png")
    lists.mkdir()
    given = ["--model", model_in(tmp_path / "run"), "--images", str(train), "--across", str(test)]
    more = ["--leaks", str(lists / "leaks.csv"), "--outliers", str(lists / "outliers.csv"), "--most-outliers", "3"]
    sheet = str(lists / "sheet.html")
    found = called(command, *given, *more, "--sheet", sheet, "--threshold", "0.999999")
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert lines[0] == "1 of 12 images nearly is a test image: 1 of 1 test image (cosine 0.999999 or more)"
    assert lines[1] == f"leaks   {lists / 'leaks.csv'}"
    assert lines[2].startswith("3 outliers: 1 - the mean cosine with the nearest others is ")
    assert lines[4] == f"sheet   {sheet}"
    with (lists / "leaks.csv").open(newline="") as file:
        assert [(line["name"], line["test_name"]) for line in csv.DictReader(file)] == [("cat/2.png", "cat/copy.png")]
    with (lists / "outliers.csv").open(newline="") as file:
        scores = [float(line["score"]) for line in csv.DictReader(file)]
    assert scores == sorted(scores, reverse=True)
    page = (lists / "sheet.html").read_text()
    assert all(text in page for text in ("leak 1", "cat/copy.png", "outliers, the farthest first"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "expected images by --images, or --run with a run directory"),
        (["--images", "x", "--run", "y"], "expected images by --images, or --run with a run directory"),
        (["--run", "x", "--across", "y"], "--across is for --images; a run has its images and their features"),
        (["--run", "x", "embed.batch_size=3"], "embed.batch_size=3 is for --images"),
        (["--images", "x", "--sheet", "sheet.txt"], "expected a name that ends in"),
        (["--images", "x", "--threshold", "0"], "threshold must lie in (0, 1]"),
    ],
)
def test_words_that_do_not_go_together_are_refused_before_anything_is_read(words: list[str], why: str) -> None:
    found = called(command, *words)
    assert found.status == 2
    assert why in found.err


def settings_of(shards: list[str], *lists: Path, **data: Any) -> Config:
    return tiny.config(
        shards[:3],
        data={"exclude": tuple(map(str, lists)), "test": tuple(shards[3:]), **data},
        clustering={"num_labels": (4,)},
        adapt={"epochs": 1},
    )


def finish(settings: Config, root: Path, workers: int = 2) -> None:
    """A run to its end, with its settings in its directory."""
    pipeline.run_in(tiny.run_in(settings, root, tiny.Here(num_workers=workers)))
    (root / CONFIG_FILE).write_text(settings.yaml())


def content_of(root: Path) -> dict[str, bytes]:
    """The files that a run makes, without those that have times."""
    timed = ("manifest.json", "metrics.jsonl")
    kinds = ("features", "labels", "adaptors", "scores", "insight", "excluded")
    paths = (path for kind in kinds for path in (root / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.name not in timed}


@pytest.mark.long
def test_what_the_command_lists_of_a_run_takes_no_part_in_the_next_on_any_number_of_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "images")  # whose copies lie in other shards, one of them in the test shard
    first, lists = tmp_path / "first", [tmp_path / "groups.csv", tmp_path / "leaks.csv"]
    finish(settings_of(shards), first)
    given = ["--run", str(first), "--threshold", "0.9999999", "--out", str(lists[0]), "--leaks", str(lists[1])]
    found = called(command, *given, "--sheet", str(tmp_path / "sheet.jpg"))
    assert found.status == 0, found.err
    assert found.out.startswith("2 groups of near-duplicates among 30 images; without them, 27 images are left")
    assert "3 of 30 images nearly are test images: 1 of 9 test images" in found.out  # 0, 12 and 14 are 38, which tests
    for workers in (1, 2):
        finish(settings_of(shards, *lists, duplicates="weigh"), tmp_path / str(workers), workers)
    one, two = (content_of(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two
    page = (tmp_path / "2" / "report" / "report.html").read_text()
    assert "4 of 31 training images excluded (3 near-duplicate, 1 near a test image)" in page
    assert "1 near-duplicate took turns with the first image of its group, one in an epoch" in page
    again = called(command, "--run", str(tmp_path / "2"), *given[2:6])
    assert again.status == 0, again.err
    assert again.out.splitlines()[:2] == found.out.splitlines()[:2]  # features are kept, so the list is whole again
