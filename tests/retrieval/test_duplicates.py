"""Near-duplicates: by the definition, whatever the blocks; as a CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.retrieval import duplicates as module
from grappa_dist.retrieval.collection import Collection, Part
from grappa_dist.retrieval.duplicates import describe_groups, find_groups, group_duplicates, write_groups

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
    write_groups(tmp_path / "groups.csv", groups)
    with (tmp_path / "groups.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert [line[:2] for line in lines] == [
        ["group", "name"],
        ["1", "a.png"],
        ["1", "c.png"],
        ["2", 'b,"\n.png'],
        ["2", "brücke.png"],
    ]
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
