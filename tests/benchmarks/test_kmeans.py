"""The benchmark itself, on few rows: both sides do the same work. Nothing here looks at how long it took."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faiss_baselines import SUPER, kmeans_baselines, starting_rows
from benchmarks.harness import CAN_WATCH_MEMORY, drawn_rows, read_rows, squared_error, turns
from benchmarks.kmeans import KMeansFindings, KMeansSettings, as_json, as_text, measure_kmeans

ROWS, DIM, LABELS = 1200, 48, (4, 40)
HEADER = {"command": "bench.py"}


@pytest.fixture(scope="module")
def findings() -> KMeansFindings:
    settings = KMeansSettings(ROWS, DIM, LABELS, iterations=3, threads=1, init="both")
    return measure_kmeans(settings, lambda line: None)


def test_every_side_starts_from_the_same_centroids_and_ends_at_the_same_objective(findings: KMeansFindings) -> None:
    rows = drawn_rows(ROWS, DIM, 0)
    for found in findings.comparisons:
        initial = rows[starting_rows(ROWS, found.num_labels, 0)].astype(np.float64)
        start = np.square(rows[:, None] - initial[None]).sum(2).min(1).sum()
        assert [side.name for side in found.baselines] == list(kmeans_baselines())
        for side in (found.ours, *found.baselines):
            assert side.start == pytest.approx(start, rel=1e-4)
            assert side.objective == pytest.approx(found.ours.objective, rel=1e-3)
            assert side.objective < start
            assert 1 <= side.iterations <= 3


def test_ratios_and_memory_are_numbers(findings: KMeansFindings) -> None:
    written = json.loads(json.dumps(as_json(HEADER, findings)))
    for found in written["kmeans"]:
        for ratio in (*found["ratio"].values(), *found["cpu_ratio"].values(), found["ratio_to_faster_baseline"]):
            assert math.isfinite(ratio)
            assert ratio > 0
        assert 0 <= found["exact_share"] <= 1
    assert [(found["num_labels"], found["workers"]) for found in written["scaling"]] == [(40, 2)]
    assert math.isfinite(written["scaling"][0]["speedup"])
    for seeding in written["seeding"]:
        assert list(seeding["ways"]) == ["k-means++", "k-means||", "k-means++ of faiss"]
        best, *_, worst = sorted(drawn["objective"] for drawn in seeding["ways"].values())
        assert worst == pytest.approx(best, rel=0.5)
    if CAN_WATCH_MEMORY:
        assert written["memory"]["more_rows"] == 8 * written["memory"]["rows"] == 8 * ROWS


def test_the_table_ends_every_k_with_a_verdict(findings: KMeansFindings) -> None:
    text = as_text(HEADER, findings)
    assert "drawn: 1200 rows" in text
    for num_labels in LABELS:
        assert re.search(rf"^K={num_labels}: ours [\d.]+x the faster baseline \(faiss\.\w+\)$", text, re.MULTILINE)
    assert "!!" not in text


def test_the_pruning_baseline_refuses_other_centroids_than_its_own() -> None:
    if SUPER not in kmeans_baselines():
        pytest.skip("this faiss has no SuperKmeans")
    rows = drawn_rows(300, DIM, 0)
    with pytest.raises(ValueError, match="found other initial centroids"):
        kmeans_baselines()[SUPER](rows, rows[:5], 1, 0)


def test_the_objective_is_the_sum_over_rows_of_squared_distances() -> None:
    rows = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    centroids = np.array([[0, 0.5], [1, 1]], dtype=np.float32)
    assert squared_error(rows, centroids, np.array([1, 0, 1])) == 1 + 0.25 + 1


def test_drawn_rows_are_unit_rows_and_a_function_of_the_seed() -> None:
    rows = drawn_rows(500, DIM, 3)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(rows, drawn_rows(500, DIM, 3))
    assert not np.array_equal(rows, drawn_rows(500, DIM, 4))


def test_real_rows_are_read_in_order_without_those_that_are_zero(tmp_path: Path) -> None:
    rows = drawn_rows(9, DIM, 0)
    (tmp_path / "shard-0").mkdir()
    (tmp_path / "shard-1").mkdir()
    np.save(tmp_path / "shard-0" / "rows.npy", np.concatenate([rows[:4], np.zeros((1, DIM), np.float32)]))
    np.save(tmp_path / "shard-1" / "rows.npy", rows[4:])
    assert np.array_equal(read_rows(tmp_path, None)[0], rows)
    assert np.array_equal(read_rows(tmp_path, 6)[0], rows[:6])
    assert "real: 9 rows of 2 files" in read_rows(tmp_path, None)[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 4)), r"has \(3, 4\) float64, expected \(rows, dimensions\) float32"),
        (np.full((3, 4), 2, np.float32), "norm 4 to 4, expected 1"),
        (None, "not a readable .npy file"),
    ],
)
def test_unfit_files_are_refused_by_name(tmp_path: Path, rows: np.ndarray | None, message: str) -> None:
    path = tmp_path / "broken.npy"
    if rows is None:
        path.write_bytes(b"nonsense")
    else:
        np.save(path, rows)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, None)
    assert "broken.npy" in str(caught.value)


def test_rounds_alternate_so_that_drift_cancels() -> None:
    assert list(turns(["a", "b", "c"], 3)) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
