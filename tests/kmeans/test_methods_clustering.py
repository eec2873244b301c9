from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import RowBlock, Rows, ShardedRows, join_rows
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, run_fits, start_fit
from grappa_dist.kmeans.methods import (
    Choice,
    Clustering,
    ClusteringCallbacks,
    ClusteringTask,
    cluster,
    cluster_together,
    shares_passes,
)
from grappa_dist.search.fixed_point import to_grid
from tests.kmeans.test_lloyd import clustered, cuts, part_of
from tests.processes import run_ranks

NUMS = (3, 40, 600, 7)
ROWS = clustered(1500, 10, 60)


def exact(num_labels: int, *, seed: int = 0, **settings: Any) -> ClusteringTask:
    config = ClusteringConfig(**{"iterations": 6, **settings})
    return ClusteringTask(num_labels, config, Choice("exact", "exact", "a test"), seed)


def shard_rows(comm: Comm) -> ShardedRows:
    edges = cuts(len(ROWS), comm.size)
    rows = part_of(ROWS, edges[comm.rank], edges[comm.rank + 1])
    return join_rows(comm, rows, block_rows=100, device=torch.device("cpu"))


def all_at_once(comm: Comm, balance: float | None) -> dict[int, Clustering]:
    tasks = [exact(num, balance=balance, tolerance=1e-3, seed=5) for num in NUMS]
    return {NUMS[place]: found for place, found in cluster_together(shard_rows(comm), tasks)}


def labels_of(found: list[Clustering]) -> np.ndarray:
    return np.concatenate([labels for one in found for labels in one.result.labels])


@pytest.mark.slow
@pytest.mark.parametrize("balance", [None, 1.5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_of_several_is_the_same_as_alone(ranks: int, balance: float | None) -> None:
    of_ranks = run_ranks(all_at_once, ranks, balance)
    sharded = shard_rows(Comm())
    for num in NUMS:
        alone = cluster(sharded, exact(num, balance=balance, tolerance=1e-3, seed=5))
        for found in of_ranks:
            assert np.array_equal(found[num].result.centroids, alone.result.centroids)
            assert found[num].result.inertia == alone.result.inertia
            assert found[num].updates == alone.updates
        assert np.array_equal(labels_of([found[num] for found in of_ranks]), labels_of([alone]))


def test_each_of_several_is_returned_when_it_ends() -> None:
    iterations = {3: 5, 40: 1, 7: 3}
    tasks = [exact(num, iterations=n) for num, n in iterations.items()]
    assert [place for place, _ in cluster_together(shard_rows(Comm()), tasks)] == [1, 2, 0]


def test_memory_of_an_ended_fit_is_released_while_others_go_on() -> None:
    sharded = shard_rows(Comm())
    fits = [start_fit(sharded, num, KMeansTask(ClusteringConfig(iterations=n))) for num, n in ((3, 5), (40, 1), (7, 3))]
    kept = [weakref.ref(fit.passes) for fit in fits]
    ended = run_fits(fits)
    del fits
    left = [(len(next(ended).result().centroids), [passes() is not None for passes in kept]) for _ in range(3)]
    assert left == [(40, [True, False, True]), (7, [True, False, False]), (3, [False, False, False])]


def test_one_stopped_in_the_middle_continues_next_to_others() -> None:
    sharded, saved = shard_rows(Comm()), list[dict[str, KMeansState]]()
    callbacks = ClusteringCallbacks(on_checkpoint=lambda checkpoint: saved.append(dict(checkpoint)))
    whole = cluster(sharded, replace(exact(40), callbacks=callbacks))
    tasks = [exact(7), replace(exact(40), checkpoint=saved[3])]
    again = dict(cluster_together(sharded, tasks))[1]
    assert np.array_equal(again.result.centroids, whole.result.centroids)
    assert np.array_equal(labels_of([again]), labels_of([whole]))


def test_a_pass_over_the_rows_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(400, 8, 400)
    sharded = join_rows(Comm(), Rows([x], [np.ones(len(x), dtype=bool)]), device=torch.device("cpu"))
    starts = to_grid(torch.from_numpy(x)).numpy()
    started = [replace(exact(num), checkpoint={"0/fit": KMeansState(starts[:num], ())}) for num in (5, 9, 20)]
    passes, row_blocks = Counter[str](), ShardedRows.row_blocks

    def counting(self: ShardedRows) -> Iterator[RowBlock]:
        passes["made"] += 1
        return row_blocks(self)

    monkeypatch.setattr(ShardedRows, "row_blocks", counting)
    found = [clustering for _, clustering in cluster_together(sharded, started)]
    assert passes["made"] == 1 + max(clustering.updates for clustering in found)


def test_shortcuts_and_restarts_share_no_passes() -> None:
    choice = Choice("exact", "exact", "a test")
    assert shares_passes(ClusteringConfig(balance=2.0), choice)
    assert not shares_passes(ClusteringConfig(restarts=2), choice)
    assert not shares_passes(ClusteringConfig(), Choice("sampled", "exact", "a test"))


def test_more_labels_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_labels must be from 1 to the number of good rows"):
        list(cluster_together(shard_rows(Comm()), [exact(5), exact(9999)]))
