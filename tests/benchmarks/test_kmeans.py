"""The benchmark itself, on few rows: both sides do the same work. Nothing here looks at how long it took."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from benchmarks.faiss_baselines import SUPER, kmeans_baselines, starting_rows
from benchmarks.harness import CAN_WATCH_MEMORY, drawn_rows
from benchmarks.kmeans import KMeansFindings, KMeansSettings, as_json, as_text, measure_kmeans

ROWS, DIM, LABELS = 1200, 48, (4, 40)
HEADER = {"command": "bench.py"}


@pytest.fixture(scope="module")
def findings() -> KMeansFindings:
    settings = KMeansSettings(ROWS, DIM, LABELS, iterations=3, threads=1, init="both", centroid_shards=(1, 2))
    return measure_kmeans(settings, lambda line: None)


@pytest.mark.long
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


@pytest.mark.long
def test_ratios_and_memory_are_numbers(findings: KMeansFindings) -> None:
    written = json.loads(json.dumps(as_json(HEADER, findings)))
    for found in written["kmeans"]:
        for ratio in (*found["ratio"].values(), *found["cpu_ratio"].values(), found["ratio_to_faster_baseline"]):
            assert math.isfinite(ratio)
            assert ratio > 0
        assert 0 <= found["exact_share"] <= 1
    assert [(found["num_labels"], found["workers"]) for found in written["scaling"]] == [(40, 2)]
    assert math.isfinite(written["scaling"][0]["speedup"])
    assert [(found["num_labels"], found["slices"]) for found in written["sliced"]] == [(40, 1), (40, 2)]
    for seeding in written["seeding"]:
        assert list(seeding["ways"]) == ["k-means++", "k-means||", "k-means++ of faiss"]
        best, *_, worst = sorted(drawn["objective"] for drawn in seeding["ways"].values())
        assert worst == pytest.approx(best, rel=0.5)
    if CAN_WATCH_MEMORY:
        assert written["memory"]["more_rows"] == 8 * written["memory"]["rows"] == 8 * ROWS


@pytest.mark.long
def test_the_table_ends_every_k_with_a_verdict(findings: KMeansFindings) -> None:
    text = as_text(HEADER, findings)
    assert "drawn: 1200 rows" in text
    for num_labels in LABELS:
        assert re.search(rf"^K={num_labels}: ours [\d.]+x the faster baseline \(faiss\.\w+\)$", text, re.MULTILINE)
    assert "!!" not in text


def test_slices_that_workers_cannot_share_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match=r"^--centroid-shards must divide the 4 --workers, got 3$"):
        KMeansSettings(workers=4, centroid_shards=(2, 3)).check()


def test_the_pruning_baseline_refuses_other_centroids_than_its_own() -> None:
    if SUPER not in kmeans_baselines():
        pytest.skip("this faiss has no SuperKmeans")
    rows = drawn_rows(300, DIM, 0)
    with pytest.raises(ValueError, match="found other initial centroids"):
        kmeans_baselines()[SUPER](rows, rows[:5], 1, 0)
