from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import RowBlock, Rows, ShardedRows, join_rows
from grappa_dist.kmeans.lloyd import KMeans, KMeansState, begin, run_fits
from grappa_dist.kmeans.methods import (
    Choice,
    Clustering,
    ClusteringCallbacks,
    Method,
    Wanted,
    cluster,
    cluster_together,
    shares_passes,
)
from grappa_dist.search.fixed_point import to_grid
from tests.kmeans.test_lloyd import clustered, cuts, part_of
from tests.processes import run_ranks

NUMS = (3, 40, 600, 7)
ROWS = clustered(1500, 10, 60)


def exact(**settings: Any) -> Method:
    return Method(choice=Choice("exact", "exact", "a test"), **{"iterations": 6, **settings})


def shard_rows(comm: Comm) -> ShardedRows:
    edges = cuts(len(ROWS), comm.size)
    rows = part_of(ROWS, edges[comm.rank], edges[comm.rank + 1])
    return join_rows(comm, rows, block_rows=100, device=torch.device("cpu"))


def all_at_once(comm: Comm, balance: float | None) -> dict[int, Clustering]:
    wanted = [Wanted(num, exact(balance=balance, tolerance=1e-3), seed=5) for num in NUMS]
    return {NUMS[place]: found for place, found in cluster_together(shard_rows(comm), wanted)}


def labels_of(found: list[Clustering]) -> np.ndarray:
    return np.concatenate([labels for one in found for labels in one.result.labels])


@pytest.mark.parametrize("balance", [None, 1.5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_of_several_is_what_it_is_alone(ranks: int, balance: float | None) -> None:
    of_ranks = run_ranks(all_at_once, ranks, balance)
    sharded = shard_rows(Comm())
    for num in NUMS:
        alone = cluster(sharded, Wanted(num, exact(balance=balance, tolerance=1e-3), seed=5))
        for found in of_ranks:
            assert np.array_equal(found[num].result.centroids, alone.result.centroids)
            assert found[num].result.inertia == alone.result.inertia
            assert found[num].updates == alone.updates
        assert np.array_equal(labels_of([found[num] for found in of_ranks]), labels_of([alone]))


def test_they_end_at_different_times_and_each_is_given_when_it_does() -> None:
    iterations = {3: 5, 40: 1, 7: 3}
    wanted = [Wanted(num, exact(iterations=n)) for num, n in iterations.items()]
    assert [place for place, _ in cluster_together(shard_rows(Comm()), wanted)] == [1, 2, 0]


def test_what_has_ended_is_let_go_while_others_go_on() -> None:
    sharded = shard_rows(Comm())
    fits = [begin(sharded, num, KMeans(iterations=n)) for num, n in ((3, 5), (40, 1), (7, 3))]
    kept = [weakref.ref(fit.passes) for fit in fits]
    given = run_fits(fits)
    del fits
    left = [(len(next(given).result().centroids), [passes() is not None for passes in kept]) for _ in range(3)]
    assert left == [(40, [True, False, True]), (7, [True, False, False]), (3, [False, False, False])]


def test_one_stopped_in_the_middle_goes_on_beside_others() -> None:
    sharded, saved = shard_rows(Comm()), list[dict[str, KMeansState]]()
    told = ClusteringCallbacks(on_update=lambda checkpoint: saved.append(dict(checkpoint)))
    whole = cluster(sharded, Wanted(40, exact(), told=told))
    wanted = [Wanted(7, exact()), Wanted(40, exact(), checkpoint=saved[3])]
    again = dict(cluster_together(sharded, wanted))[1]
    assert np.array_equal(again.result.centroids, whole.result.centroids)
    assert np.array_equal(labels_of([again]), labels_of([whole]))


def test_a_pass_over_the_rows_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(400, 8, 400)
    sharded = join_rows(Comm(), Rows([x], [np.ones(len(x), dtype=bool)]), device=torch.device("cpu"))
    starts = to_grid(torch.from_numpy(x)).numpy()
    started = [Wanted(num, exact(), checkpoint={"0/fit": KMeansState(starts[:num], ())}) for num in (5, 9, 20)]
    passes, row_blocks = Counter[str](), ShardedRows.row_blocks

    def counting(self: ShardedRows) -> Iterator[RowBlock]:
        passes["made"] += 1
        return row_blocks(self)

    monkeypatch.setattr(ShardedRows, "row_blocks", counting)
    found = [clustering for _, clustering in cluster_together(sharded, started)]
    assert passes["made"] == 1 + max(clustering.updates for clustering in found)


def test_shortcuts_and_restarts_go_alone() -> None:
    assert shares_passes(exact(balance=2.0))
    assert not shares_passes(exact(restarts=2))
    assert not shares_passes(Method(choice=Choice("sampled", "exact", "a test")))


def test_more_labels_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_labels must be from 1 to the number of good rows"):
        list(cluster_together(shard_rows(Comm()), [Wanted(5, exact()), Wanted(9999, exact())]))
