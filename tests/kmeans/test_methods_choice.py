from __future__ import annotations

from typing import Any

import pytest

from grappa_dist.config import ClusteringConfig
from grappa_dist.console import format_number
from grappa_dist.kmeans.methods import PAIRS, PLUS_PLUS_LABELS, Choice, choose, fit_pairs


def chosen(rows: int, labels: int, **settings: Any) -> Choice:
    return choose(ClusteringConfig(**settings), labels, rows)


@pytest.mark.parametrize(
    ("rows", "labels", "name", "assignment"),
    [
        (133_339, 131_072, "exact", "exact"),  # the largest of the paper
        (10**7, 10**5, "exact", "exact"),
        (10**8, 10**5, "approximate", "exact"),
        (10**8, 10**6, "approximate", "approximate"),
        (10**9, 10**7, "hierarchical", "approximate"),
        (10**12, 10, "hierarchical", "exact"),
    ],
)
def test_auto_takes_the_most_exact_method_that_is_affordable(
    rows: int, labels: int, name: str, assignment: str
) -> None:
    found = chosen(rows, labels, iterations=20, probes=8)
    assert (found.name, found.assignment) == (name, assignment)
    assert f"{format_number(rows * labels * 21, 2)} pairs" in found.reason


def test_the_limit_itself_is_affordable() -> None:
    assert chosen(PAIRS // 8, 4, iterations=1).name == "exact"
    assert chosen(PAIRS // 8 + 1, 4, iterations=1).name != "exact"


def test_explicit_settings_are_used() -> None:
    huge = 10**12, 10**6
    assert chosen(*huge, method="exact", assignment="approximate").assignment == "exact"  # nothing is left to assign
    for name in ("sampled", "hierarchical", "approximate"):
        assert chosen(*huge, method=name, assignment="exact").assignment == "exact"
        assert chosen(*huge, method=name).assignment == "approximate"
        assert chosen(*huge, method=name).reason.startswith(f"clustering.method is {name}")
    assert chosen(*huge, assignment="exact").assignment == "exact"


def test_costs_are_those_of_the_formulas() -> None:
    config = ClusteringConfig(iterations=9, probes=3, sample_rows_per_cluster=2)
    assert fit_pairs("exact", config, 100, 1000) == 10**6
    assert fit_pairs("sampled", config, 100, 1000) == 2 * 10**5
    assert fit_pairs("hierarchical", config, 100, 1000) == 2 * 10**5
    assert fit_pairs("approximate", config, 100, 1000) == 2 * 10**5 + 4 * 10**5


def test_first_centroids_are_drawn_by_k_means_plus_plus_up_to_a_size() -> None:
    for labels, init in ((PLUS_PLUS_LABELS, "k-means++"), (PLUS_PLUS_LABELS + 1, "k-means||")):
        found = chosen(8 * labels, labels, method="exact")
        assert found.init == init
        assert ("first centroids by k-means||" in found.reason) == (init == "k-means||")
        assert chosen(10**6, labels, method="exact", init="k-means++").init == "k-means++"
    many = PLUS_PLUS_LABELS + 1
    assert chosen(8 * many - 1, many, method="exact").init == "k-means++"
    assert chosen(10**9, PLUS_PLUS_LABELS**2 - 1, method="hierarchical").init == "k-means++"  # of the coarse centroids
