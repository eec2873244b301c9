"""Labels under a bound on the size of a cluster: the nearest rows keep theirs, the others go where there is room.

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

CHOICES = 16  # clusters with room that are looked up per row at a time
_SQUARE_BITS = 51
_FREE = -2  # of a row without a cluster; -1 is a bad row


def largest_size(num_rows: int, num_labels: int, balance: float) -> int:
    """Rows that a cluster may have: `balance` times the mean size, rounded up."""
    return ceil(Fraction(str(balance)) * num_rows / num_labels)  # as it was written, 1.1 and not 1.1000000000000001


@dataclass(frozen=True)
class Balanced:
    """What the bound took."""

    largest: int  # rows that a cluster may have
    moved: int  # rows of all ranks that are not with their first cluster
    rounds: int


def balance_labels(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, largest: int) -> Balanced:
    """Changes labels, in place, until no cluster has more than `largest` rows.

    A cluster that has more keeps its nearest ones. The others apply to the nearest cluster that has room, which takes
    the nearest of them as far as it goes; then those left apply to the next, until all have a place.
    """
    assert largest * len(centroids) >= sharded.num_good, "there must be room for all"
    counts = rows.counts(sharded, len(centroids))
    moved = int((counts - largest).clamp(min=0).sum())
    if not moved:
        return Balanced(largest, 0, 0)
    _trim(sharded, rows, counts, largest)
    left, rounds = moved, 0
    while left:
        room = largest - rows.counts(sharded, len(centroids))
        left = _Round.of(sharded, rows, centroids, room).place_all(left)
        rounds += 1
    return Balanced(largest, moved, rounds)


def _trim(sharded: ShardedRows, rows: RowLabels, counts: Tensor, largest: int) -> None:
    """Frees the rows that an overfull cluster cannot keep."""
    over = counts > largest
    groups = scratch((len(rows.labels),), torch.int32)
    for some in _slices(len(groups)):
        labels = rows.labels[some]
        groups[some] = torch.where((labels >= 0) & over[labels.clamp(min=0).long()], labels, -1)
    cut = distributed_topk(sharded, groups, rows.squares, torch.where(over, largest, 0), bits=_SQUARE_BITS)
    for some in _slices(len(groups)):
        kept = cut.takes(groups[some], rows.squares[some], torch.arange(some.start, some.stop) + sharded.first)
        rows.labels[some] = torch.where((groups[some] >= 0) & ~kept, _FREE, rows.labels[some])


@dataclass(frozen=True)
class _Round:
    """The free rows of this rank, and the nearest clusters that had room when it began."""

    sharded: ShardedRows
    rows: RowLabels
    room: Tensor  # (K,) int64
    positions: Tensor  # (m,) int64
    labels: Tensor  # (m, t) int32, nearest first
    squares: Tensor  # (m, t) int64
    asked: Tensor  # (n,) int32, the cluster that a row applies to, or -1
    keys: Tensor  # (n,) int64, its squared distance

    @staticmethod
    def of(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, room: Tensor) -> _Round:
        vacant = (room > 0).nonzero()[:, 0]
        positions = _free(rows)
        num, t = len(positions), min(CHOICES, len(vacant))
        labels, squares = scratch((num, t), torch.int32), scratch((num, t), torch.int64)
        known = Centroids.of(centroids[vacant.to(centroids.device)])

        def work(first: int) -> tuple[slice, Tensor, Tensor]:
            some = slice(first, min(num, first + sharded.block_rows))
            near, far = nearest_exactly(sharded.read(positions[some]), known, t)
            return some, vacant[near.cpu()].int(), far.cpu()

        for some, near, far in sharded.each(work, range(0, num, sharded.block_rows)):
            labels[some], squares[some] = near, far
        all_rows = (len(rows.labels),)
        asked, keys = scratch(all_rows, torch.int32).fill_(-1), scratch(all_rows, torch.int64)
        return _Round(sharded, rows, room.clone(), positions, labels, squares, asked, keys)

    def place_all(self, left: int) -> int:
        """Applications until every free row has a place or has asked all of its choices; the free rows of all ranks."""
        for _ in range(self.labels.shape[1]):  # a cluster that turned rows away is full, so each asks every choice
            if not left:
                break
            left -= self._apply()
        return left

    def _apply(self) -> int:
        """Every free row asks the nearest of its choices that has room; how many rows of all ranks were taken."""
        for some in _slices(len(self.positions)):
            positions = self.positions[some]
            vacant = self.room[self.labels[some].long()] > 0
            choice = vacant.int().argmax(1, keepdim=True)  # the first of the largest
            asks = vacant.any(1) & (self.rows.labels[positions] == _FREE)
            self.asked[positions] = torch.where(asks, self.labels[some].gather(1, choice)[:, 0], -1)
            self.keys[positions] = self.squares[some].gather(1, choice)[:, 0]
        cut = distributed_topk(self.sharded, self.asked, self.keys, self.room, bits=_SQUARE_BITS)
        taken = torch.zeros_like(self.room)
        for some in _slices(len(self.positions)):
            positions = self.positions[some]
            asked, keys = self.asked[positions], self.keys[positions]
            won = cut.takes(asked, keys, positions + self.sharded.first)
            self.rows.labels[positions[won]], self.rows.squares[positions[won]] = asked[won], keys[won]
            taken += torch.bincount(asked[won].long(), minlength=len(taken))
        taken = self.sharded.total(taken)
        self.room.sub_(taken)
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
