from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import ShardedRows, join_rows
from grappa_dist.kmeans import assignments, balanced, hierarchical, sampling
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, sharded_kmeans
from grappa_dist.kmeans.methods import Checkpoint, Choice, Clustering, ClusteringCallbacks, ClusteringTask, cluster
from grappa_dist.search.fixed_point import GRID, to_grid
from tests.kmeans.test_lloyd import clustered, cuts, distances, good_rows, lattice, part_of
from tests.processes import run_ranks


def clustering_task(num_labels: int, name: Any, assignment: Any = "exact", **settings: Any) -> ClusteringTask:
    config = ClusteringConfig(**{"iterations": 4, **settings})
    return ClusteringTask(num_labels, config, Choice(name, assignment, "a test"), seed=3)


ROWS = {
    "clusters": clustered(500, 12, 30),
    "duplicates": np.repeat(clustered(20, 6, 5), 11, axis=0),
    "all equal": np.repeat(clustered(1, 5, 1), 40, axis=0),
    "ties": lattice(),
    "each its own": clustered(37, 4, 9),
    "one row": clustered(1, 3, 1),
}

CASES: dict[str, tuple[str, ClusteringTask]] = {
    "exact": ("clusters", clustering_task(24, "exact")),
    "exact, balanced": ("clusters", clustering_task(24, "exact", balance=1.0)),
    "exact, restarts": ("clusters", clustering_task(24, "exact", restarts=3)),
    "sampled": ("clusters", clustering_task(24, "sampled", sample_rows_per_cluster=6)),
    "sampled, all": ("clusters", clustering_task(24, "sampled", sample_rows_per_cluster=60, balance=1.5)),
    "sampled, lists": ("ties", clustering_task(20, "sampled", "approximate", sample_rows_per_cluster=2, probes=2)),
    "sampled, duplicates": ("duplicates", clustering_task(33, "sampled", sample_rows_per_cluster=1)),
    "hierarchical": ("clusters", clustering_task(40, "hierarchical")),
    "hierarchical, restarts": ("clusters", clustering_task(40, "hierarchical", restarts=3, balance=1.2)),
    "hierarchical, spherical": ("clusters", clustering_task(40, "hierarchical", spherical=True)),
    "hierarchical, ties": ("ties", clustering_task(20, "hierarchical", balance=1.1)),
    "hierarchical, duplicates": ("duplicates", clustering_task(33, "hierarchical", balance=1.0)),
    "hierarchical, all equal": ("all equal", clustering_task(9, "hierarchical", balance=1.0)),
    "hierarchical, each its own": ("each its own", clustering_task(37, "hierarchical")),
    "hierarchical, one row": ("one row", clustering_task(1, "hierarchical", balance=1.0)),
    "hierarchical, lists": ("clusters", clustering_task(100, "hierarchical", "approximate", probes=2)),
    "approximate": ("clusters", clustering_task(100, "approximate", "approximate", probes=2)),
    "approximate, exact labels": ("clusters", clustering_task(100, "approximate", probes=2, restarts=2)),
    "approximate, ties": ("ties", clustering_task(30, "approximate", "approximate", probes=1, balance=1.3)),
    "approximate, duplicates": ("duplicates", clustering_task(33, "approximate", "approximate", probes=1)),
    "approximate, one row": ("one row", clustering_task(1, "approximate", "approximate")),
}


def shard_rows(comm: Comm, x: np.ndarray, block_rows: int) -> ShardedRows:
    edges = cuts(len(x), comm.size) if len(x) > 1 else [0] * comm.size + [1]
    rows = part_of(x, edges[comm.rank], edges[comm.rank + 1])
    return join_rows(comm, rows, block_rows=block_rows, device=torch.device("cpu"))


def run_cases(comm: Comm, block_rows: int) -> dict[str, Clustering]:
    return {name: cluster(shard_rows(comm, ROWS[rows], block_rows), how) for name, (rows, how) in CASES.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Clustering]:
    return run_cases(Comm(), 10**6)


def figures(found: Clustering) -> tuple[Any, ...]:
    """All that must not depend on ranks, except for centroids and labels."""
    result = found.result
    of_result = (result.counts.tolist(), result.inertia, result.empty_repaired, result.empty_left)
    of_method = (found.updates, found.sampled_rows, found.agreement, found.balanced, found.unbalanced_inertia)
    return (*of_result, *of_method, found.restarts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "block_rows"), [(1, 50), (2, 83), (3, 1000), pytest.param(5, 64, marks=pytest.mark.long)]
)
def test_ranks_and_blocks_change_no_bit_of_any_method(alone: dict[str, Clustering], size: int, block_rows: int) -> None:
    ranks = [run_cases(Comm(), block_rows)] if size == 1 else run_ranks(run_cases, size, block_rows)
    for name, expected in alone.items():
        labels = np.concatenate([part for found in ranks for part in found[name].result.labels])
        assert np.array_equal(labels, np.concatenate(expected.result.labels)), name
        for found in ranks:
            assert np.array_equal(found[name].result.centroids, expected.result.centroids), name
            assert figures(found[name]) == figures(expected), name


@pytest.mark.slow
def test_pieces_of_any_size_change_no_bit(alone: dict[str, Clustering], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (assignments, balanced, hierarchical, sampling):
        monkeypatch.setattr(module, "PIECE", 13)
    for name, found in run_cases(Comm(), 100).items():
        assert np.array_equal(np.concatenate(found.result.labels), np.concatenate(alone[name].result.labels)), name
        assert figures(found) == figures(alone[name]), name


def test_labels_counts_and_inertia_belong_together(alone: dict[str, Clustering]) -> None:
    for name, (rows, how) in CASES.items():
        x, result = ROWS[rows], alone[name].result
        good, labels = good_rows(x), np.concatenate(result.labels)
        assert (labels == -1).tolist() == (~good).tolist(), name
        assert np.bincount(labels[good], minlength=how.num_labels).tolist() == result.counts.tolist(), name
        assert result.empty_left == (result.counts == 0).sum(), name
        squares = distances(x[good], result.centroids)
        own = squares[np.arange(len(squares)), labels[good]]
        assert result.inertia[-1] == pytest.approx(own.sum() / 2**48, rel=1e-15), name
        if how.choice.assignment == "exact" and how.config.balance is None:
            assert labels[good].tolist() == squares.argmin(1).tolist(), name


def test_exact_is_the_flat_kmeans(alone: dict[str, Clustering]) -> None:
    x = ROWS["clusters"]
    flat = sharded_kmeans(Comm(), part_of(x, 0, len(x)), 24, KMeansTask(ClusteringConfig(iterations=4), seed=3))
    assert np.array_equal(alone["exact"].result.centroids, flat.centroids)
    assert alone["exact"].result.inertia == flat.inertia


def test_a_sample_of_all_rows_is_no_sample(alone: dict[str, Clustering]) -> None:
    assert np.array_equal(alone["sampled, all"].result.centroids, alone["exact"].result.centroids)
    assert alone["sampled, all"].sampled_rows == good_rows(ROWS["clusters"]).sum()
    assert alone["sampled"].sampled_rows == 6 * 24


def test_no_cluster_exceeds_the_bound(alone: dict[str, Clustering]) -> None:
    for name, (rows, how) in CASES.items():
        if how.config.balance is not None:
            balanced = alone[name].balanced
            assert balanced is not None
            expected = -int(-how.config.balance * 10 * good_rows(ROWS[rows]).sum() // (10 * how.num_labels))
            assert balanced.largest == expected, name
            assert alone[name].result.counts.max() <= balanced.largest, name
    assert alone["hierarchical, all equal"].result.counts.tolist() == [*[5] * 7, 2, 0]  # ties by label


def test_as_many_labels_as_rows_leave_no_distance(alone: dict[str, Clustering]) -> None:
    assert alone["hierarchical, each its own"].result.inertia[-1] == 0
    assert alone["hierarchical, each its own"].result.counts.tolist() == [1] * 37
    assert alone["hierarchical, one row"].result.counts.tolist() == [1]


def test_the_best_restart_wins(alone: dict[str, Clustering]) -> None:
    for name in ("exact, restarts", "hierarchical, restarts", "approximate, exact labels"):
        found = alone[name]
        assert len(found.restarts) == CASES[name][1].config.restarts
        assert found.result.inertia[-1] == min(found.restarts)
    assert alone["exact, restarts"].restarts[0] == alone["exact"].result.inertia[-1]


def test_a_shortcut_comes_near_the_exact_objective() -> None:
    x = clustered(4000, 16, 80)
    sharded = shard_rows(Comm(), x, 4096)
    found = {
        name: cluster(
            sharded, replace(clustering_task(400, name, iterations=8, sample_rows_per_cluster=6), seed=0)
        ).result.inertia[-1]
        for name in ("exact", "approximate", "hierarchical", "sampled")
    }
    assert found["approximate"] < 1.05 * found["exact"]
    assert found["hierarchical"] < 1.15 * found["exact"]
    assert found["sampled"] < 1.25 * found["exact"]


def test_lists_mostly_agree_with_the_exact_assignment(alone: dict[str, Clustering]) -> None:
    sharded = shard_rows(Comm(), clustered(5000, 16, 300), 4096)
    found = cluster(sharded, replace(clustering_task(900, "hierarchical", "approximate"), seed=0))
    assert found.agreement is not None
    assert found.agreement.share >= 0.98
    assert found.agreement.rows == 4096
    for name, (rows, how) in CASES.items():
        measured = alone[name].agreement
        assert (measured is None) == (how.choice.assignment == "exact"), name
        if measured is not None and how.config.balance is None:  # few rows: all of them are compared
            x = ROWS[rows][good_rows(ROWS[rows])]
            labels = np.concatenate(alone[name].result.labels)
            same = labels[labels >= 0] == distances(x, alone[name].result.centroids).argmin(1)
            assert (measured.rows, measured.same) == (len(x), same.sum()), name


RESUMED = [name for name in CASES if "one row" not in name and name != "sampled, all"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_after_any_update_ends_as_if_it_had_not_stopped(alone: dict[str, Clustering], name: str) -> None:
    rows, how = CASES[name]
    sharded, saved = shard_rows(Comm(), ROWS[rows], 260), list[dict[str, KMeansState]]()
    callbacks = ClusteringCallbacks(on_checkpoint=lambda checkpoint: saved.append(dict(checkpoint)))
    cluster(sharded, replace(how, callbacks=callbacks))
    assert saved
    for checkpoint in saved[:: max(1, len(saved) // 8)] + saved[-1:]:
        again = cluster(sharded, replace(how, checkpoint=checkpoint))
        assert np.array_equal(again.result.centroids, alone[name].result.centroids)
        assert np.array_equal(np.concatenate(again.result.labels), np.concatenate(alone[name].result.labels))
        assert figures(again) == figures(alone[name])


def test_a_resumed_run_keeps_nothing_of_the_file_that_its_checkpoint_maps() -> None:
    sharded, saved = shard_rows(Comm(), clustered(300, 6, 20), 64), list[dict[str, KMeansState]]()
    given = clustering_task(30, "exact", iterations=3, restarts=2)
    keep = ClusteringCallbacks(on_checkpoint=lambda checkpoint: saved.append(dict(checkpoint)))
    expected = cluster(sharded, replace(given, seed=0, callbacks=keep)).result
    mapped = {part: replace(state, centroids=state.centroids.copy()) for part, state in saved[-3].items()}

    def lose(checkpoint: Checkpoint) -> None:
        for state in mapped.values():
            state.centroids[:] = np.nan

    lost = ClusteringCallbacks(on_checkpoint=lose)
    found = cluster(sharded, replace(given, seed=0, callbacks=lost, checkpoint=mapped)).result
    assert all(np.isnan(state.centroids).all() for state in mapped.values())
    assert found.centroids.tobytes() == expected.centroids.tobytes()
    assert found.inertia == expected.inertia


def test_a_row_meets_only_the_centroids_of_its_own_coarse_cluster() -> None:
    x = clustered(300, 6, 20)
    sharded, saved = shard_rows(Comm(), x, 64), list[dict[str, KMeansState]]()
    callbacks = ClusteringCallbacks(on_checkpoint=lambda checkpoint: saved.append(dict(checkpoint)))
    cluster(sharded, replace(clustering_task(30, "hierarchical", iterations=3), seed=0, callbacks=callbacks))
    coarse = saved[-1]["0/coarse"].centroids
    fine = [checkpoint["0/fine"] for checkpoint in saved if "0/fine" in checkpoint]
    good = x[good_rows(x)]
    owners = distances(good, coarse).argmin(1)
    sizes = np.bincount(owners, minlength=len(coarse))
    kinds = distances(to_grid(torch.from_numpy(fine[0].centroids)).numpy(), coarse).argmin(1)
    assert (np.diff(kinds) >= 0).all()  # first centroids are rows, in the order of their coarse clusters
    assert np.abs(np.bincount(kinds, minlength=len(coarse)) - 30 * sizes / sizes.sum()).max() <= 1
    for before, after in pairwise(fine):
        squares = distances(good, before.centroids)
        squares[owners[:, None] != kinds] = 2**62
        labels, integers = squares.argmin(1), (to_grid(torch.from_numpy(good)).double() * GRID).long().numpy()
        assert after.inertia[-1] == squares.min(1).sum()
        for k in np.flatnonzero(np.bincount(labels, minlength=30)):
            own = integers[labels == k]
            mean = (2 * own.sum(0) + len(own)) // (2 * len(own))
            assert np.array_equal(after.centroids[k], mean.astype(np.float32) / np.float32(GRID))


def test_more_labels_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_labels must be from 1 to the number of good rows, 1, got 2"):
        cluster(shard_rows(Comm(), ROWS["one row"], 8), clustering_task(2, "hierarchical"))
