from __future__ import annotations

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.kmeans.assignments import assign_rows, exact_search
from grappa_dist.kmeans.balanced import balance_labels, largest_size
from grappa_dist.search.fixed_point import to_grid
from tests.kmeans.test_lloyd import clustered, distances, good_rows, lattice
from tests.kmeans.test_methods import shard_rows
from tests.processes import run_ranks

CASES: dict[str, tuple[np.ndarray, np.ndarray, int]] = {  # rows, centroids, rows that a cluster may have
    "clusters": (clustered(400, 6, 9), clustered(30, 6, 9, seed=4), 14),
    "exactly full": (clustered(35, 6, 9), clustered(7, 6, 9, seed=4), 5),
    "one each": (clustered(30, 4, 5), clustered(30, 4, 5, seed=4), 1),
    "equal rows": (np.repeat(clustered(1, 5, 1), 60, axis=0), clustered(40, 5, 3, seed=4), 2),
    "equal centroids": (clustered(50, 5, 3), np.repeat(clustered(1, 5, 1, seed=4), 25, axis=0), 2),
    "ties": (lattice(), lattice()[::3], 4),
    "capacity for all": (clustered(50, 5, 3), clustered(4, 5, 3, seed=4), 50),
}


def balanced(comm: Comm, block_rows: int) -> dict[str, tuple[list[np.ndarray], int, int]]:
    found = {}
    for name, (x, c, largest) in CASES.items():
        sharded, centroids = shard_rows(comm, x, block_rows), to_grid(torch.from_numpy(c.copy()))
        rows, _ = assign_rows(sharded, exact_search(sharded, centroids), sharded.blocks())
        done = balance_labels(sharded, rows, centroids, largest)
        found[name] = (rows.by_shard(sharded), done.moved, rows.inertia(sharded))
    return found


def naive(x: np.ndarray, c: np.ndarray, largest: int) -> np.ndarray:
    """Overfull clusters keep their nearest; the others apply, all at once, to the nearest cluster with capacity."""
    squares = distances(x, c)
    labels = squares.argmin(1)
    for k in range(len(c)):
        own = np.flatnonzero(labels == k)
        labels[own[np.argsort(squares[own, k], kind="stable")[largest:]]] = -1
    while (labels < 0).any():
        capacity = largest - np.bincount(labels[labels >= 0], minlength=len(c))
        free = np.flatnonzero(labels < 0)
        applied = np.where(capacity > 0, squares[free], 2**62).argmin(1)
        for k in np.unique(applied):
            own = free[applied == k]
            labels[own[np.argsort(squares[own, k], kind="stable")[: capacity[k]]]] = k
    return labels


@pytest.mark.parametrize(("size", "block_rows"), [(1, 1000), (1, 7), pytest.param(3, 16, marks=pytest.mark.slow)])
def test_labels_are_those_of_the_naive_rounds_and_no_cluster_is_too_large(size: int, block_rows: int) -> None:
    ranks = [balanced(Comm(), block_rows)] if size == 1 else run_ranks(balanced, size, block_rows)
    for name, (x, c, largest) in CASES.items():
        good = good_rows(x)
        labels = np.concatenate([part for rank in ranks for part in rank[name][0]])
        assert (labels[~good] == -1).all()
        expected = naive(x[good], c, largest)
        assert np.array_equal(labels[good], expected), name
        assert np.bincount(labels[good]).max() <= largest, name
        squares = distances(x[good], c)
        counts = np.bincount(squares.argmin(1), minlength=len(c))
        for rank in ranks:
            assert rank[name][1] == np.maximum(counts - largest, 0).sum(), name
            assert rank[name][2] == squares[np.arange(len(squares)), expected].sum(), name


@pytest.mark.parametrize(
    ("rows", "labels", "balance", "expected"),
    [(100, 11, 1.1, 10), (100, 10, 1.0, 10), (101, 10, 1.0, 11), (10, 10, 1.5, 2), (10**12, 10**6, 1.3, 1_300_000)],
)
def test_the_bound_is_the_multiple_as_it_was_written(rows: int, labels: int, balance: float, expected: int) -> None:
    assert largest_size(rows, labels, balance) == expected
