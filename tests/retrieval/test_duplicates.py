"""Near-duplicates: by the definition, whatever the blocks; as a CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.data.decoding import BadImage
from grappa_dist.make_shards.exclusions import read_exclusions
from grappa_dist.retrieval import duplicates as module
from grappa_dist.retrieval.collection import Collection, Part
from grappa_dist.retrieval.duplicates import find_groups, find_leaks, group_duplicates
from grappa_dist.retrieval.odd_images import Sheet, describe_groups, describe_leaks, write_groups, write_leaks
from tests.stages import tiny

CPU = torch.device("cpu")


def circle(*degrees: float) -> np.ndarray:
    """Unit rows at some angles, so that cosines are those of their differences."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def reference(rows: np.ndarray, bad: set[int], threshold: float) -> list[int]:
    """Each row joins the nearest of the first rows before it, or is one."""
    firsts: list[int] = []
    whose = [-1] * len(rows)
    for row in (row for row in range(len(rows)) if row not in bad):
        near = [(float(rows[row] @ rows[first]), -first) for first in firsts]
        best = max(near, default=(-2.0, 0))
        whose[row] = -best[1] if best[0] >= threshold - 1e-6 else row
        firsts += [row] * (whose[row] == row)
    return whose


@pytest.mark.parametrize(("block", "chunk"), [(1, 1), (3, 2), (7, 5), (1000, 1000)])
def test_groups_are_those_of_the_definition_whatever_the_blocks(
    block: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    rows = circle(*rng.permutation(60) * 6.1 + rng.random(60))  # neighbours are about 6 degrees apart
    threshold, bad = float(np.cos(np.radians(10))), {4, 30}
    behind: list[int] = []
    firsts, cosines = group_duplicates([rows[:25], rows[25:]], bad, threshold, CPU, behind.append)
    assert firsts.tolist() == reference(rows, bad, threshold)
    joined = np.flatnonzero((firsts >= 0) & (firsts != np.arange(60)))
    np.testing.assert_allclose(cosines[joined], (rows[joined] * rows[firsts[joined]]).sum(1), atol=1e-6)
    assert len(joined) > 10
    assert behind[-1] == 60


def test_what_lies_between_two_images_does_not_join_them_to_one_group() -> None:
    firsts, _ = group_duplicates([circle(0, 8, 16, 24)], set(), float(np.cos(np.radians(10))), CPU)
    assert firsts.tolist() == [0, 0, 2, 2]


def test_equal_images_have_a_cosine_of_one_in_spite_of_rounding() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    firsts, _ = group_duplicates([rows, rows], set(), 1.0, CPU)
    assert firsts.tolist() == [*range(50), *range(50)]


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        group_duplicates([circle(0, 1)], set(), threshold, CPU)


def collection(names: list[str], degrees: list[float], bad: dict[int, str]) -> Collection:
    rows = circle(*degrees)
    rows[list(bad)] = 0
    return Collection((Part(rows, bad, lambda: names, lambda row: b""),))


def test_groups_come_as_a_csv_with_names_as_they_are(tmp_path: Path) -> None:
    names = ["a.png", "bad.png", 'b,"\n.png', "c.png", "brücke.png", "d.png"]
    found = collection(names, [0, 0, 90, 0.5, 91, 200], {1: "empty file"})
    groups = find_groups(found, 0.98, CPU, Console())
    write_groups(tmp_path / "groups.csv", groups.groups)
    with (tmp_path / "groups.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert [[*line[:2], line[3]] for line in lines] == [
        ["group", "name", "drop"],
        ["1", "a.png", "0"],
        ["1", "c.png", "1"],
        ["2", 'b,"\n.png', "0"],
        ["2", "brücke.png", "1"],
    ]
    excluded = read_exclusions([str(tmp_path / "groups.csv")]).among(((name,) for name in names), "train")
    assert excluded.rows.tolist() == [3, 4]
    assert excluded.matched.all()
    assert [float(line[2]) for line in lines[1:]] == pytest.approx(
        [1, np.cos(np.radians(0.5)), 1, np.cos(np.radians(1))]
    )
    assert describe_groups(groups, found, 0.98) == (
        "2 groups of near-duplicates among 5 images; without them, 3 images are left (cosine 0.98 or more)"
    )


@pytest.mark.parametrize(
    ("degrees", "bad", "count"), [([0.0], {}, "1 image"), ([0.0, 1.0], {0: "", 1: ""}, "0 images")]
)
def test_one_image_or_none_that_can_be_read_has_no_duplicates(
    degrees: list[float], bad: dict[int, str], count: str
) -> None:
    found = collection(["a"] * len(degrees), degrees, bad)
    groups = find_groups(found, 0.5, CPU, Console())
    assert describe_groups(groups, found, 0.5) == (
        f"no near-duplicates among {count}: no two have a cosine of 0.5 or more"
    )


def test_leaks_are_the_images_that_nearly_are_test_images_each_with_the_nearest(tmp_path: Path) -> None:
    train = collection(["a", "b", "bad", "c", "d"], [0, 90, 0, 181, 0.4], {2: "empty file"})
    test = collection(["x", "y", "z", "none"], [180, 0.3, 45, 90], {3: "empty file"})
    leaks = find_leaks(train, test, 0.98, CPU, Console())
    assert [(leak.name, leak.test_name) for leak in leaks] == [("d", "y"), ("a", "y"), ("c", "x")]
    assert leaks[2].cosine == pytest.approx(np.cos(np.radians(1)))
    assert describe_leaks(leaks, train, test, 0.98) == (
        "3 of 4 images nearly are test images: 2 of 3 test images (cosine 0.98 or more)"
    )
    write_leaks(tmp_path / "leaks.csv", leaks)
    lists = read_exclusions([str(tmp_path / "leaks.csv")])
    assert lists.among((("a",), ("b",), ("c",)), "train").rows.tolist() == [0, 2]
    assert lists.among((("a",), ("b",), ("c",)), "test").rows.tolist() == []  # they are dropped where they train


def test_embeddings_of_two_models_have_no_leaks() -> None:
    wide = Collection((Part(np.eye(3, dtype=np.float32), {}, lambda: ["a", "b", "c"], lambda row: b""),))
    with pytest.raises(ValueError, match="embeddings have 2 and 3 channels; expected those of one model"):
        find_leaks(collection(["a"], [0], {}), wide, 0.9, CPU, Console())


@pytest.mark.parametrize("suffix", ["html", "jpg"])
def test_a_sheet_shows_the_largest_groups_and_says_how_many_there_are(tmp_path: Path, suffix: str) -> None:
    degrees = [angle for start in range(0, 350, 8) for angle in ([start] * (9 if start == 80 else 2))]
    names = [f"<{number}>.png" for number in range(len(degrees))]
    parts = (Part(circle(*degrees), {}, lambda: names, lambda row: BadImage("gone") if row else tiny.picture(row)),)
    groups = find_groups(Collection(parts), 0.999, CPU, Console())
    assert len(groups.groups) == 44
    path = tmp_path / f"sheet.{suffix}"
    assert Sheet(Collection(parts), groups.groups).draw(path)
    assert not Sheet(Collection(parts)).draw(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()
    if suffix == "html":
        page = path.read_text()
        assert page.index(
            "group 11: 9 images, 8 of them shown (the first 40 of 44 groups, the largest first"
        ) < page.index("group 1: 2 images")
        assert page.count("<section>") == 40
        assert "&lt;0&gt;.png" in page
        assert "<0>" not in page
