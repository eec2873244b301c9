"""Labels under a bound on cluster sizes: a cluster keeps its nearest rows, the others go to clusters with capacity.

Every step is a function of all rows: exact distances, ties by row and by label. So the labels are the same bits on any
number of ranks. No row travels.

Shapes: n rows of this rank, P of one block, K centroids, D dimensions, t choices per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import PIECE, ShardedRows, scratch
from grappa_dist.kmeans.assignments import RowLabels
from grappa_dist.kmeans.ivf import nearest_exactly
from grappa_dist.kmeans.sampling import distributed_topk
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.in_flight import Arriving, a_step_later

CHOICES = 16  # nearest clusters with capacity that are found per row at a time
_SQUARE_BITS = 51
_FREE = -2  # label of a row without a cluster; -1 is a bad row


def largest_size(num_rows: int, num_labels: int, balance: float) -> int:
    """Rows that a cluster may have: `balance` times the mean size, rounded up."""
    return ceil(Fraction(str(balance)) * num_rows / num_labels)  # of the decimal, 1.1 and not 1.1000000000000001


@dataclass(frozen=True)
class Balanced:
    """How labels were changed by the bound."""

    largest: int  # rows that a cluster may have
    moved: int  # rows of all ranks that are not in their nearest cluster
    rounds: int


def balance_labels(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, largest: int) -> Balanced:
    """Changes labels, in place, until no cluster has more than `largest` rows.

    A larger cluster keeps its nearest rows. The others apply to the nearest cluster with capacity, which takes the
    nearest of them up to its capacity; then the remaining ones apply to the next, until every row has a cluster.
    """
    assert largest * len(centroids) >= sharded.num_good, "there must be capacity for all"
    counts = rows.counts(sharded, len(centroids))
    moved = int((counts - largest).clamp(min=0).sum())
    if not moved:
        return Balanced(largest, 0, 0)
    _trim(sharded, rows, counts, largest)
    left, rounds = moved, 0
    while left:
        capacity = largest - rows.counts(sharded, len(centroids))
        left = _Round.of(sharded, rows, centroids, capacity).place_all(left)
        rounds += 1
    return Balanced(largest, moved, rounds)


def _trim(sharded: ShardedRows, rows: RowLabels, counts: Tensor, largest: int) -> None:
    """Frees the rows that a cluster above the bound cannot keep."""
    over = counts > largest
    groups = scratch((len(rows.labels),), torch.int32)
    for some in _slices(len(groups)):
        labels = rows.labels[some]
        groups[some] = torch.where((labels >= 0) & over[labels.clamp(min=0).long()], labels, -1)
    selection = distributed_topk(sharded, groups, rows.squares, torch.where(over, largest, 0), bits=_SQUARE_BITS)
    for some in _slices(len(groups)):
        kept = selection.takes(groups[some], rows.squares[some], torch.arange(some.start, some.stop) + sharded.first)
        rows.labels[some] = torch.where((groups[some] >= 0) & ~kept, _FREE, rows.labels[some])


@dataclass(frozen=True)
class _Round:
    """The free rows of this rank, and their nearest clusters with capacity at the start of the round."""

    sharded: ShardedRows
    rows: RowLabels
    capacity: Tensor  # (K,) int64
    positions: Tensor  # (m,) int64
    labels: Tensor  # (m, t) int32, nearest first
    squares: Tensor  # (m, t) int64
    applied: Tensor  # (n,) int32, the cluster that a row applies to, or -1
    keys: Tensor  # (n,) int64, its squared distance

    @staticmethod
    def of(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, capacity: Tensor) -> _Round:
        vacant = (capacity > 0).nonzero()[:, 0]
        positions = _free(rows)
        num, t = len(positions), min(CHOICES, len(vacant))
        labels, squares = scratch((num, t), torch.int32), scratch((num, t), torch.int64)
        prepared = Centroids.of(centroids[vacant.to(centroids.device)])

        def work(first: int) -> tuple[slice, Arriving, Arriving]:
            some = slice(first, min(num, first + sharded.block_rows))
            near, far = nearest_exactly(sharded.read(positions[some]), prepared, t)
            return some, Arriving.of(near), Arriving.of(far)

        for some, near, far in a_step_later(sharded.each(work, range(0, num, sharded.block_rows))):
            labels[some], squares[some] = vacant[near.take()].int(), far.take()
        all_rows = (len(rows.labels),)
        applied, keys = scratch(all_rows, torch.int32).fill_(-1), scratch(all_rows, torch.int64)
        return _Round(sharded, rows, capacity.clone(), positions, labels, squares, applied, keys)

    def place_all(self, left: int) -> int:
        """Applications until every free row has a cluster or full choices only; the free rows left on all ranks."""
        for _ in range(
            self.labels.shape[1]
        ):  # a cluster that did not take all who applied is full, so every choice is tried
            if not left:
                break
            left -= self._apply()
        return left

    def _apply(self) -> int:
        """Every free row applies to the nearest of its choices with capacity; how many rows of all ranks were taken."""
        for some in _slices(len(self.positions)):
            positions = self.positions[some]
            vacant = self.capacity[self.labels[some].long()] > 0
            choice = vacant.int().argmax(1, keepdim=True)  # the first of the largest
            applies = vacant.any(1) & (self.rows.labels[positions] == _FREE)
            self.applied[positions] = torch.where(applies, self.labels[some].gather(1, choice)[:, 0], -1)
            self.keys[positions] = self.squares[some].gather(1, choice)[:, 0]
        selection = distributed_topk(self.sharded, self.applied, self.keys, self.capacity, bits=_SQUARE_BITS)
        taken = torch.zeros_like(self.capacity)
        for some in _slices(len(self.positions)):
            positions = self.positions[some]
            applied, keys = self.applied[positions], self.keys[positions]
            accepted = selection.takes(applied, keys, positions + self.sharded.first)
            self.rows.labels[positions[accepted]] = applied[accepted]
            self.rows.squares[positions[accepted]] = keys[accepted]
            taken += torch.bincount(applied[accepted].long(), minlength=len(taken))
        taken = self.sharded.total(taken)
        self.capacity.sub_(taken)
        return int(taken.sum())


def _free(rows: RowLabels) -> Tensor:
    """Positions of the rows without a cluster, (m,)."""
    free = [int((rows.labels[some] == _FREE).sum()) for some in _slices(len(rows.labels))]
    positions, first = scratch((sum(free),), torch.int64), 0
    for some, num in zip(_slices(len(rows.labels)), free, strict=True):
        positions[first : first + num] = (rows.labels[some] == _FREE).nonzero()[:, 0] + some.start
        first += num
    return positions


def _slices(num: int) -> Iterator[slice]:
    return (slice(start, min(num, start + PIECE)) for start in range(0, num, PIECE))
