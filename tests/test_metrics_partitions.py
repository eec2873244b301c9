from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest

from grappa_dist.metrics import chance_nestedness, nestedness


def naive(coarse: Sequence[int], fine: Sequence[int]) -> float:
    """Fine cluster by fine cluster: its most frequent coarse label, counted."""
    rows = [i for i in range(len(fine)) if coarse[i] >= 0 and fine[i] >= 0]
    agree = 0
    for cluster in {fine[i] for i in rows}:
        own = [coarse[i] for i in rows if fine[i] == cluster]
        agree += max(own.count(label) for label in own)
    return agree / len(rows)


def labels(num: int, clusters: int, seed: int) -> np.ndarray:
    """Random labels, some of them -1."""
    return np.random.default_rng(seed).integers(-1, clusters, num).astype(np.int32)


@pytest.mark.parametrize(("num", "coarse", "fine"), [(9, 1, 1), (40, 3, 7), (60, 60, 2), (50, 1, 50), (200, 5, 1000)])
def test_nestedness_equals_counting_cluster_by_cluster(num: int, coarse: int, fine: int) -> None:
    a, b = labels(num, coarse, 0), labels(num, fine, 1)
    assert nestedness(a, b) == naive(a.tolist(), b.tolist())


def test_a_refinement_is_perfectly_nested_but_not_the_other_way_round() -> None:
    fine = np.arange(64) % 16
    assert nestedness(fine // 4, fine) == 1.0
    assert nestedness(fine, fine // 4) == 0.25


def test_two_halves_across_two_halves_agree_on_half_of_the_rows() -> None:
    assert nestedness(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == 0.5


@pytest.mark.parametrize("coarse", [[0], [7], [2**31 - 1]])
def test_one_row_is_nested(coarse: list[int]) -> None:
    assert nestedness(np.array(coarse), np.array([2**31 - 1])) == 1.0


def test_singletons_are_nested_in_anything_and_by_chance_as_well() -> None:
    coarse, fine = labels(30, 4, 0), np.arange(30)
    assert nestedness(coarse, fine) == 1.0
    assert chance_nestedness(coarse, fine, np.random.default_rng(0), 3) == 1.0


def test_anything_is_nested_in_a_single_cluster() -> None:
    fine = labels(30, 4, 0)
    assert nestedness(np.zeros(30, np.int32), fine) == 1.0
    assert chance_nestedness(np.zeros(30, np.int32), fine, np.random.default_rng(0), 3) == 1.0


def test_within_one_fine_cluster_the_largest_coarse_one_counts() -> None:
    coarse, fine = np.array([0, 1, 1, 2, 1, -1, -1, -1, -1]), np.zeros(9, np.int32)
    assert nestedness(coarse, fine) == 3 / 5
    assert chance_nestedness(coarse, fine, np.random.default_rng(0), 3) == pytest.approx(3 / 5)


def test_rows_without_a_label_are_left_out() -> None:
    coarse, fine = np.array([0, 0, 1, -1, 5]), np.array([0, 0, 1, 0, -1])
    assert nestedness(coarse, fine) == 1.0
    assert chance_nestedness(coarse, fine, np.random.default_rng(0), 50) == pytest.approx(7 / 9, abs=0.1)


def test_without_any_label_there_is_no_nestedness() -> None:
    nothing = np.full(3, -1)
    assert math.isnan(nestedness(nothing, np.arange(3)))
    assert math.isnan(nestedness(np.empty(0, np.int32), np.empty(0, np.int32)))
    assert math.isnan(chance_nestedness(nothing, nothing, np.random.default_rng(0), 2))


def test_chance_is_the_mean_over_all_ways_to_place_the_coarse_labels() -> None:
    coarse, fine = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    exact = (2 * 1.0 + 4 * 0.5) / 6  # of six placements two keep the pairs together
    assert chance_nestedness(coarse, fine, np.random.default_rng(0), 2000) == pytest.approx(exact, abs=0.03)


def test_unrelated_partitions_are_as_nested_as_chance() -> None:
    a, b = labels(20_000, 16, 0), labels(20_000, 64, 1)
    assert nestedness(a, b) == pytest.approx(chance_nestedness(a, b, np.random.default_rng(0), 4), abs=0.005)


def test_a_million_rows_take_a_second_or_two() -> None:
    a, b = labels(1_000_000, 4096, 0), labels(1_000_000, 65_536, 1)
    began = time.process_time()  # of this process: others may keep the machine busy
    nestedness(a, b)
    assert time.process_time() - began < 5.0
