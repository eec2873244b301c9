from __future__ import annotations

import pytest

from grappa_dist.ops.choice import PAIRS, Size, choose


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
    found = choose("auto", "auto", Size(rows, labels, 20, 8))
    assert (found.name, found.assignment) == (name, assignment)
    assert f"{rows * labels * 21:.1e} pairs" in found.reason


def test_the_limit_itself_is_affordable() -> None:
    assert choose("auto", "auto", Size(PAIRS // 4, 4, 0, 8)).name == "exact"
    assert choose("auto", "auto", Size(PAIRS // 4 + 1, 4, 0, 8)).name != "exact"


def test_what_is_asked_for_is_taken() -> None:
    huge = Size(10**12, 10**6, 20, 8)
    assert choose("exact", "approximate", huge).assignment == "exact"  # nothing is left to assign
    for name in ("sampled", "hierarchical", "approximate"):
        assert choose(name, "exact", huge).assignment == "exact"  # type: ignore[arg-type]
        assert choose(name, "auto", huge).assignment == "approximate"  # type: ignore[arg-type]
        assert choose(name, "auto", huge).reason.startswith(f"clustering.method is {name}")  # type: ignore[arg-type]
    assert choose("auto", "exact", huge).assignment == "exact"


def test_costs_are_those_of_the_formulas() -> None:
    size = Size(rows=1000, labels=100, iterations=9, probes=3)
    assert size.fit_pairs("exact") == 10**6
    assert size.fit_pairs("sampled", 200) == 2 * 10**5
    assert size.fit_pairs("hierarchical") == 2 * 10**5
    assert size.fit_pairs("approximate") == 2 * 10**5 + 4 * 10**5
