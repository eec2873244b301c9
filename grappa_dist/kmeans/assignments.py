"""Labels of this rank's rows with their distances to the centroids, and the passes over the rows that assign them.

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
from grappa_dist.search.dense import DenseCentroids, DenseRows, nearest_dense
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.in_flight import finish
from grappa_dist.search.rerank import Assignment, assign

_LIMB = 24  # low bits of a squared distance, summed separately from the rest, so that 2**36 rows fit

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowLabels:
    """Labels of all rows of this rank, by position; in scratch files instead of process memory."""

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
    """Some rows with the nearest centroids that a search found for them."""

    positions: Tensor  # (P,) in host memory
    x: Tensor  # (P, D) grid rows
    found: Assignment
    searched: int  # distances computed


@dataclass
class LabelPasses:
    """A clustering between its passes over the rows, by any search: labels, and the sums of the rows of each label.

    The sums are not computed anew in each pass: rows that change their label move from one sum to another.
    """

    sharded: ShardedRows
    rows: RowLabels
    stats: Stats  # of all ranks
    undecided: int = 0  # rows of this rank that floats left undecided in the last pass
    searched: int = 0  # distances computed on this rank in the last pass

    @staticmethod
    def over(sharded: ShardedRows, num_labels: int) -> LabelPasses:
        return LabelPasses(sharded, RowLabels.of(sharded), Stats.zeros(num_labels, sharded.dim, sharded.device))

    def advance(self, search: Callable[[Item], AssignedRows], items: Iterable[Item]) -> None:
        """One pass: labels, distances and stats from the result of `search` for each item."""
        change = Stats.zeros(len(self.stats.counts), self.sharded.dim, self.sharded.device)
        self.undecided = self.searched = 0
        for assigned in self.sharded.each(search, items):
            _add_reassignments(change, self.rows, assigned)
            _store(self.rows, assigned)
            self.undecided += assigned.found.undecided
            self.searched += assigned.searched
        self.stats.add_changes_(change, self.sharded.total)


def assign_rows(
    sharded: ShardedRows, search: Callable[[Item], AssignedRows], items: Iterable[Item]
) -> tuple[RowLabels, Tensor]:
    """Labels by `search`, in one pass without sums; and over all ranks, (2,), how many rows floats left undecided and
    how many distances were computed."""
    rows, counts = RowLabels.of(sharded), torch.zeros(2, dtype=torch.int64)
    for assigned in sharded.each(search, items):
        _store(rows, assigned)
        counts += torch.tensor([assigned.found.undecided, assigned.searched])
    return rows, sharded.total(counts)


def exact_search(sharded: ShardedRows, centroids: Tensor) -> Callable[[tuple[Tensor, Tensor]], AssignedRows]:
    """The search for the nearest centroid of each row of a block."""
    prepared, dense = Centroids.of(centroids, sharded.generator), sharded.dense
    if dense is not None:
        of_device = DenseCentroids.of(prepared)

        def search_dense(block: tuple[Tensor, Tensor]) -> AssignedRows:
            positions, x = block
            rows = DenseRows(x, exact_square(x), dense.form_of(x))
            found = finish(nearest_dense(rows, of_device, distances=True))
            assert found.squares is not None
            assigned = Assignment(found.labels, found.squares, found.by_integers)
            return AssignedRows(positions, x, assigned, len(x) * len(centroids))

        return search_dense

    def search(block: tuple[Tensor, Tensor]) -> AssignedRows:
        positions, x = block
        return AssignedRows(positions, x, assign(x, prepared), len(x) * len(centroids))

    return search


def _store(rows: RowLabels, assigned: AssignedRows) -> None:
    rows.labels[assigned.positions] = assigned.found.labels.int().cpu()
    rows.squares[assigned.positions] = assigned.found.squares.cpu()


def _add_reassignments(change: Stats, rows: RowLabels, assigned: AssignedRows) -> None:
    after, before = assigned.found.labels, rows.labels[assigned.positions].long().to(assigned.x.device)
    reassigned = (before != after).nonzero()[:, 0]
    if len(reassigned):
        first_pass = bool((before[reassigned] < 0).any())  # then it is the first one of all rows of the block
        x = assigned.x[reassigned]
        change.add_(x, exact_square(x), after[reassigned], None if first_pass else before[reassigned])
