from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.metrics import nestedness
from grappa_dist.stages import partitions
from grappa_dist.stages.partitions import partition_statistics, partitions_of
from tests.stages import tiny

SIZES = (5, 1, 20, 14)
NUM = sum(SIZES)


def label_files(root: Path, by_k: Mapping[int, Sequence[int]]) -> dict[int, RowArrays]:
    """Labels of all rows of shards of uneven size."""
    starts = np.cumsum([0, *SIZES])
    files = {}
    for k, values in by_k.items():
        paths = [str(root / f"k{k}-{i}.npy") for i in range(len(SIZES))]
        for path, part in zip(paths, np.split(np.array(values, np.int32), starts[1:-1]), strict=True):
            np.save(path, part)
        files[k] = RowArrays(tuple(paths), tuple(starts.tolist()))
    return files


def named(store: Store, ks: Sequence[int], seed: int = 0) -> Artifact:
    return partitions_of(store, seed, {k: store.artifact(f"labels/k={k}", {}, {}) for k in ks})


def statistics(root: Path, by_k: Mapping[int, Sequence[int]], seed: int = 0) -> dict[str, Any]:
    run = tiny.run_in(tiny.config(["nowhere"]), root, tiny.Here())
    artifact = named(run.store, list(by_k), seed)
    partition_statistics(run, artifact, label_files(root, by_k))
    found: dict[str, Any] = json.loads((artifact.path / "partitions.json").read_text())
    return found


BAD = 17
LABELS = {  # out of order, as a config may be
    8: [-1 if row == BAD else row * row % 8 for row in range(NUM)],
    2: [-1 if row == BAD else row % 2 for row in range(NUM)],
    40: [-1 if row == BAD else row for row in range(NUM)],
}


def test_consecutive_partitions_are_compared_from_coarse_to_fine(tmp_path: Path) -> None:
    nestings = statistics(tmp_path, LABELS)["nestings"]
    assert [(n["coarse"], n["fine"], n["rows"], n["of"]) for n in nestings] == [(2, 8, 40, 40), (8, 40, 40, 40)]
    assert [n["nestedness"] for n in nestings] == [1.0, 1.0]
    assert nestings[0]["chance"] < 0.9
    assert nestings[1]["chance"] == 1.0  # of singletons


def test_each_sample_cluster_shows_rows_of_its_own_in_order(tmp_path: Path) -> None:
    for sheet in statistics(tmp_path, LABELS)["sheets"]:
        values = LABELS[sheet["k"]]
        labels = [cluster["label"] for cluster in sheet["clusters"]]
        assert len(labels) == len(set(labels)) == min(4, len({*values} - {-1}))
        for cluster in sheet["clusters"]:
            assert cluster["size"] == values.count(cluster["label"])
            assert len(cluster["rows"]) == min(6, cluster["size"])
            assert cluster["rows"] == sorted(set(cluster["rows"]))
            assert {values[row] for row in cluster["rows"]} == {cluster["label"]}


def test_the_first_clusters_are_the_largest_and_the_one_of_median_size(tmp_path: Path) -> None:
    sizes = {3: 15, 0: 11, 4: 7, 1: 4, 6: 3}  # 2 and 5 are empty
    values = [label for label, size in sizes.items() for _ in range(size)]
    (sheet,) = statistics(tmp_path, {7: values})["sheets"]
    assert [(c["pick"], c["label"]) for c in sheet["clusters"][:2]] == [("largest", 3), ("median", 4)]
    assert [c["pick"] for c in sheet["clusters"][2:]] == ["drawn", "drawn"]
    assert {c["label"] for c in sheet["clusters"][2:]} < {0, 1, 6}


@pytest.mark.parametrize(("k", "picks"), [(1, ["largest"]), (2, ["largest", "median"])])
def test_one_partition_of_few_clusters_is_shown_whole(tmp_path: Path, k: int, picks: list[str]) -> None:
    found = statistics(tmp_path, {k: [row % k for row in range(NUM)]})
    assert found["nestings"] == []
    assert [c["pick"] for c in found["sheets"][0]["clusters"]] == picks


def test_a_partition_without_any_label_has_no_sample_clusters(tmp_path: Path) -> None:
    assert statistics(tmp_path, {3: [-1] * NUM})["sheets"] == [{"k": 3, "clusters": []}]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in "abc"]
    for root in roots:
        root.mkdir()
    same, again, other = (statistics(root, LABELS, seed) for root, seed in zip(roots, (0, 0, 1), strict=True))
    assert same == again
    assert same["sheets"] != other["sheets"]


def test_of_more_rows_than_allowed_a_sample_is_compared_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "MOST_ROWS", 16)
    compared: list[np.ndarray] = []

    def watched(coarse: np.ndarray, fine: np.ndarray) -> float:
        compared.extend((coarse, fine))
        return nestedness(coarse, fine)

    monkeypatch.setattr(partitions, "nestedness", watched)
    nestings = statistics(tmp_path, {k: [row // (60 // k) for row in range(NUM)] for k in (20, 30, 60)})["nestings"]
    assert [(n["rows"], n["of"]) for n in nestings] == [(16, 40)] * 2
    rows = compared[3]  # with K = 60 a label is the row
    assert len(set(rows.tolist())) == 16
    for found, k in zip(compared, (20, 30, 30, 60), strict=True):  # the same rows for every K
        assert found.tolist() == (rows // (60 // k)).tolist()


def test_statistics_are_computed_once(tmp_path: Path) -> None:
    here = tiny.Here()
    run = tiny.run_in(tiny.config(["nowhere"]), tmp_path, here)
    files, artifact = label_files(tmp_path, LABELS), named(run.store, list(LABELS))
    for _ in range(2):
        partition_statistics(run, artifact, files)
    assert here.asked == ["compute_statistics"]
    artifact.check()


def test_the_name_depends_on_every_partition_and_on_the_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert named(store, (2, 4)) == named(store, (2, 4))
    assert len({named(store, ks, seed).name for ks, seed in (((2, 4), 0), ((2, 4), 1), ((2,), 0), ((2, 4, 8), 0))}) == 4
