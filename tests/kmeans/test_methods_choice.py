from __future__ import annotations

import pytest

from grappa_dist.kmeans.methods import PAIRS, PLUS_PLUS_LABELS, Size, choose


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
def test_auto_takes_the_most_exact_way_that_is_affordable(rows: int, labels: int, name: str, assignment: str) -> None:
    found = choose("auto", "auto", "auto", Size(rows, labels, 20, 8))
    assert (found.name, found.assignment) == (name, assignment)
    assert f"{rows * labels * 21:.1e} pairs" in found.reason


def test_the_limit_itself_is_affordable() -> None:
    assert choose("auto", "auto", "auto", Size(PAIRS // 4, 4, 0, 8)).name == "exact"
    assert choose("auto", "auto", "auto", Size(PAIRS // 4 + 1, 4, 0, 8)).name != "exact"


def test_what_is_asked_for_is_taken() -> None:
    huge = Size(10**12, 10**6, 20, 8)
    assert choose("exact", "approximate", "auto", huge).assignment == "exact"  # nothing is left to assign
    for name in ("sampled", "hierarchical", "approximate"):
        assert choose(name, "exact", "auto", huge).assignment == "exact"  # type: ignore[arg-type]
        assert choose(name, "auto", "auto", huge).assignment == "approximate"  # type: ignore[arg-type]
        assert choose(name, "auto", "auto", huge).reason.startswith(f"clustering.method is {name}")  # type: ignore[arg-type]
    assert choose("auto", "exact", "auto", huge).assignment == "exact"


def test_costs_are_those_of_the_formulas() -> None:
    size = Size(rows=1000, labels=100, iterations=9, probes=3)
    assert size.fit_pairs("exact") == 10**6
    assert size.fit_pairs("sampled", 200) == 2 * 10**5
    assert size.fit_pairs("hierarchical") == 2 * 10**5
    assert size.fit_pairs("approximate") == 2 * 10**5 + 4 * 10**5


def test_first_centroids_are_drawn_by_k_means_plus_plus_up_to_a_size() -> None:
    for labels, init in ((PLUS_PLUS_LABELS, "k-means++"), (PLUS_PLUS_LABELS + 1, "k-means||")):
        found = choose("exact", "auto", "auto", Size(8 * labels, labels, 20, 8))
        assert found.init == init
        assert ("first centroids by k-means||" in found.reason) == (init == "k-means||")
        assert choose("exact", "auto", "k-means++", Size(10**6, labels, 20, 8)).init == "k-means++"
    many = PLUS_PLUS_LABELS + 1
    assert choose("exact", "auto", "auto", Size(8 * many - 1, many, 20, 8)).init == "k-means++"
    levels = Size(10**9, PLUS_PLUS_LABELS**2 - 1, 20, 8)
    assert choose("hierarchical", "auto", "auto", levels).init == "k-means++"  # of the coarse centroids
    assert choose("hierarchical", "auto", "k-means||", levels).init == "k-means||"
