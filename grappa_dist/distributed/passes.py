"""Passes of exact k-means over the rows of a rank, for one number of labels or for several at once.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.scratch import scratch
from grappa_dist.distributed.sharded_rows import RowBlock, Share
from grappa_dist.kmeans.update import Stats
from grappa_dist.kmeans.yinyang import GroupedCentroids, reassign
from grappa_dist.ops.bounds import Bounds, Drift, Groups, num_bounds
from grappa_dist.ops.moves import Moves
from grappa_dist.search.candidates import Centroids, joined


def advance_together(wanted: Sequence[tuple[BoundedPasses, Tensor]]) -> list[Centroids]:
    """Makes each of several clusterings of one share the one by these centroids, reading the rows once for all."""
    share = wanted[0][0].share
    assert all(kept.share is share for kept, _ in wanted)
    passes = [_Pass.of(kept, centroids) for kept, centroids in wanted]

    def work(block: RowBlock) -> list[Moves]:
        return [one.over(block) for one in passes]

    for found in share.each(work, share.row_blocks()):
        for one, moves in zip(passes, found, strict=True):
            one.kept.by_integers += moves.by_integers
            one.kept.searched += moves.searched
    for one in passes:
        one.end()
    return [one.grouped.whole for one in passes]


@dataclass
class BoundedPasses:
    """An exact k-means between its passes over the rows: labels, bounds of distances that spare most of the search, and
    what the rows of a label add up to, which only rows that change their label change."""

    share: Share
    groups: Groups
    bounds: Bounds  # of the good rows, in their order
    stats: Stats  # of all ranks
    centroids: Tensor  # of the last pass
    number: int = 0
    by_integers: int = 0  # rows of this rank that no float could settle, over all passes
    searched: int = 0  # distances that it estimated

    @staticmethod
    def over(share: Share, centroids: Tensor) -> BoundedPasses:
        num_labels, dim = centroids.shape
        groups = Groups.around(centroids, num_bounds(num_labels, dim))
        num = share.rows.num_good
        bounds = Bounds(
            labels=scratch((num,), torch.int32).fill_(-1),
            upper=scratch((num,), torch.float32).fill_(math.inf),
            lower=scratch((num, len(groups.members)), torch.float32).fill_(-math.inf),
            squares=share.squares,
        )
        return BoundedPasses(share, groups, bounds, Stats.zeros(num_labels, dim, share.device), centroids)

    def labels(self) -> list[np.ndarray]:
        """Of the rank's rows by shard, (P,) int32, -1 for bad rows."""
        parts, first = [], 0
        for good in self.share.rows.good:
            part = np.full(len(good), -1, dtype=np.int32)
            part[good] = self.bounds.labels[first : first + int(good.sum())].numpy()
            parts.append(part)
            first += int(good.sum())
        return parts


@dataclass(frozen=True)
class _Pass:
    """One pass of one clustering: labels, bounds and sums by new centroids."""

    kept: BoundedPasses
    grouped: GroupedCentroids
    drift: Drift | None  # of the centroids since the last pass, if there was one
    change: Stats  # of this rank's sums
    adding: Lock = field(default_factory=Lock)

    @staticmethod
    def of(kept: BoundedPasses, centroids: Tensor) -> _Pass:
        grouped = GroupedCentroids.of(centroids, kept.groups, kept.share.proposer)
        drift = Drift.between(kept.centroids, centroids, kept.groups) if kept.number else None
        num_labels, dim = centroids.shape
        return _Pass(kept, grouped, drift, Stats.zeros(num_labels, dim, kept.share.device))

    def over(self, block: RowBlock) -> Moves:
        part = self.kept.bounds.part(block.places)
        bounds = part.to(self.kept.share.device)
        if self.drift:
            bounds.shift_(self.drift)
        moves = reassign(block.take, self.grouped, bounds)
        part.copy_(bounds)
        if len(moves.rows):
            x, squares = joined(block.take(moves.rows)), bounds.squares[moves.rows]
            with self.adding:
                self.change.add_(x, squares, moves.after, moves.before if self.drift else None)
        return moves

    def end(self) -> None:
        self.kept.centroids, self.kept.number = self.grouped.whole.values, self.kept.number + 1
        self.kept.stats.add_changes_(self.change, self.kept.share.total)
