"""k-means with centroids sharded over a grid of ranks, against one process that holds all rows and all centroids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm, Grid
from grappa_dist.distributed.sharded_rows import GridRows, Rows, join_rows
from grappa_dist.kmeans import sliced_passes
from grappa_dist.kmeans.lloyd import KMeansResult, KMeansState, KMeansTask, run_fit, start_sliced_fit
from tests.kmeans.test_lloyd import CASES, SETTINGS, clustered, cuts, fit, good_rows, part_of, unchecked
from tests.processes import run_ranks

Found = tuple[KMeansResult, list[KMeansState]]
SLOW_GRIDS = [(1, 2, 6), (2, 2, None), (2, 1, None), (1, 3, None), (3, 2, None), (3, 2, 5)]
GRIDS = [(1, 2, None), (2, 2, 6), *(pytest.param(*grid, marks=pytest.mark.slow) for grid in SLOW_GRIDS)]
FEW: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    name: CASES[name]
    for name in ("clusters", "spherical", "early stop", "duplicates", "all equal", "exact ties", "one label")
}
FEW["equal starts"] = CASES["equal starts"]
FEW["two groups"] = (clustered(700, 16, 200), {"num_labels": 520, "iterations": 3})
FEW["k-means||"] = (clustered(200, 6, 9), {"num_labels": 50, "iterations": 2, "init": "k-means||"})


def edges_of(num: int, size: int) -> list[int]:
    """Uneven; with six ranks two of those that share rows have none."""
    return [0, 1, num // 3, num // 3, num // 3, num // 2, num] if size == 6 else even_more(num, size)


def even_more(num: int, size: int) -> list[int]:
    return [0, 0, 0, num // 2, num] if size == 4 else cuts(num, size)


def rows_on_grid(comm: Comm, slices: int, x: np.ndarray) -> GridRows:
    edges = edges_of(len(x), comm.size)
    parts = [part_of(x, edges[rank], edges[rank + 1]) for rank in range(comm.size)]
    own = join_rows(comm, parts[comm.rank], block_rows=64, device=torch.device("cpu"))
    first = comm.rank // slices * slices
    sharing = parts[first : first + slices]
    shared = Rows([s for part in sharing for s in part.shards], [g for part in sharing for g in part.good])
    return GridRows.of(own, Grid.of(comm, slices), shared)


def fit_sliced(rows: GridRows, settings: dict[str, Any], **more: Any) -> Found:
    given, saved = {**settings, **more}, list[KMeansState]()
    num_labels, config = given.pop("num_labels"), {k: given.pop(k) for k in SETTINGS if k in given}
    task = KMeansTask(unchecked(**config), **given, on_update=saved.append)
    return run_fit(start_sliced_fit(rows, num_labels, task)), saved


def run_cases(comm: Comm, slices: int, bounds: int | None = None) -> dict[str, Found]:
    """All cases, with so many bounds of a row in all slices; None: as many as K asks for, one here of each slice."""
    with pytest.MonkeyPatch.context() as patch:
        if bounds is not None:
            patch.setattr(sliced_passes, "num_bounds", lambda num_labels, dim: bounds)
        return {name: fit_sliced(rows_on_grid(comm, slices, x), how, seed=3) for name, (x, how) in FEW.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    found = {}
    for name, (x, settings) in FEW.items():
        saved: list[KMeansState] = []
        found[name] = fit(Comm(), part_of(x, 0, len(x)), settings, seed=3, on_update=saved.append), saved
    return found


def same_states(one: list[KMeansState], other: list[KMeansState]) -> bool:
    return len(one) == len(other) and all(
        a.centroids.tobytes() == b.centroids.tobytes()
        and (a.inertia, a.repaired) == (b.inertia, b.repaired)
        and (a.seeded is None) == (b.seeded is None)
        and (a.seeded is None or b.seeded is None or torch.equal(a.seeded.places, b.seeded.places))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("parts", "slices", "bounds"), GRIDS)
def test_any_grid_of_ranks_gives_the_bits_of_one_process(
    alone: dict[str, Found], parts: int, slices: int, bounds: int | None
) -> None:
    found = run_ranks(run_cases, parts * slices, slices, bounds)
    for name, (expected, states) in alone.items():
        ranks = [results[name] for results in found]
        labels = np.concatenate([part for result, _ in ranks for part in result.labels])
        assert np.array_equal(labels, np.concatenate(expected.labels)), name
        assert ranks[0][0].centroids.tobytes() == expected.centroids.tobytes(), name
        assert same_states(ranks[0][1], states), name
        for result, _ in ranks:
            assert np.array_equal(result.counts, expected.counts), name
            assert (result.inertia, result.empty_repaired, result.empty_left) == (
                expected.inertia,
                expected.empty_repaired,
                expected.empty_left,
            ), name
    if slices > 1:
        assert all(len(results[name][0].centroids) == 0 for results in found[1:] for name in alone)


def resume(comm: Comm, slices: int, states: list[KMeansState]) -> list[KMeansResult]:
    x, settings = FEW["equal starts"]
    return [fit_sliced(rows_on_grid(comm, slices, x), settings, seed=3, resume=state)[0] for state in states]


def test_a_fit_that_was_stopped_on_another_grid_ends_with_the_same_bits(alone: dict[str, Found]) -> None:
    expected, states = alone["equal starts"]
    for results in run_ranks(resume, 4, 2, states[1:4])[:1]:
        for result in results:
            assert result.centroids.tobytes() == expected.centroids.tobytes()
            assert result.inertia == expected.inertia


def resume_seeding(comm: Comm, init: str, states: list[KMeansState]) -> list[bytes]:
    x = clustered(200, 6, 9)
    settings = {"num_labels": 50, "iterations": 0, "init": init}
    return [
        fit_sliced(rows_on_grid(comm, 4, x), settings, seed=3, resume=state)[0].centroids.tobytes() for state in states
    ]


@pytest.mark.parametrize("init", [pytest.param("k-means++", marks=pytest.mark.slow), "k-means||"])
def test_first_centroids_in_parts_are_those_of_all_at_once_and_after_any_round(init: str) -> None:
    x, saved = clustered(200, 6, 9), list[KMeansState]()
    settings = {"num_labels": 50, "iterations": 0, "init": init}
    expected = fit(Comm(), part_of(x, 0, len(x)), settings, seed=3, on_update=saved.append).centroids
    states = [state for state in saved if state.seeded][2:8:2]
    assert len(states) == 3
    assert run_ranks(resume_seeding, 4, init, states)[0] == [expected.tobytes()] * 3


def test_bounds_spare_work_in_slices_too() -> None:
    x, settings = clustered(1500, 32, 300), {"num_labels": 600, "iterations": 6}
    rows = Rows([x], [good_rows(x)])
    own = join_rows(Comm(), rows, device=torch.device("cpu"))
    sliced = fit_sliced(GridRows.of(own, Grid.of(Comm(), 1), rows), settings)[0]
    whole = fit(Comm(), rows, settings)
    assert sliced.centroids.tobytes() == whole.centroids.tobytes()
    assert sliced.searched_share < 1.2 * whole.searched_share < 0.9


def refused(comm: Comm) -> str:
    try:
        Grid.of(comm, 2)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_slices_that_do_not_divide_the_ranks_are_refused() -> None:
    assert set(run_ranks(refused, 3)) == {"slices of the centroids must divide the 3 ranks, got 2"}
