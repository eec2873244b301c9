"""The labels of this rank's rows with their distances to the centroids, and the passes over the rows that set them.

Shapes: n rows of this rank, P of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import PIECE, ShardedRows, scratch
from grappa_dist.kmeans.update import Stats
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.rerank import Assignment, assign

_LIMB = 24  # bits of a squared distance that are summed apart, so that 2**36 rows fit

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowLabels:
    """Of all rows of this rank, by position; in scratch, outside of the process's own memory."""

    labels: Tensor  # (n,) int32, -1 for bad rows and before the first pass
    squares: Tensor  # (n,) int64, exact squared distance to the centroid of the label, in units of 2**-48

    @staticmethod
    def of(sharded: ShardedRows) -> RowLabels:
        num = (len(sharded.rows),)
        return RowLabels(scratch(num, torch.int32).fill_(-1), scratch(num, torch.int64))

    def by_shard(self, sharded: ShardedRows) -> list[np.ndarray]:
        """(P,) int32 each, views."""
        ends = np.cumsum([len(shard) for shard in sharded.rows.shards])
        return np.split(self.labels.numpy(), ends[:-1].tolist()) if len(ends) else []

    def counts(self, sharded: ShardedRows, num_labels: int) -> Tensor:
        """Rows of all ranks per label, (K,) int64."""
        counts = torch.zeros(num_labels, dtype=torch.int64)
        for labels, _ in self._pieces():
            counts += torch.bincount(labels.long(), minlength=num_labels)
        return sharded.total(counts)

    def inertia(self, sharded: ShardedRows) -> int:
        """Sum of the squared distances of the rows of all ranks, exact, in units of 2**-48."""
        limbs = torch.zeros(2, dtype=torch.int64)
        for _, squares in self._pieces():
            limbs += torch.stack([(squares & (2**_LIMB - 1)).sum(), (squares >> _LIMB).sum()])
        low, high = sharded.total(limbs).tolist()
        return int(low) + (int(high) << _LIMB)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), PIECE):
            labels, squares = self.labels[start : start + PIECE], self.squares[start : start + PIECE]
            yield labels[labels >= 0], squares[labels >= 0]


@dataclass(frozen=True)
class AssignedRows:
    """Some rows, and the nearest centroids that a search found for them."""

    positions: Tensor  # (P,) in host memory
    x: Tensor  # (P, D) grid rows
    found: Assignment
    searched: int  # distances computed


@dataclass
class LabelPasses:
    """A clustering between its passes over the rows, by any search: labels, and what the rows of a label add up to.

    The sums are not made anew in each pass: rows that change their label are taken from one sum and added to another.
    """

    sharded: ShardedRows
    rows: RowLabels
    stats: Stats  # of all ranks
    undecided: int = 0  # of this rank in the last pass, as is `searched`
    searched: int = 0

    @staticmethod
    def over(sharded: ShardedRows, num_labels: int) -> LabelPasses:
        return LabelPasses(sharded, RowLabels.of(sharded), Stats.zeros(num_labels, sharded.dim, sharded.device))

    def advance(self, work: Callable[[Item], AssignedRows], items: Iterable[Item]) -> None:
        """Labels, distances and stats by what `work` finds for each item."""
        change = Stats.zeros(len(self.stats.counts), self.sharded.dim, self.sharded.device)
        self.undecided = self.searched = 0
        for settled in self.sharded.each(work, items):
            _add_moves(change, self.rows, settled)
            _keep(self.rows, settled)
            self.undecided += settled.found.undecided
            self.searched += settled.searched
        self.stats.add_changes_(change, self.sharded.total)


def assign_rows(
    sharded: ShardedRows, work: Callable[[Item], AssignedRows], items: Iterable[Item]
) -> tuple[RowLabels, Tensor]:
    """Labels as `work` finds them, in one pass that adds nothing up; and of all ranks, (2,), how many rows floats left
    undecided and how many distances were computed."""
    rows, told = RowLabels.of(sharded), torch.zeros(2, dtype=torch.int64)
    for settled in sharded.each(work, items):
        _keep(rows, settled)
        told += torch.tensor([settled.found.undecided, settled.searched])
    return rows, sharded.total(told)


def exactly(sharded: ShardedRows, centroids: Tensor) -> Callable[[tuple[Tensor, Tensor]], AssignedRows]:
    """The search for the nearest centroid of each row of a share's block."""
    prepared = Centroids.of(centroids, sharded.generator)

    def work(block: tuple[Tensor, Tensor]) -> AssignedRows:
        positions, x = block
        return AssignedRows(positions, x, assign(x, prepared), len(x) * len(centroids))

    return work


def _keep(rows: RowLabels, settled: AssignedRows) -> None:
    rows.labels[settled.positions] = settled.found.labels.int().cpu()
    rows.squares[settled.positions] = settled.found.squares.cpu()


def _add_moves(change: Stats, rows: RowLabels, settled: AssignedRows) -> None:
    after, before = settled.found.labels, rows.labels[settled.positions].long().to(settled.x.device)
    moved = (before != after).nonzero()[:, 0]
    if len(moved):
        first_time = bool((before[moved] < 0).any())  # then it is that of all rows of the block
        x = settled.x[moved]
        change.add_(x, exact_square(x), after[moved], None if first_time else before[moved])
