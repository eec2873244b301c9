"""Passes of an exact k-means whose centroids are sharded: ranks that share rows hold a slice of the centroids each.

A pass has three parts in which every rank works alone, and the ranks that share rows agree between these:

1. Rows with a bound that lets another centroid be nearer are open, for all of these ranks if for one of them. The rank
   that holds a row's own centroid computes the exact distance to it, and tells the others.
2. Each rank searches its slice for a nearer one, with bounds of its own groups of centroids (kmeans/yinyang.py). The
   minimum of the exact distances, then that of the labels at this distance, is the label that one rank with all
   centroids would find: a minimum of integers does not depend on how they are split.
3. Rows that came to a slice or left it are added to its sums, which the ranks with this slice add up.

So nothing travels per row but a flag, and for open rows two distances and a label; and, per centroid, its drift.

Shapes: n rows that are shared, P of one block, K centroids of which K_j are in the slice, G groups in it, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import PIECE, GridRows, RowBlock, ShardedRows, scratch
from grappa_dist.kmeans.centroid_slices import CentroidSlice
from grappa_dist.kmeans.update import Stats
from grappa_dist.kmeans.yinyang import (
    Bounds,
    Drift,
    GroupedCentroids,
    Groups,
    NearerCentroids,
    Standing,
    nearer_in_slice,
    num_bounds,
    rooted,
)
from grappa_dist.search.candidates import SLACK, Centroids, joined
from grappa_dist.search.fixed_point import GRID
from grappa_dist.search.rerank import FAR, pair_squares

_NO_LABEL = torch.iinfo(torch.int64).max


def slice_of(rows: GridRows, num_labels: int) -> CentroidSlice:
    """The slice of this rank."""
    return CentroidSlice(num_labels, rows.grid.sharing_rows, is_writer=rows.grid.sharing_slice.rank == 0)


@dataclass
class SlicedPasses:
    """The state of a k-means between its passes: labels among all centroids, bounds and sums of one slice."""

    rows: GridRows
    held: CentroidSlice
    groups: Groups  # of the slice
    bounds: Bounds  # of the shared good rows, in their order
    is_open: Tensor  # (n,) bool
    nearest: Standing  # (n,), the nearest of the slice and the own one, during a pass
    stats: Stats  # of the slice, from all ranks
    centroids: Tensor  # (K_j, D) of the last pass
    number: int = 0  # of passes so far
    by_integers: int = 0  # rows decided in integers on this rank, over all passes
    searched: int = 0  # distances estimated on this rank, over all passes
    adding: Lock = field(default_factory=Lock)

    @staticmethod
    def over(rows: GridRows, held: CentroidSlice, centroids: Tensor) -> SlicedPasses:
        dim, num = centroids.shape[1], rows.shared.rows.num_good
        # Of all slices together a row has as many bounds as without slices.
        groups = Groups.around(centroids, -(-num_bounds(held.num, dim) // held.ranks.size))
        bounds = Bounds(
            labels=scratch((num,), torch.int32).fill_(-1),
            upper=scratch((num,), torch.float32).fill_(math.inf),
            lower=scratch((num, len(groups.members)), torch.float32).fill_(-math.inf),
            squares=rows.shared.squares,
        )
        nearest = Standing(scratch((num,), torch.int64), scratch((num,), torch.int32), held.own.start)
        stats = Stats.zeros(len(centroids), dim)
        return SlicedPasses(rows, held, groups, bounds, scratch((num,), torch.bool), nearest, stats, centroids)

    @property
    def sharded(self) -> ShardedRows:
        return self.rows.shared

    def counts(self) -> Tensor:
        """Rows of all ranks per label, (K,) int64."""
        return self.held.joined(self.stats.counts)

    def labels(self) -> list[np.ndarray]:
        """Labels of the rank's own rows by shard, (P,) int32, -1 for bad rows."""
        own, first = self.rows.own.rows, self.rows.good_before
        return own.labels_by_shard(self.bounds.labels[first : first + own.num_good].numpy())

    def advance(self, centroids: Tensor) -> Centroids:
        """One pass: labels, bounds and sums by new centroids (K_j, D), which it returns prepared."""
        grouped = GroupedCentroids.of(centroids, self.groups, self.sharded.generator)
        if self.number:
            self._shift(Drift.between(self.centroids, centroids, self.groups))
        self._open()
        if self.number:
            self._over_blocks(lambda block: self._measure_own(block, grouped.whole))
            self._agree_on_own()
        for found in self.sharded.each(lambda block: self._search(block, grouped), self.sharded.row_blocks()):
            if found:
                self.by_integers += found.by_integers
                self.searched += found.searched
        self._agree_on_nearest()
        change = Stats.zeros(*centroids.shape)
        self._over_blocks(lambda block: self._add_changed(block, change))
        self.stats.add_changes_(change, self.rows.grid.sharing_slice.sum_)
        self.centroids, self.number = centroids, self.number + 1
        return grouped.whole

    def _over_blocks(self, work: Callable[[RowBlock], None]) -> None:
        for _ in self.sharded.each(work, self.sharded.row_blocks()):
            pass

    def _pieces(self) -> Iterator[slice]:
        return (slice(start, start + PIECE) for start in range(0, len(self.is_open), PIECE))

    def _shift(self, drift: Drift) -> None:
        """Adjusts the bounds after the centroids have moved, by any rank."""
        of_all = Drift(self.held.joined(drift.own), drift.groups)
        for piece in self._pieces():
            self.bounds.part(piece).shift_(of_all)

    def _open(self) -> None:
        """Finds the open rows. Their nearest centroid so far is at an unknown distance."""
        ranks = self.held.ranks
        for piece in self._pieces():
            bounds = self.bounds.part(piece)
            flags = (bounds.lower <= bounds.upper[:, None]).any(1).to(torch.uint8)
            self.is_open[piece] = ranks.max_(flags).bool()
            self.nearest.squares[piece], self.nearest.labels[piece] = FAR, bounds.labels

    def _measure_own(self, block: RowBlock, centroids: Centroids) -> None:
        """Exact distances of open rows to their own centroids, where these are in the slice."""
        labels, squares = self.bounds.labels[block.places].long(), self.nearest.squares[block.places]
        rows = (self.is_open[block.places] & self._is_in_slice(labels)).nonzero()[:, 0]
        if len(rows):
            pairs = (torch.arange(len(rows)), labels[rows] - self.nearest.first)
            squares[rows] = pair_squares(joined(block.take(rows)), block.squares[rows], centroids, pairs).long()

    def _is_in_slice(self, labels: Tensor) -> Tensor:
        return (labels >= self.held.own.start) & (labels < self.held.own.stop)

    def _agree_on_own(self) -> None:
        """Tells the exact distances to the ranks that hold other slices."""
        for piece in self._pieces():
            rows, squares = self.is_open[piece].nonzero()[:, 0], self.nearest.squares[piece]
            if len(rows):
                exact = self.held.ranks.min_(squares[rows])
                squares[rows], self.bounds.upper[piece][rows] = exact, _upper(exact)

    def _search(self, block: RowBlock, centroids: GroupedCentroids) -> NearerCentroids | None:
        """Finds nearer centroids in the slice."""
        part, first = self.bounds.part(block.places), self.nearest.first
        labels = part.labels.long()
        squares, nearest = self.nearest.squares[block.places], self.nearest.labels[block.places]
        of_slice = torch.where(self._is_in_slice(labels), labels - first, -1)
        bounds = Bounds(of_slice, part.upper, part.lower, part.squares)
        found = nearer_in_slice(block.take, centroids, bounds, Standing(squares, labels, first))
        if found:
            squares[found.rows], nearest[found.rows] = found.squares, found.labels.int()
        return found

    def _agree_on_nearest(self) -> None:
        """Sets the labels, and keeps those before as `nearest`; a centroid that is not the nearest bounds its group."""
        ranks = self.held.ranks
        for piece in self._pieces():
            rows, bounds = self.is_open[piece].nonzero()[:, 0], self.bounds.part(piece)
            if not len(rows):
                continue
            squares, labels = self.nearest.squares[piece][rows], self.nearest.labels[piece][rows].long()
            least = ranks.min_(squares.clone())
            agreed = ranks.min_(labels.masked_fill((squares > least) | (labels < 0), _NO_LABEL))
            others = (self._is_in_slice(labels) & (labels != agreed)).nonzero()[:, 0]
            group = self.groups.of[labels[others] - self.nearest.first]
            lower = rooted(squares[others].double() / GRID**2, 1 - SLACK)
            bounds.lower[rows[others], group] = torch.minimum(bounds.lower[rows[others], group], lower)
            self.nearest.labels[piece][rows] = bounds.labels[rows]
            bounds.labels[rows], bounds.upper[rows] = agreed.int(), _upper(least)

    def _add_changed(self, block: RowBlock, change: Stats) -> None:
        """Adds rows that came to the slice and subtracts those that left it."""
        before, after = self.nearest.labels[block.places].long(), self.bounds.labels[block.places].long()
        changed = before != after
        came, left = changed & self._is_in_slice(after), changed & self._is_in_slice(before)
        for labels, rows, sign in ((after, came.nonzero()[:, 0], 1), (before, left.nonzero()[:, 0], -1)):
            if len(rows):
                x, squares = joined(block.take(rows)), block.squares[rows]
                with self.adding:
                    change.add_(x, squares, labels[rows] - self.nearest.first, sign=sign)


def _upper(squares: Tensor) -> Tensor:
    """Upper bounds of distances, float32, from exact squared ones."""
    return rooted(squares.double() / GRID**2, 1 + SLACK)
