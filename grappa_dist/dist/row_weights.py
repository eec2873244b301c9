"""Squared distances of all ranks' rows from the nearest centroid so far, by which first centroids are drawn.

Shapes: n rows of this rank, P of one block, D dimensions, m rows that are looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.dist.scratch import scratch
from grappa_dist.dist.share import RowBlock, Share
from grappa_dist.ops.nearest import assign
from grappa_dist.ops.proposals import Centroids
from grappa_dist.ops.seeding import from_weights, to_weights

_AT_ONCE = 2**14  # centroids that a block of rows is compared with, so that their table of distances stays small


@dataclass(frozen=True)
class RowWeights:
    """Weights of this rank's rows, lowered in place as centroids are found."""

    share: Share
    squares: Tensor  # (n,) int64, in units of 2**-27; 0 for bad rows
    nearest: Tensor | None = None  # (n,) int32, the centroid that each belongs to; of equally near ones the first
    times: Tensor | None = None  # (n,) int64, by which each counts; once each where it is None

    @staticmethod
    def of(share: Share, *, nearest: bool = False, times: Tensor | None = None) -> RowWeights:
        """The same for all good rows: the first centroid may be any of them."""
        num = (len(share.rows),)
        labels = scratch(num, torch.int32).fill_(-1) if nearest else None
        weights = RowWeights(share, scratch(num, torch.int64), labels, times)
        weights.fill(1)
        return weights

    def fill(self, value: int) -> None:
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

    def lower(self, centroids: Tensor, first: int = 0) -> None:
        """Lowers the weights to those by the nearest of some new centroids, in one reading of the rows.

        Args:
            centroids: (m, D); those before them were `first`.
        """
        parts = [Centroids.of(part, self.share.proposer) for part in centroids.split(_AT_ONCE)]

        def work(block: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
            x = block.x
            known = self.squares[block.positions].to(x.device)
            labels, start = torch.full_like(known, -1), first
            for part in parts:
                found = assign(x, part, squares=block.squares, within=from_weights(known))
                now = to_weights(found.squares)
                nearer = (found.labels >= 0) & (now < known)
                known[nearer], labels[nearer] = now[nearer], found.labels[nearer] + start
                start += len(part.values)
            nearer = labels >= 0
            return block.positions[nearer.cpu()], known[nearer].cpu(), labels[nearer].int().cpu()

        for positions, squares, labels in self.share.each(work, self.share.row_blocks()):
            self.squares[positions] = squares
            if self.nearest is not None:
                self.nearest[positions] = labels

    def _counted(self) -> Tensor:
        return self.squares if self.times is None else self.squares * self.times


def rows_at(share: Share, places: Tensor) -> Tensor:
    """Grid rows (m, D) at some places among all rows, on all ranks."""
    own = are_here(share, places)
    rows = torch.zeros(len(places), share.dim)
    if bool(own.any()):
        rows[own] = share.rows.take(places[own] - share.first)
    return share.total(rows).to(share.device)


def are_here(share: Share, places: Tensor) -> Tensor:
    """Which places among all rows are of this rank's rows, (m,) bool."""
    return (places >= share.first) & (places < share.first + len(share.rows))
