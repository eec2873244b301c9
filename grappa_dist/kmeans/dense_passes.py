"""Passes of an exact k-means on a device: every row is compared with every centroid (search/dense.py).

Bounds that spare products (kmeans/yinyang.py) read other rows in every block, so shapes depend on data and the host
waits for each. On a device the products take less time than that. Labels and sums stay on it, and of a block the host
reads three counts, while another block is under way: rows that floats left open, rows compared with all centroids, and
rows whose label changed. Labels, sums and so centroids are those of the other passes, bit for bit.

Shapes: n good rows of this rank, P of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.device_rows import DeviceBlock
from grappa_dist.distributed.sharded_rows import ShardedRows
from grappa_dist.kmeans.update import Stats
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.dense import DenseCentroids, nearest_dense
from grappa_dist.search.in_flight import Work, compact


@dataclass(eq=False)
class DensePasses:
    """An exact k-means between its passes: labels, and the sums of the rows of each label."""

    sharded: ShardedRows
    stats: Stats  # of all ranks
    of_rows: Tensor  # (n,) int32 labels on the device, -1 before the first pass
    number: int = 0  # of passes so far
    by_integers: int = 0  # rows of this rank compared in integers, over all passes
    searched: int = 0  # distances estimated for rows of this rank, over all passes

    @staticmethod
    def over(sharded: ShardedRows, num_labels: int) -> DensePasses:
        of_rows = torch.full((sharded.rows.num_good,), -1, dtype=torch.int32, device=sharded.device)
        return DensePasses(sharded, Stats.zeros(num_labels, sharded.dim, sharded.device), of_rows)

    def counts(self) -> Tensor:
        """Rows of all ranks per label, (K,) int64."""
        return self.stats.counts

    def labels(self) -> list[np.ndarray]:
        """Labels of the rank's rows by shard, (P,) int32, -1 for bad rows."""
        return self.sharded.rows.labels_by_shard(self.of_rows.cpu().numpy())


@dataclass(frozen=True)
class _Pass:
    """One pass of one clustering."""

    kept: DensePasses
    centroids: DenseCentroids
    change: Stats  # of this rank's sums

    @staticmethod
    def of(kept: DensePasses, centroids: Tensor) -> _Pass:
        whole = Centroids.of(centroids, kept.sharded.generator)
        num_labels, dim = centroids.shape
        return _Pass(kept, DenseCentroids.of(whole), Stats.zeros(num_labels, dim, kept.sharded.device))

    def over(self, block: DeviceBlock) -> Work[None]:
        kept, rows = self.kept, block.rows
        found = yield from nearest_dense(rows, self.centroids)
        before, after = kept.of_rows[block.places].long(), found.labels
        kept.of_rows[block.places] = after.int()
        kept.by_integers += found.by_integers
        kept.searched += len(after) * len(self.centroids)
        if not kept.number:
            self.change.add_(rows.x, rows.squares, after)
            return
        places, count = compact(before != after)
        (num,) = yield count
        if num:
            some = places[:num]
            x, squares = rows.x.index_select(0, some), rows.squares[some]
            self.change.add_(x, squares, after[some], before[some])

    def end(self) -> None:
        self.kept.number += 1
        self.kept.stats.add_changes_(self.change, self.kept.sharded.total)


def dense_pass(wanted: Sequence[tuple[DensePasses, Tensor]]) -> list[Centroids]:
    """One pass over the rows that assigns them to the centroids of several clusterings; returns these prepared."""
    sharded = wanted[0][0].sharded
    assert all(kept.sharded is sharded for kept, _ in wanted)
    passes = [_Pass.of(kept, centroids) for kept, centroids in wanted]

    def over(block: DeviceBlock) -> Generator[Tensor, list[int], None]:
        for one in passes:
            yield from one.over(block)

    for _ in sharded.passes(over):
        pass
    for one in passes:
        one.end()
    return [one.centroids.whole for one in passes]
