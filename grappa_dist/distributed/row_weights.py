"""Squared distances of all ranks' rows from the nearest centroid so far, by which first centroids are drawn.

Shapes: n rows of this rank, P of one block, D dimensions, m rows that are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.distributed.scratch import scratch
from grappa_dist.distributed.sharded_rows import RowBlock, Share
from grappa_dist.ops.seeding import from_weights, to_weights
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID
from grappa_dist.search.rerank import FAR, Assignment, assign

_AT_ONCE = 2**14  # centroids that a block of rows is compared with, so that their table of distances stays small
_READ = 256  # rows that are looked up one by one between two looks at the other ranks


@dataclass(frozen=True)
class RowWeights:
    """Weights of this rank's rows, lowered in place as centroids are found."""

    share: Share
    squares: Tensor  # (n,) int64, in units of 2**-27; 0 for bad rows
    nearest: Tensor | None = None  # (n,) int32, the nearest centroid; of several rounds the first of that weight
    times: Tensor | None = None  # (n,) int64, by which each counts; once each where it is None

    @staticmethod
    def of(share: Share, *, nearest: bool = False, times: Tensor | None = None) -> RowWeights:
        """The same for all good rows: the first centroid may be any of them."""
        num = (len(share.rows),)
        labels = scratch(num, torch.int32).fill_(-1) if nearest else None
        weights = RowWeights(share, scratch(num, torch.int64), labels, times)
        weights._fill(1)
        return weights

    def _fill(self, value: int) -> None:
        """Gives all good rows the same weight."""
        for positions in self.share.good_positions():
            self.squares[positions] = value

    def totals(self) -> list[int]:
        """Sums of each rank's."""
        return [int(total) for total in self.share.gather(self._counted().sum()[None])]

    def located(self, targets: list[int], totals: list[int]) -> tuple[Tensor, list[int]]:
        """Places among all rows, (m,), and squares of the rows on which targets below the sum of all totals fall.

        A target falls on the row at which the running sum of weights passes it; the rank that has it tells the others.
        """
        lower_ranks = sum(totals[: self.share.comm.rank])
        ends = self._counted().cumsum(0)
        own = [i for i, t in enumerate(targets) if 0 <= t - lower_ranks < totals[self.share.comm.rank]]
        found = torch.zeros(len(targets), 2, dtype=torch.int64)
        if own:
            positions = torch.searchsorted(ends, torch.tensor([targets[i] - lower_ranks for i in own]), right=True)
            found[own] = torch.stack([positions + self.share.first, self.squares[positions]], 1)
        places, squares = self.share.total(found).unbind(1)
        return places, squares.tolist()

    def lower(self, rounds: Sequence[Tensor], first: int = 0) -> None:
        """Lowers the weights to those by the nearest of some new centroids, in one reading of the rows.

        Args:
            rounds: centroids (m, D) each, in the order in which they were found; `first` were found before them.
        """
        if not first:
            self._fill(FAR)
        prepared = [[Centroids.of(part, self.share.proposer) for part in some.split(_AT_ONCE)] for some in rounds]

        def work(block: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
            x, known = block.x, self.squares[block.positions].to(self.share.device)
            labels, before = torch.full_like(known, -1), first
            for parts, some in zip(prepared, rounds, strict=True):
                found = _nearest(x, block.squares, parts, from_weights(known))
                now = to_weights(found.squares)
                nearer = now < known
                known, labels = torch.where(nearer, now, known), torch.where(nearer, found.labels + before, labels)
                before += len(some)
            nearer = labels >= 0
            return block.positions[nearer.cpu()], known[nearer].cpu(), labels[nearer].int().cpu()

        for positions, squares, labels in self.share.each(work, self.share.row_blocks()):
            self.squares[positions] = squares
            if self.nearest is not None:
                self.nearest[positions] = labels

    def _counted(self) -> Tensor:
        return self.squares if self.times is None else self.squares * self.times


def _nearest(x: Tensor, squares: Tensor, parts: Sequence[Centroids], within: Tensor) -> Assignment:
    """As `assign` with all parts at once; labels count on from part to part."""
    best = Assignment(torch.full_like(squares, -1, dtype=torch.int64), torch.full_like(squares, FAR, dtype=torch.int64))
    first = 0
    for part in parts:
        found = assign(x, part, squares=squares, within=within)
        nearer = found.squares < best.squares
        labels = torch.where(nearer, found.labels + first, best.labels)
        best = Assignment(labels, torch.minimum(found.squares, best.squares))
        within = torch.minimum(within, best.squares.double() / GRID**2)
        first += len(part.values)
    return best


def rows_at(share: Share, places: Tensor) -> Tensor:
    """Grid rows (m, D) at some places among all rows, on all ranks."""
    rows = torch.zeros(len(places), share.dim)
    own = are_here(share, places).nonzero()[:, 0]

    def read(some: Tensor) -> tuple[Tensor, Tensor]:
        return some, share.rows.take(places[some] - share.first)

    for some, x in share.each(read, own.split(_READ) if len(own) else ()):
        rows[some] = x
    return share.total(rows).to(share.device)


def are_here(share: Share, places: Tensor) -> Tensor:
    """Which places among all rows are of this rank's rows, (m,) bool."""
    return (places >= share.first) & (places < share.first + len(share.rows))
