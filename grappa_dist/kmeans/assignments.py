"""Labels of this rank's rows with their distances to the centroids, and the passes over the rows that assign them.

On a device, where passes are dense (search/dense.py), labels and distances stay there while a pass changes them, and
the host reads counts of a block while another block is under way.

Shapes: n rows of this rank, P of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import PIECE, ShardedRows, scratch
from grappa_dist.distributed.worker import until_all_ranks_finish
from grappa_dist.kmeans.update import Stats
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.dense import DenseCentroids, DenseRows, nearest_dense
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.in_flight import Work, compact, finish, in_flight, sent
from grappa_dist.search.rerank import Assignment, assign

_LIMB = 24  # low bits of a squared distance, summed separately from the rest, so that 2**36 rows fit

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowLabels:
    """Labels of all rows of this rank, by position; in scratch files instead of process memory, or on a device."""

    labels: Tensor  # (n,) int32, -1 for bad rows and before the first pass
    squares: Tensor  # (n,) int64, exact squared distance to the centroid of the label, in units of 2**-48

    @staticmethod
    def of(sharded: ShardedRows) -> RowLabels:
        num = (len(sharded.rows),)
        if sharded.dense is None:
            return RowLabels(scratch(num, torch.int32).fill_(-1), scratch(num, torch.int64))
        labels = torch.full(num, -1, dtype=torch.int32, device=sharded.device)
        return RowLabels(labels, torch.zeros(num, dtype=torch.int64, device=sharded.device))

    def on_host(self) -> RowLabels:
        """The same in host memory, in scratch files where they were on a device."""
        if self.labels.device.type == "cpu":
            return self
        return RowLabels(*(scratch(tuple(t.shape), t.dtype).copy_(t) for t in (self.labels, self.squares)))

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


Search: TypeAlias = Callable[[Item], AssignedRows | Work[AssignedRows]]
"""An item -> rows with the nearest centroids that were found; on a device, work that may read counts."""


@dataclass
class LabelPasses:
    """A clustering between its passes over the rows, by any search: labels, and the sums of the rows of each label.

    The sums are not computed anew in each pass: rows that change their label move from one sum to another.
    """

    sharded: ShardedRows
    current: RowLabels
    stats: Stats  # of all ranks
    number: int = 0  # of passes so far
    undecided: int = 0  # rows of this rank that floats left undecided in the last pass
    searched: int = 0  # distances computed on this rank in the last pass

    @staticmethod
    def over(sharded: ShardedRows, num_labels: int) -> LabelPasses:
        return LabelPasses(sharded, RowLabels.of(sharded), Stats.zeros(num_labels, sharded.dim, sharded.device))

    @property
    def rows(self) -> RowLabels:
        """Labels and distances of the last pass, in host memory."""
        return self.current.on_host()

    def advance(self, search: Search[Item], items: Iterable[Item]) -> None:
        """One pass: labels, distances and stats from the result of `search` for each item."""
        change = Stats.zeros(len(self.stats.counts), self.sharded.dim, self.sharded.device)
        self.undecided = self.searched = 0
        dense = self.sharded.dense is not None
        for assigned in searched(self.sharded, search, items, self._taking(change) if dense else None):
            if not dense:
                _add_reassignments(change, self.current, assigned)
                _store(self.current, assigned, assigned.positions)
            self.undecided += assigned.found.undecided
            self.searched += assigned.searched
        self.number += 1
        self.stats.add_changes_(change, self.sharded.total)

    def _taking(self, change: Stats) -> Callable[[AssignedRows], Work[AssignedRows]]:
        """What takes labels and distances of some rows over, on the device, and adds what changes to `change`."""

        def take(assigned: AssignedRows) -> Work[AssignedRows]:
            at, x, after = sent(assigned.positions, self.sharded.device), assigned.x, assigned.found.labels
            before = self.current.labels[at].long()
            _store(self.current, assigned, at)
            if not self.number:
                change.add_(x, exact_square(x), after)
                return assigned
            places, count = compact(before != after)
            (num,) = yield count
            if num:
                some = places[:num]
                x = x.index_select(0, some)
                change.add_(x, exact_square(x), after[some], before[some])
            return assigned

        return take


def searched(
    sharded: ShardedRows,
    search: Search[Item],
    items: Iterable[Item],
    then: Callable[[AssignedRows], Work[AssignedRows]] | None = None,
) -> Generator[AssignedRows, None, None]:
    """What `search` finds for this rank's items, as `ShardedRows.each`; on a device several blocks are under way.

    Args:
        then: what is done with the rows that were found, on a device, where it may read counts.
    """

    def work(item: Item) -> Work[AssignedRows]:
        found = search(item)
        assigned = found if isinstance(found, AssignedRows) else (yield from found)
        return assigned if then is None else (yield from then(assigned))

    if sharded.dense is None:
        return sharded.each(lambda item: finish(work(item)), items)
    return until_all_ranks_finish(sharded.comm, in_flight(map(work, items)), sharded.stop_requested)


def assign_rows(sharded: ShardedRows, search: Search[Item], items: Iterable[Item]) -> tuple[RowLabels, Tensor]:
    """Labels by `search`, in one pass without sums, in host memory; and over all ranks, (2,), how many rows floats left
    undecided and how many distances were computed."""
    rows, counts = RowLabels.of(sharded), torch.zeros(2, dtype=torch.int64)
    for assigned in searched(sharded, search, items):
        at = assigned.positions if sharded.dense is None else sent(assigned.positions, sharded.device)
        _store(rows, assigned, at)
        counts += torch.tensor([assigned.found.undecided, assigned.searched])
    return rows.on_host(), sharded.total(counts)


def exact_search(sharded: ShardedRows, centroids: Tensor) -> Search[tuple[Tensor, Tensor]]:
    """The search for the nearest centroid of each row of a block."""
    prepared = Centroids.of(centroids, sharded.generator)
    if sharded.dense is not None:
        of_device = DenseCentroids.of(prepared)
        return lambda block: search_dense(sharded, *block, of_device)

    def search(block: tuple[Tensor, Tensor]) -> AssignedRows:
        positions, x = block
        return AssignedRows(positions, x, assign(x, prepared), len(x) * len(centroids))

    return search


def search_dense(sharded: ShardedRows, positions: Tensor, x: Tensor, centroids: DenseCentroids) -> Work[AssignedRows]:
    """The nearest of some centroids to grid rows (P, D) on a device, at these positions."""
    assert sharded.dense is not None
    rows = DenseRows(x, exact_square(x), sharded.dense.form_of(x))
    found = yield from nearest_dense(rows, centroids, distances=True)
    assert found.squares is not None
    assigned = Assignment(found.labels, found.squares, found.by_integers)
    return AssignedRows(positions, x, assigned, len(x) * len(centroids))


def _store(rows: RowLabels, assigned: AssignedRows, at: Tensor) -> None:
    """Keeps what was found for the rows at positions `at`, where the labels are."""
    rows.labels[at] = assigned.found.labels.int().to(rows.labels.device)
    rows.squares[at] = assigned.found.squares.to(rows.squares.device)


def _add_reassignments(change: Stats, rows: RowLabels, assigned: AssignedRows) -> None:
    after, before = assigned.found.labels, rows.labels[assigned.positions].long()
    reassigned = (before != after).nonzero()[:, 0]
    if len(reassigned):
        first_pass = bool((before[reassigned] < 0).any())  # then it is the first one of all rows of the block
        x = assigned.x[reassigned]
        change.add_(x, exact_square(x), after[reassigned], None if first_pass else before[reassigned])
