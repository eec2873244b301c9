"""k-means over the ranks of one job: the same result on any number of ranks, for any split of the rows and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (ops/kmeans.py) and every number that travels is an integer.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.dist.comm import Comm
from grappa_dist.dist.lloyd import SQUARE_UNIT, Progress, Updates, lloyd
from grappa_dist.dist.scratch import scratch
from grappa_dist.dist.search import Rows, row_problem
from grappa_dist.dist.sharded_seeding import seed_centroids
from grappa_dist.dist.share import BLOCK_ROWS, RowBlock, Share, join_rows
from grappa_dist.dist.threads import side_by_side
from grappa_dist.ops.bounds import Bounds, Drift, Groups
from grappa_dist.ops.exact import to_grid
from grappa_dist.ops.kmeans import Stats, finish
from grappa_dist.ops.proposals import Centroids, joined
from grappa_dist.ops.reassign import GroupedCentroids, Moves, reassign

FEW_LABELS = 512  # so few are searched in one go
GROUP_SIZE = 256  # centroids per bound, at least, on the average
DIMENSIONS_PER_BOUND = 8  # of a row for each of its lower bounds, at least


@dataclass(frozen=True)
class KMeansResult:
    """The same on every rank, except for `labels`, which are those of the rank's own rows."""

    centroids: np.ndarray  # (K, D) float32
    labels: list[np.ndarray]  # for each own shard (P,) int32, -1 for bad rows; nearest to `centroids`
    counts: np.ndarray  # (K,) int64, rows per label
    inertia: list[float]  # sum of squared distances before each update, then that of the returned labels
    empty_repaired: int  # empty clusters given a part of another, over all iterations
    empty_left: int  # labels without a row
    exact_share: float  # of all assignments, those left open by estimates; depends on ranks, blocks and machine
    searched_share: float  # of all distances to all centroids, those that bounds did not spare; likewise


def sharded_kmeans(
    comm: Comm,
    rows: Rows,
    num_labels: int,
    *,
    block_rows: int = BLOCK_ROWS,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> KMeansResult:
    """k-means of the good rows of all ranks, as `kmeans` with its settings. All ranks call it with the same ones."""
    return kmeans(join_rows(comm, rows, block_rows=block_rows, device=torch.device(device)), num_labels, **settings)


def kmeans(
    share: Share,
    num_labels: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = False,
    tolerance: float = 0.0,
    on_iteration: Callable[[int, float], None] = lambda iteration, inertia: None,
    initial: np.ndarray | None = None,
    resume: Progress | None = None,
    on_update: Callable[[Progress], None] = lambda progress: None,
) -> KMeansResult:
    """k-means++, then Lloyd. All ranks call it with the same settings.

    Args:
        iterations: updates of the centroids at most; fewer when they no longer move.
        spherical: centroids are normalised after every update.
        tolerance: stop when an iteration lowers inertia by less than this share of it; 0 never does.
        on_iteration: told the number of updates so far and the inertia they led to.
        initial: centroids (K, D) to start from instead of k-means++.
        resume: what `on_update` was told last, to go on from there.
        on_update: told what a later call can resume from, after the initialisation and after every update.
    """
    if not 1 <= num_labels <= share.num_good:
        raise ValueError(f"num_labels must be from 1 to the number of good rows, {share.num_good}, got {num_labels}")
    shape = (num_labels, share.dim)
    if resume is None:
        start = seed_centroids(share, num_labels, seed) if initial is None else _checked_initial(initial, shape)
        resume = Progress(start.cpu().numpy(), ())
        on_update(resume)
    _check_resume(resume, shape, iterations)
    how = Updates(
        iterations=iterations,
        tolerance=tolerance,
        spherical=spherical,
        on_iteration=on_iteration,
        on_update=on_update,
    )
    return _iterated(share, resume, how)


def _check_resume(resume: Progress, shape: tuple[int, int], iterations: int) -> None:
    if resume.centroids.shape != shape or len(resume.inertia) > iterations:
        raise ValueError(
            f"resume has {resume.centroids.shape} centroids after {len(resume.inertia)} updates, "
            f"expected {shape} after at most {iterations}"
        )


def _iterated(share: Share, start: Progress, how: Updates) -> KMeansResult:
    passes = LloydPasses.over(share, torch.from_numpy(start.centroids).to(share.device))

    def finish_all(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        return finish(centroids, passes.stats, spreads, step, spherical=how.spherical)

    return passes.result(lloyd(passes, passes.advance, finish_all, start, how))


@dataclass
class LloydPasses:
    """Passes over a share's rows that keep what they learn: bounds per row, and sums that only moved rows change."""

    share: Share
    groups: Groups
    bounds: Bounds  # of the good rows, in their order
    stats: Stats  # of all ranks
    centroids: Tensor  # of the last pass
    number: int = 0
    undecided: int = 0  # of this rank, as is `searched`
    searched: int = 0

    @staticmethod
    def over(share: Share, centroids: Tensor) -> LloydPasses:
        num_labels, dim = centroids.shape
        few = num_labels <= FEW_LABELS
        num_groups = 1 if few else min(num_labels // GROUP_SIZE, dim // DIMENSIONS_PER_BOUND)
        groups = Groups.around(centroids, num_groups)
        num = share.rows.num_good
        bounds = Bounds(
            labels=scratch((num,), torch.int32).fill_(-1),
            upper=scratch((num,), torch.float32).fill_(math.inf),
            lower=scratch((num, len(groups.members)), torch.float32).fill_(-math.inf),
            squares=share.squares,
        )
        return LloydPasses(share, groups, bounds, Stats.zeros(num_labels, dim, share.device), centroids)

    def advance(self, centroids: Tensor) -> Centroids:
        """Labels and stats for these centroids."""
        grouped = GroupedCentroids.of(centroids, self.groups, self.share.proposer)
        drift = Drift.between(self.centroids, centroids, self.groups) if self.number else None
        change = Stats.zeros(len(centroids), centroids.shape[1], self.share.device)

        adding = Lock()

        def work(block: RowBlock) -> Moves:
            kept = self.bounds.part(block.places)
            bounds = kept.to(self.share.device)
            if drift:
                bounds.shift_(drift)
            moves = reassign(block.take, grouped, bounds)
            kept.copy_(bounds)
            if len(moves.rows):
                x, squares = joined(block.take(moves.rows)), bounds.squares[moves.rows]
                with adding:
                    change.add_(x, squares, moves.after)
                    if drift:
                        change.add_(x, squares, moves.before, sign=-1)
            return moves

        for moves in side_by_side(work, self.share.row_blocks(), self.share.threads):
            self.undecided += moves.undecided
            self.searched += moves.searched
        self.centroids, self.number = centroids, self.number + 1
        for kept_sum, of_ranks in zip(self.stats.tensors, change.tensors, strict=True):
            kept_sum.add_(self.share.total(of_ranks))
        return grouped.whole

    def result(self, last: Progress) -> KMeansResult:
        """What has come of it, given the centroids of the last pass."""
        counts = self.stats.counts.cpu().numpy()
        searched, undecided = (int(self.share.total(torch.tensor(n))) for n in (self.searched, self.undecided))
        decisions = self.share.num_good * self.number
        return KMeansResult(
            centroids=last.centroids,
            labels=self.labels(),
            counts=counts,
            inertia=[i * SQUARE_UNIT for i in last.inertia],
            empty_repaired=last.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=undecided / decisions,
            searched_share=searched / (decisions * len(last.centroids)),
        )

    def labels(self) -> list[np.ndarray]:
        """Of the rank's rows by shard, (P,) int32, -1 for bad rows."""
        parts, first = [], 0
        for good in self.share.rows.good:
            part = np.full(len(good), -1, dtype=np.int32)
            part[good] = self.bounds.labels[first : first + int(good.sum())].numpy()
            parts.append(part)
            first += int(good.sum())
        return parts


def _checked_initial(initial: np.ndarray, shape: tuple[int, int]) -> Tensor:
    if initial.shape != shape:
        raise ValueError(f"initial centroids must be {shape}, found {initial.shape}")
    if found := row_problem(initial, np.ones(len(initial), dtype=bool)):
        raise ValueError(f"initial centroids: row {found[0]} {found[1]}")
    return to_grid(torch.from_numpy(initial.astype(np.float32)))
